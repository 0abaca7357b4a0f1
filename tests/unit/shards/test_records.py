"""Records: both kinds, and a specific error for every fault."""

from __future__ import annotations

import json

import pytest

from arc_ds.errors import DataError
from arc_ds.shards import records
from arc_ds.shards.records import (
    FineTuningRecord,
    decode_object,
    encode_record,
    fine_tuning_record,
    pretraining_text,
    value_of,
)

WHOLE = {"passages": ["One.", "Two."], "question": "Which?", "answer": ["one", "One"], "instruction": "Say {question}"}


def test_both_kinds_are_read_as_they_were_written() -> None:
    for record in ({"text": "A lamp.\u2028"}, WHOLE):
        assert decode_object(encode_record(record)) == record


def test_fine_tuning_record_of_every_form() -> None:
    assert fine_tuning_record(WHOLE) == FineTuningRecord(
        passages=("One.", "Two."), question="Which?", instruction="Say {question}", answers=("one", "One")
    )
    bare = FineTuningRecord(passages=("One.",), question=None, instruction=None, answers=("one",))
    for field in ("passage", "passages"):
        assert fine_tuning_record({field: "One.", "answer": "one"}) == bare
        assert fine_tuning_record({field: "One.", "answer": ["one"], "question": " ", "instruction": None}) == bare
    assert bare.texts == ("One.", "one")
    assert fine_tuning_record(WHOLE).texts == ("One.", "Two.", "Say {question}", "Which?", "one", "One")


def test_a_byte_order_mark_at_the_start_of_a_record_or_text_is_dropped() -> None:
    assert decode_object(b"\xef\xbb\xbf" + encode_record(WHOLE)) == WHOLE
    assert pretraining_text({"text": "\ufeffA lamp."}) == "A lamp."
    marked = {"passages": ["\ufeffOne.", "Two."], "question": "\ufeffWhich?", "answer": ["\ufeffone", "One"]}
    assert fine_tuning_record(WHOLE | marked) == fine_tuning_record(WHOLE)
    with pytest.raises(DataError, match="non-empty"):
        pretraining_text({"text": "\ufeff"})


def test_a_field_may_lie_in_an_object() -> None:
    record = {"a": {"b": {"c": 1}, "d.e": 2}, "a.b": 3, "f": "text"}
    names = ("a.b.c", "a.d.e", "a.b", "f", "f.g", "a.x", "x")
    assert [value_of(record, name) for name in names] == [1, 2, 3, "text", None, None, None]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"passages": None}, r"`passages` .* or `passage` .*, got the fields"),
        ({"passage": "One."}, "got both"),
        ({"passages": []}, "'passages', got an empty list"),
        ({"passages": ["One.", 2]}, "'passages', got a list of int, str"),
        ({"passages": ["One.", " \n"]}, "'passages', got a blank string"),
        ({"passages": {"a": 1}}, "'passages', got dict"),
        ({"answer": ""}, "'answer', got a blank string"),
        ({"answer": ["one", ""]}, "'answer', got a blank string"),
        ({"answer": []}, "'answer', got an empty list"),
        ({"answer": 42}, "'answer', got int"),
        ({"answer": "\ud800"}, "'answer' holds characters that UTF-8 cannot encode"),
        ({"question": 3}, "'question', got int"),
        ({"question": "\udfff?"}, "'question' holds characters"),
        ({"instruction": ["Do."]}, "'instruction', got a list of str"),
        ({"instruction": "Text:||Do {question}"}, "'instruction', got 2 parts: .* Write || twice"),
        ({"instruction": "a||b||c||d"}, "'instruction', got 4 parts"),
    ],
)
def test_faulty_field_is_named(change: dict, words: str) -> None:
    with pytest.raises(DataError, match=words):
        fine_tuning_record(decode_object(json.dumps(WHOLE | change).encode()))


def test_missing_answer_is_named_with_the_fields_there_are() -> None:
    with pytest.raises(DataError, match=r"'answer', got the fields \['passage'\]"):
        fine_tuning_record({"passage": "One."})


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (b'{"text": ""}', "non-empty string in the field `text`"),
        (b'{"text": 3}', "'text', got int"),
        (b'{"txt": "a"}', r"'text', got the fields \['txt'\]"),
        (b'["text"]', "a JSON object, got list"),
        (b'{"text": {"body": "a"}}', "got an object with the fields text.body"),
        (b'{"text": "caf\xe9"}', "not UTF-8"),
        ('{"text": "a"}'.encode("utf-16"), "is UTF-16, expected UTF-8"),
        ('{"text": "a"}'.encode("utf-16-le"), "is UTF-16LE, expected UTF-8"),
        (b'{"text": "a"', "JSON in UTF-8"),
        (b'{"n": ' + b"[" * 100_000 + b"}", "JSON in UTF-8"),
        (b'{"n": ' + b"9" * 5000 + b"}", "JSON in UTF-8"),
        (b'{"text": "\\ud83d"}', "UTF-8 cannot encode"),
    ],
)
def test_faulty_payload_is_named(payload: bytes, words: str) -> None:
    with pytest.raises(DataError, match=words):
        pretraining_text(decode_object(payload))


def test_record_of_100_megabytes_is_refused_before_it_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_json", None)
    with pytest.raises(DataError, match=r"record of 100000000 bytes; expected at most 16777216.*Cut it"):
        decode_object(bytes(100_000_000))
