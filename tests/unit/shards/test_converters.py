"""Converters: every question of the original files becomes a record that a build accepts, or is counted by reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from arc_ds.cli import main
from arc_ds.errors import DataError
from arc_ds.shards.building.converters import ConvertOptions, convert_files
from arc_ds.shards.building.question_rows import read_question
from arc_ds.shards.building.writer import build_shards
from arc_ds.shards.reader import ShardSet
from tests.helpers.tiny_data import write_tiktoken

PASSAGE = "The lamp was lit in 1811. It burned whale oil, then gas."
QUESTIONS = [
    {
        "id": "q1",
        "question": " What burned? ",
        "answers": [{"text": text} for text in ("whale oil", "gas", "whale oil ")],
    },
    {"id": "q2", "question": "Who lit it?", "answers": [], "is_impossible": True},
]
SQUAD = {"version": "v2.0", "data": [{"title": "Lamp", "paragraphs": [{"context": PASSAGE, "qas": QUESTIONS}]}]}


def drop_answer(number: str = "", spans: tuple[str, ...] = (), **date: str) -> dict[str, Any]:
    return {"number": number, "date": {"day": "", "month": "", "year": ""} | date, "spans": spans}


PAIRS = [
    {"query_id": "a", "question": "How many fuels?", "answer": drop_answer("2")},
    {
        "query_id": "b",
        "question": "Which fuels?",
        "answer": drop_answer(spans=("whale oil", "gas")),
        "validated_answers": [drop_answer(spans=("oil and gas",))],
    },
    {"query_id": "c", "question": "When was it lit?", "answer": drop_answer(month="May", year="1811")},
    {"query_id": "d", "question": "Why?", "answer": drop_answer()},
]
DROP = {"sea_1": {"passage": PASSAGE, "qa_pairs": PAIRS}}
LAMP = [{"Filename": "Lamp.txt", "Title": "Lamp"}]
TRIVIA = {
    "Data": [
        {
            "QuestionId": "tc_1",
            "Question": "Which oil did the lamp burn?",
            "Answer": {"Value": "whale oil", "Aliases": ["oil of whales", "whale oil"]},
            "EntityPages": LAMP,
            "SearchResults": [{"Filename": "7/7_1.txt", "Rank": 0}],
        },
        {"QuestionId": "tc_2", "Question": "Who?", "Answer": {"Value": "Ann (the elder)"}, "EntityPages": LAMP},
    ],
    "Domain": "Web",
}


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_trivia(folder: Path) -> Path:
    write(
        folder / "evidence" / "wikipedia" / "Lamp.txt",
        "Title\n\nIt burned oil of\nwhales once. Oil of Whales burns well.",
    )
    line = "Whale oil it was that the lamp did burn, which oil is thin. " + "word " * 12
    write(folder / "evidence" / "web" / "7" / "7_1.txt", f"nothing of note here\n{line}\nwhale oils are another thing")
    return write(folder / "qa" / "web-train.json", TRIVIA)


def test_squad_keeps_every_answer_once_and_counts_questions_without(tmp_path: Path) -> None:
    done = convert_files("squad", [write(tmp_path / "s.json", SQUAD)], tmp_path / "out.jsonl")
    assert read(tmp_path / "out.jsonl") == [
        {"passages": [PASSAGE], "question": "What burned?", "answer": ["whale oil", "gas"]}
    ]
    assert (done.records, done.skipped) == (1, {"unanswerable": 1})


def test_drop_answers_are_numbers_dates_or_spans_together(tmp_path: Path) -> None:
    done = convert_files("drop", [write(tmp_path / "d.json", DROP)], tmp_path / "out.jsonl")
    assert [record["answer"] for record in read(tmp_path / "out.jsonl")] == [
        ["2"],
        ["whale oil, gas", "oil and gas"],
        ["May 1811"],
    ]
    assert done.skipped == {"unanswerable": 1}


def test_trivia_passages_hold_the_answer_and_the_best_come_first(tmp_path: Path) -> None:
    path = write_trivia(tmp_path)
    done = convert_files("triviaqa", [path], tmp_path / "out.jsonl", ConvertOptions(passage_words=14))
    (record,) = read(tmp_path / "out.jsonl")
    assert record["answer"] == ["whale oil", "oil of whales"]
    assert record["passages"] == [
        "Whale oil it was that the lamp did burn, which oil is thin. word",
        "Title\nIt burned oil of\nwhales once. Oil of Whales burns well.",
    ]
    assert done.skipped == {"no_evidence": 1}
    options = ConvertOptions(passage_words=14, max_passages=1, first_answer=True)
    convert_files("triviaqa", [path], tmp_path / "out.jsonl", options, overwrite=True)
    (record,) = read(tmp_path / "out.jsonl")
    assert (len(record["passages"]), record["answer"]) == (1, ["whale oil"])


@pytest.mark.parametrize(
    ("format_name", "content", "message"),
    [
        ("squad", DROP, r"in\.json: not of the format squad \(the field 'data' is missing\)"),
        ("squad", [], "not of the format squad"),
        ("drop", SQUAD, "not of the format drop"),
        ("triviaqa", SQUAD, "'Data' is missing"),
        ("squad", "{", r"in\.json:1: not valid JSON.*Pass the original file"),
        ("drop", {"x": {"passage": " ", "qa_pairs": PAIRS[:1]}}, "question a: .*'passages'"),
        ("hotpot", SQUAD, "expected one of squad, drop, triviaqa"),
    ],
)
def test_a_file_of_another_format_is_named_and_nothing_is_written(
    tmp_path: Path, format_name: str, content: Any, message: str
) -> None:
    path = write(tmp_path / "in.json", content)
    with pytest.raises(DataError, match=message):
        convert_files(format_name, [path], tmp_path / "out.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["in.json"]


ROW = {"id": "1", "title": "Lamp", "context": PASSAGE, "question": "What burned?"}
ROWS = [
    ROW | {"answers": {"text": ["whale oil", "gas"], "answer_start": [39, 55]}},
    ROW | {"answers": {"text": [], "answer_start": []}},
]
RECORD = {"passages": [PASSAGE], "question": "What burned?", "answer": ["whale oil", "gas"]}


def write_rows(path: Path, rows: list[dict[str, Any]], form: str) -> Path:
    """Write rows in a form that people keep the Hub's data sets in."""
    if form in ("array", "data", "lines"):
        lines = "\ufeff" + "".join(json.dumps(row) + "\n" for row in rows)
        return write(path, lines if form == "lines" else rows if form == "array" else {"version": "1", "data": rows})
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.Table.from_pylist(rows)
    if form == "arrow":
        with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    else:
        table = table.flatten() if form == "flat" else table
        pytest.importorskip("pyarrow.parquet").write_table(table, path)
    return path


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("a.json", "array"), ("a.json", "data"), ("a.jsonl", "lines"), ("a.json", "lines"), ("train-v1.1", "array"),
        ("a.parquet", "parquet"), ("a.parquet", "flat"), ("a.arrow", "arrow"),
    ],
)  # fmt: skip
def test_rows_of_the_hub_are_converted_and_built(tmp_path: Path, tokenizer_path: Path, name: str, form: str) -> None:
    source = write_rows(tmp_path / name, ROWS, form)
    done = convert_files("squad", [source], tmp_path / "out.jsonl")
    assert read(tmp_path / "out.jsonl") == [RECORD]
    assert (done.records, done.skipped) == (1, {"unanswerable": 1})
    if form in ("array", "data"):
        return
    manifest = build_shards([source], tmp_path / "shards", tokenizer_path, kind="fine_tuning")
    assert ShardSet(tmp_path / "shards").record(0) == RECORD
    assert (manifest.samples, manifest.skipped) == (1, {"unanswerable": 1})


SENTENCES = [["Lamp", ["It was lit", " in 1811. "]], ["Oil", ["Whale oil burns."]]]
LAMP_AND_OIL = ["Oil\nWhale oil burns.", "Lamp\nIt was lit in 1811."]  # the supporting one first


@pytest.mark.parametrize(
    ("fields", "passages"),
    [
        ({"context": SENTENCES, "supporting_facts": [["Oil", 0]]}, LAMP_AND_OIL),
        (
            {
                "context": {"title": ["Lamp", "Oil"], "sentences": [text for _, text in SENTENCES]},
                "supporting_facts": {"title": ["Oil"], "sent_id": [0]},
            },
            LAMP_AND_OIL,
        ),
        ({"passages": {"is_selected": [0, 1], "passage_text": ["No.", "Yes."], "url": ["", ""]}}, ["Yes.", "No."]),
        ({"paragraphs": [{"title": "A", "paragraph_text": "B", "is_supporting": False}]}, ["A\nB"]),
        ({"ctxs": [{"id": 1, "title": "", "text": "B", "score": 2.0}]}, ["B"]),
        ({"passages": ["\ufeffA", "B"]}, ["A", "B"]),
        ({"passage": "A"}, ["A"]),
    ],
    ids=["hotpot", "hotpot of the hub", "ms marco", "musique", "dpr", "texts", "text"],
)
@pytest.mark.parametrize(
    "answers",
    [
        {"answers": ["gas", "oil"]},
        {"answers": [{"text": "gas", "answer_start": 0}, {"text": "oil", "answer_start": 3}]},
        {"answers_spans": {"spans": ["gas", "oil"], "types": ["span", "span"]}},
        {"answer": {"value": "gas", "aliases": ["oil", "gas"], "type": "x"}},
    ],
)
def test_rows_of_other_sets_are_questions(fields: dict, passages: list[str], answers: dict) -> None:
    question = read_question({"query": " What? "} | fields | answers)
    assert (list(question.passages), question.text, question.answers) == (passages, "What?", ("gas", "oil"))
    assert question.reason is None
    marks = ({"is_impossible": True}, {"answerable": False}, {name: None for name in answers})
    assert read_question({"query": "What?", "answers": ["No Answer Present."]} | fields).reason == "unanswerable"
    for mark in marks:
        assert read_question({"question": "What?"} | fields | answers | mark).reason == "unanswerable"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"context": 3}, "expected passages as texts, .* got int"),
        ({"context": {"title": ["A"], "sentences": []}}, "lists of one length"),
        ({"context": None}, r"the passages in one of the fields context, .* got the fields"),
        ({"answers": "{'text': ['gas']}"}, "stored as a text"),
        ({"answers": {"label": 1}}, r"got the fields \['label'\]"),
        ({"answers": [True]}, "got bool"),
        ({"question": ["What?"]}, "the question as a text, got list"),
    ],
)
def test_a_row_of_an_unknown_form_is_named(tmp_path: Path, tokenizer_path: Path, change: dict, words: str) -> None:
    source = write_rows(tmp_path / "a.jsonl", [ROWS[0], ROWS[0] | change], "lines")
    with pytest.raises(DataError, match=rf"a\.jsonl, row 2: .*{words}.*Fix or remove it"):
        convert_files("squad", [source], tmp_path / "out.jsonl")
    with pytest.raises(DataError, match=rf"a\.jsonl, line 2: .*{words}.*Fix or remove it"):
        build_shards([source], tmp_path / "shards", tokenizer_path, kind="fine_tuning")


@pytest.mark.parametrize("form", ["lines", "parquet"])
def test_documents_in_rows_of_triviaqa_are_cut_and_a_build_says_how(
    tmp_path: Path, tokenizer_path: Path, form: str
) -> None:
    answer = {"value": "whale oil", "aliases": ["oil of whales"], "normalized_aliases": ["whale oil"]}
    row = {"question": "Which oil?", "question_id": "tc_1", "answer": answer}
    rows = [
        row | {"entity_pages": {"title": titles, "wiki_context": texts}, "search_results": {"search_context": []}}
        for titles, texts in ((["L"], ["\ufeffNothing here.\n" + "word " * 14 + "\nWhale oil it was."]), ([], []))
    ]
    source = write_rows(tmp_path / ("a.jsonl" if form == "lines" else "a.parquet"), rows, form)
    with pytest.raises(DataError, match="arc-ds shards convert triviaqa FILE --out NEW.jsonl"):
        build_shards([source], tmp_path / "shards", tokenizer_path, kind="fine_tuning")
    done = convert_files("triviaqa", [source], tmp_path / "out.jsonl", ConvertOptions(passage_words=14))
    (record,) = read(tmp_path / "out.jsonl")
    assert (record["passages"], record["answer"]) == (["Whale oil it was."], ["whale oil", "oil of whales"])
    assert done.skipped == {"no_evidence": 1}


def test_byte_order_marks_of_originals_and_evidence_are_dropped(tmp_path: Path) -> None:
    path = write(tmp_path / "s.json", "\ufeff" + json.dumps(SQUAD))
    assert convert_files("squad", [path], tmp_path / "out.jsonl").records == 1
    trivia = write_trivia(tmp_path)
    write(tmp_path / "evidence" / "wikipedia" / "Lamp.txt", "\ufeffWhale oil.")
    convert_files("triviaqa", [trivia], tmp_path / "t.jsonl")
    assert "Whale oil." in read(tmp_path / "t.jsonl")[0]["passages"]
    for broken in (path, tmp_path / "evidence" / "wikipedia" / "Lamp.txt"):
        broken.write_bytes("{}".encode("utf-16"))
    for name, source in (("squad", path), ("triviaqa", trivia)):
        with pytest.raises(DataError, match="is UTF-16, expected UTF-8.*iconv -f UTF-16"):
            convert_files(name, [source], tmp_path / "out.jsonl", overwrite=True)


def test_missing_evidence_is_an_error_with_the_cure(tmp_path: Path) -> None:
    path = write_trivia(tmp_path)
    (tmp_path / "evidence" / "web" / "7" / "7_1.txt").unlink()
    with pytest.raises(DataError, match=r"7_1\.txt: No such file.*--evidence"):
        convert_files("triviaqa", [path], tmp_path / "out.jsonl")


def test_the_command_line_converts_what_a_build_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "s.json", SQUAD)
    out = tmp_path / "out.jsonl"
    assert main(["shards", "convert", "squad", str(source), "--out", str(out)]) == 0
    assert "1 records; questions left out: 1 unanswerable" in capsys.readouterr().out
    assert main(["shards", "convert", "squad", str(source), "--out", str(out)]) == 2
    tokenizer = write_tiktoken(tmp_path / "tokenizer.model")
    build_shards([out], tmp_path / "shards", tokenizer, kind="fine_tuning")
    assert ShardSet(tmp_path / "shards").record(0)["question"] == "What burned?"
