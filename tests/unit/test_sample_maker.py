"""Samples that cannot be made: what stops the run, what is passed over and counted, and which record is to blame."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from arc_ds.data.loader import StepData
from arc_ds.data.micro_batches import MicroBatchLimits
from arc_ds.data.token_cache_writer import build_token_caches
from arc_ds.data.tokenizers import Encoding, Tokenizer, load_tokenizer
from arc_ds.errors import DataError
from tests.helpers.batches import digest, sequences
from tests.helpers.tiny_mixture import SIZES, TinyMixture, question_records, write_question_shards

# The record of the few-shot source that cannot be used.
SPOILT = 4
STEPS = range(12)
FEW_SHOT_ONLY = (0.001, 0.998, 0.001)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> TinyMixture:
    """One byte of the record is not what was written."""
    mixture = TinyMixture.write(tmp_path_factory.mktemp("damaged"))
    for tar in (mixture.folder / "questions").glob("*.tar"):
        tar.write_bytes(tar.read_bytes().replace(b"of what is block 4?", b"of what is block 5?"))
        tar.write_bytes(tar.read_bytes().replace(b"Of what is block 4?", b"Of what is block 5?"))
    return mixture


@pytest.fixture(scope="module")
def unaskable(tmp_path_factory: pytest.TempPathFactory) -> TinyMixture:
    """The record is whole, but the task cannot make a sample of it: its instruction has two parts."""
    mixture = TinyMixture.write(tmp_path_factory.mktemp("unaskable"))
    records = question_records(SIZES[1])
    records[SPOILT]["instruction"] = "say||it"
    write_question_shards(mixture.folder / "unaskable", mixture.encoder, records)
    (mixture.folder / "questions").rename(mixture.folder / "sound")
    (mixture.folder / "unaskable").rename(mixture.folder / "questions")
    return mixture


def numbers_asked(data: StepData, mixture: TinyMixture) -> dict[int, Counter[tuple[int, ...]]]:
    """Of each step: the records named in each few-shot sample, its own last."""
    tokenizers = [load_tokenizer(mixture.decoder), load_tokenizer(mixture.encoder)]
    found = {}
    for step in STEPS:
        found[step] = Counter(
            tuple(
                int(block.split("?")[0]) for block in tokenizers[decoder_idx].decode(list(ids)).split("is block ")[1:]
            )
            for decoder_idx, task, ids, *_ in sequences([data[step]])[step].elements()
            if task == "few_shot"
        )
    return found


@pytest.mark.parametrize("name", ["damaged", "unaskable"])
def test_an_unusable_record_gives_way_and_an_unusable_example_is_left_out(
    name: str, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    mixture: TinyMixture = request.getfixturevalue(name)
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
    """The records of a sample as they are to be, its own last."""
    examples = tuple(idx for idx in examples if idx != SPOILT)
    while own == SPOILT or own in examples:
        own = (own + 1) % SIZES[1]
    return (*examples, own)


@pytest.mark.parametrize(
    ("name", "words"), [("damaged", "checksum"), ("unaskable", "record 4: expected an instruction")]
)
def test_an_unusable_record_stops_the_run_by_default(name: str, words: str, request: pytest.FixtureRequest) -> None:
    mixture: TinyMixture = request.getfixturevalue(name)
    data = mixture.data(weights=FEW_SHOT_ONLY)
    with pytest.raises(DataError, match=words):
        for step in STEPS:
            data[step]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> TinyMixture:
    return TinyMixture.write(tmp_path_factory.mktemp("sound"))


def test_a_sample_beyond_a_limit_stops_the_run_by_default(sound: TinyMixture) -> None:
    data = sound.data(limits=MicroBatchLimits(max_encoder_tokens=70))
    with pytest.raises(DataError, match=r"questions, record \d+: the sample has \d+ encoder tokens .* 70 \(data\.max"):
        for step in STEPS:
            data[step]


@pytest.mark.parametrize("schedule", ["sample", "same_batch"])
def test_a_record_beyond_a_limit_gives_way_for_all_decoders_of_the_step(sound: TinyMixture, schedule: str) -> None:
    data = sound.data(limits=MicroBatchLimits(max_encoder_tokens=70), on_error="skip", schedule=schedule)
    batches = [data[step] for step in STEPS]
    assert sum(batch.skipped for batch in batches) > 0
    for batch in batches:
        assert all(micro.batch.num_encoder_tokens <= 70 for micro in batch.micro_batches)
        of_decoder = {decoder_idx: Counter[str]() for decoder_idx in batch.decoder_idxs}
        for micro in batch.micro_batches:
            of_decoder[micro.decoder_idx].update(micro.batch.tasks)
        assert all(tasks == of_decoder[batch.decoder_idxs[0]] for tasks in of_decoder.values())
        assert of_decoder[batch.decoder_idxs[0]].total() == len(batch.record_ids) == 12


def test_of_records_that_are_too_much_together_only_examples_are_left_out(sound: TinyMixture) -> None:
    """No record exceeds the limit by itself, so each keeps its place in the run."""
    data = sound.data(limits=MicroBatchLimits(max_encoder_tokens=150), on_error="skip", weights=FEW_SHOT_ONLY)
    for step in STEPS:
        batch = data[step]
        picked = Counter((pick.source_idx, pick.record_idx) for pick in data.order.batch(step))
        assert Counter(batch.record_ids) == picked
        assert batch.skipped > 0


def test_token_caches_change_no_sample_and_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = TinyMixture.write(tmp_path)
    before = [digest(mixture.data(schedule="same_batch")[step]) for step in range(6)]
    data = mixture.data(schedule="same_batch")
    for name in ("texts", "questions", "long"):
        build_token_caches(mixture.folder / name, [mixture.encoder, mixture.decoder])
    tokenised = record_texts(monkeypatch, mixture)
    assert [digest(data[step]) for step in range(6)] == before
    texts = {source.shards.record(idx)["text"] for source in data.sources[::2] for idx in range(len(source.shards))}
    assert not texts & tokenised
    assert tokenised, "what is no record's text is tokenised as ever"


def record_texts(monkeypatch: pytest.MonkeyPatch, mixture: TinyMixture) -> set[str]:
    """All texts that will be tokenised, as they come."""
    found: set[str] = set()
    for kind in {type(load_tokenizer(path)) for path in (mixture.encoder, mixture.decoder)}:
        original = kind.encode_with_ends

        def recorded(self: Tokenizer, text: str, original: Any = original) -> Encoding:
            found.add(text)
            return original(self, text)

        monkeypatch.setattr(kind, "encode_with_ends", recorded)
    return found
