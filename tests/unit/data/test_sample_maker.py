"""Unusable records: some stop the run, others are skipped and counted, and the right record is blamed."""

from __future__ import annotations

import logging
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from arc_ds.data.loading import sample_maker
from arc_ds.data.loading.loader import StepData
from arc_ds.data.loading.sample_maker import OnError
from arc_ds.data.loading.source import Source
from arc_ds.data.tasks import Example, make_example
from arc_ds.errors import DataError
from arc_ds.shards.reader import ShardSet
from arc_ds.shards.token_cache.writer import build_token_caches
from arc_ds.tokenizers import Encoding, Tokenizer, load_tokenizer
from tests.helpers.batches import digest, sequences
from tests.helpers.tiny_data import write_tokenizer_without
from tests.helpers.tiny_mixture import LIMITS, SIZES, TinyMixture, question_records, write_question_shards
from tests.unit.data.examples import data_of

# The unusable record of the few-shot source.
SPOILT = 4
STEPS = range(12)
# The shards' tokenizer has a token for this character. Another tokenizer has none.
UNANSWERABLE = "\x16"
FEW_SHOT_ONLY = (0.001, 0.998, 0.001)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> TinyMixture:
    """One byte of the record is damaged."""
    mixture = TinyMixture.write(tmp_path_factory.mktemp("damaged"))
    for tar in (mixture.folder / "questions").glob("*.tar"):
        tar.write_bytes(tar.read_bytes().replace(b"of what is block 4?", b"of what is block 5?"))
        tar.write_bytes(tar.read_bytes().replace(b"Of what is block 4?", b"Of what is block 5?"))
    return mixture


@pytest.fixture(scope="module")
def unaskable(tmp_path_factory: pytest.TempPathFactory) -> TinyMixture:
    """The record is intact, but its answer has no decoder token, so the task cannot make a sample."""
    mixture = TinyMixture.write(tmp_path_factory.mktemp("unaskable"))
    records = question_records(SIZES[1])
    records[SPOILT]["answer"] = UNANSWERABLE
    write_question_shards(mixture.folder / "unaskable", mixture.encoder, records)
    (mixture.folder / "questions").rename(mixture.folder / "sound")
    (mixture.folder / "unaskable").rename(mixture.folder / "questions")
    mixture.encoder = mixture.decoder = write_tokenizer_without(mixture.folder / "poorer", 0x16)
    return mixture


def numbers_asked(data: StepData, mixture: TinyMixture) -> dict[int, Counter[tuple[int, ...]]]:
    """For each step, the records named in each few-shot sample, its own last."""
    tokenizers = [load_tokenizer(mixture.decoder), load_tokenizer(mixture.encoder)]
    return {
        step: Counter(
            tuple(map(int, re.findall(r"is block (\d+)\?", tokenizers[decoder_idx].decode(list(ids)))))
            for decoder_idx, task, ids, *_ in found.elements()
            if task == "few_shot"
        )
        for step, found in sequences(map(data.__getitem__, STEPS)).items()
    }


@pytest.mark.parametrize(
    ("name", "words"), [("damaged", "checksum"), ("unaskable", "record 4: the answer .* gives no decoder token")]
)
def test_an_unusable_record_stops_the_run_or_gives_way_and_an_unusable_example_is_left_out(
    name: str, words: str, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    mixture: TinyMixture = request.getfixturevalue(name)
    with pytest.raises(DataError, match=words):
        list(map(mixture.data(weights=FEW_SHOT_ONLY).__getitem__, STEPS))
    data = mixture.data(weights=FEW_SHOT_ONLY, on_error="skip")
    with caplog.at_level(logging.WARNING):
        asked = numbers_asked(data, mixture)
    expected, num_spoilt = {}, 0
    for step in STEPS:
        picks = [pick for pick in data.order.batch(step) if pick.task == "few_shot"]
        num_spoilt += sum(SPOILT in (pick.record_idx, *pick.example_idxs) for pick in picks)
        expected[step] = Counter(without_spoilt(pick.record_idx, pick.example_idxs) for pick in picks)
    assert num_spoilt > 10
    assert asked == expected
    assert sum(data[step].skipped for step in STEPS) == num_spoilt
    assert len([record for record in caplog.records if "record skipped" in record.message]) == 1


def without_spoilt(own: int, examples: tuple[int, ...]) -> tuple[int, ...]:
    """The expected records of a sample, its own last."""
    examples = tuple(idx for idx in examples if idx != SPOILT)
    while own == SPOILT or own in examples:
        own = (own + 1) % SIZES[1]
    return (*examples, own)


@pytest.fixture(scope="module")
def poorer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that has no token for one character."""
    return write_tokenizer_without(tmp_path_factory.mktemp("poorer"), 0x16)


def few_shot_data(shards: ShardSet, encoder: Path, decoder: Path, on_error: OnError = "skip") -> StepData:
    """Steps of a single few-shot source with up to three in-context examples."""
    source = Source(shards=shards, task="few_shot", in_context_examples=3, limits=LIMITS)
    return data_of(source, encoder, decoder, seed=4, batch_size=8, on_error=on_error)


def test_what_no_task_foresaw_is_a_fault_of_the_record(mixture: TinyMixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(records: list[dict[str, Any]], **rest: Any) -> Example:
        if any("block 4?" in record["question"] for record in records):
            raise ValueError("an odd text")
        return make_example(records, **rest)

    monkeypatch.setattr(sample_maker, "make_example", failing)
    shards = ShardSet(mixture.folder / "questions")
    data = few_shot_data(shards, mixture.encoder, mixture.decoder)
    assert sum(data[step].skipped for step in STEPS) > 0
    data = few_shot_data(shards, mixture.encoder, mixture.decoder, "stop")
    with pytest.raises(DataError, match="questions, record 4: it gives no sample: an odd text"):
        list(map(data.__getitem__, STEPS))


@pytest.mark.parametrize("spoilt", [{2}, {0, 3}, {0, 1, 2}])
def test_where_no_record_is_free_an_example_takes_the_own_records_place(
    spoilt: set[int], mixture: TinyMixture, poorer: Path, tmp_path: Path
) -> None:
    """With four records and up to three examples, one sample can contain all of them."""
    records = question_records(4)
    for idx in spoilt:
        records[idx]["answer"] = UNANSWERABLE
    shards = write_question_shards(tmp_path / "questions", mixture.encoder, records)
    data = few_shot_data(shards, mixture.encoder, poorer)
    for step in STEPS:
        assert {idx for _, idx in data[step].record_ids} <= {0, 1, 2, 3} - spoilt
        assert len(data[step].record_ids) == 8


def test_a_source_of_unusable_records_only_ends_the_run(mixture: TinyMixture, poorer: Path, tmp_path: Path) -> None:
    records = [record | {"answer": UNANSWERABLE} for record in question_records(4)]
    shards = write_question_shards(tmp_path / "questions", mixture.encoder, records)
    with pytest.raises(DataError, match="4 records in a row"):
        few_shot_data(shards, mixture.encoder, poorer)[0]


def test_the_record_blamed_is_the_one_whose_drawn_answer_is_at_fault(
    mixture: TinyMixture, poorer: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One of its two answers has no token. The record alone, with other draws, may still give a sample."""
    records = question_records(12)
    records[SPOILT]["answer"] = ["stone", UNANSWERABLE]
    shards = write_question_shards(tmp_path / "questions", mixture.encoder, records)
    data = few_shot_data(shards, mixture.encoder, poorer)
    assert sum(data[step].skipped for step in range(40)) > 0
    assert [record.message.split(": ")[1] for record in caplog.records if "skipped" in record.message] == [
        f"{shards.name}, record {SPOILT}"
    ]


def test_token_caches_change_no_sample_and_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = TinyMixture.write(tmp_path)
    before = [digest(mixture.data(schedule="same_batch")[step]) for step in range(6)]
    data = mixture.data(schedule="same_batch")
    for name in ("texts", "questions", "long"):
        build_token_caches(mixture.folder / name, [mixture.encoder, mixture.decoder])
    tokenised: set[str] = set()
    for kind in {type(load_tokenizer(path)) for path in (mixture.encoder, mixture.decoder)}:

        def recorded(self: Tokenizer, text: str, original: Any = kind.encode_with_ends) -> Encoding:
            tokenised.add(text)
            return original(self, text)

        monkeypatch.setattr(kind, "encode_with_ends", recorded)
    assert [digest(data[step]) for step in range(6)] == before
    texts = {source.shards.record(idx)["text"] for source in data.sources[::2] for idx in range(len(source.shards))}
    assert not texts & tokenised
    assert tokenised, "what is no record's text is tokenised as ever"
