"""Held-out examples are fixed, spread over their sources, and from the same records for every decoder."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from arc_ds.data.loading.decoder_reader import Reader
from arc_ds.data.loading.sample_maker import OnError
from arc_ds.data.loading.source import Source
from arc_ds.data.loading.validation_set import validation_examples
from arc_ds.data.tasks import Example, TaskLimits, mismatched
from arc_ds.errors import DataError
from arc_ds.shards.reader import ShardSet
from arc_ds.shards.records import encode_record
from arc_ds.tokenizers import load_tokenizer
from tests.helpers.tiny_data import numbered_texts, write_shards
from tests.helpers.tiny_mixture import SIZES, TinyMixture, write_question_shards
from tests.unit.data.examples import context_ids, text_ids

LIMITS = TaskLimits(max_context=16, max_prefix=16, max_continuation=16)


class Setting:
    """Two held-out sources and two tokenizers."""

    def __init__(self, folder: Path, mixture: TinyMixture) -> None:
        self.encoder_path = mixture.encoder
        self.encoder = load_tokenizer(mixture.encoder)
        self.readers = [Reader(load_tokenizer(mixture.decoder)), Reader(self.encoder)]
        texts = numbered_texts(90)
        self.sources = [self.source(folder / "a", texts[:60]), self.source(folder / "b", texts[60:])]

    def source(self, folder: Path, texts: list[str]) -> Source:
        """Write a source of texts."""
        return Source(shards=write_shards(folder, self.encoder_path, texts), limits=LIMITS)

    def examples(self, sources: list[Source], num: int, on_error: OnError = "stop") -> tuple[tuple[Example, ...], ...]:
        return validation_examples(sources, num, encoder=self.encoder, readers=self.readers, on_error=on_error)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory, mixture: TinyMixture) -> Setting:
    return Setting(tmp_path_factory.mktemp("held_out"), mixture)


def test_held_out_examples_are_fixed_and_half_of_each_task(setting: Setting) -> None:
    found = setting.examples(setting.sources[:1], 20)
    assert found == setting.examples(setting.sources[:1], 20)
    for examples in found:
        assert [example.sample.task for example in examples] == ["reconstruction"] * 10 + ["continuation"] * 10
        assert len({example.contexts for example in examples}) == 20


def test_every_decoder_reads_the_same_held_out_records(setting: Setting, tmp_path: Path) -> None:
    source = setting.source(tmp_path / "own", [f"Tower {number} " * 20 for number in range(100, 140)])
    first, second = setting.examples([source], 24)
    numbers = [[re.findall(r" (\d+) ", example.contexts[0])[0] for example in examples] for examples in (first, second)]
    assert numbers[0] == numbers[1] and len(set(numbers[0])) == 24
    assert [example.sample for example in first] != [example.sample for example in second]


def test_sources_share_the_held_out_samples_by_weight(setting: Setting) -> None:
    first, second = setting.sources
    both, _ = setting.examples([replace(first, weight=3.0), second], 24)
    of_first, _ = setting.examples([first], 18)
    assert both[:18] == of_first, "a source's samples do not depend on the other sources"
    assert len(both) == 24


def test_too_few_held_out_records_are_refused_with_the_source_named(setting: Setting) -> None:
    first, second = setting.sources
    with pytest.raises(DataError, match=r"/b: 31 validation samples .* holds 30 records\. Request 4 to 30"):
        setting.examples([second], 31)
    with pytest.raises(DataError, match="/a: 2 validation samples .* Request 4 to 60"):
        setting.examples([first, second], 4)


def test_held_out_records_that_are_all_too_short_are_an_error(setting: Setting, tmp_path: Path) -> None:
    source = setting.source(tmp_path / "short", ["A sea."] * 8)
    with pytest.raises(DataError, match=r"too few usable records .*: 4 are too short for a task, 0 cannot be used"):
        setting.examples([source], 8)


def damage(shards: ShardSet, records: Sequence[int]) -> None:
    """Damage one character in each of these records."""
    payloads = [encode_record(shards.record(idx)) for idx in records]
    for tar in shards.folder.glob("*.tar"):
        content = tar.read_bytes()
        for payload in payloads:
            content = content.replace(payload, payload.replace(b"sea", b"see", 1))
        tar.write_bytes(content)


def test_a_damaged_held_out_record_stops_the_run_or_is_named_and_those_too_short_are_counted(
    setting: Setting, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = [f"Tower {number} of the sea. " * 20 for number in range(100, 140)]
    texts[2] = texts[10] = "A sea."  # records 0, 2, ... 38 are used, for both tasks in turn
    source = setting.source(tmp_path / "own", texts)
    sound, _ = setting.examples([source], 20)
    assert len(sound) == 20
    damage(source.shards, [4, 36])
    source = replace(source, shards=ShardSet(tmp_path / "own"))
    with pytest.raises(DataError, match=r"own, held-out record 4: .*own/shard-.* the checksum .*data\.on_error: skip"):
        setting.examples([source], 20)
    with caplog.at_level(logging.INFO):
        found, _ = setting.examples([source], 20, on_error="skip")
    assert sum(one == other for one, other in zip(sound, found, strict=True)) == 18
    messages = [record.getMessage() for record in caplog.records]
    assert sorted(re.findall(r"held-out record (\d+)", " ".join(messages))) == ["36", "4"]
    assert "held-out records skipped: 2 too short for their task, 2 that cannot be used" in messages


def test_a_damaged_in_context_example_is_no_silent_change_either(setting: Setting, tmp_path: Path) -> None:
    records = [{"passage": f"Lamp {n} at sea.", "question": "Which?", "answer": f"{n}"} for n in range(12)]
    shards = write_question_shards(tmp_path / "questions", setting.encoder_path, records)
    damage(shards, [11])  # records 0, 2, ... 10 are used
    source = Source(shards=ShardSet(shards.folder), task="few_shot", in_context_examples=5)
    with pytest.raises(DataError, match=r"record \d+ with the in-context examples .*11.*the checksum"):
        setting.examples([source], 6)


def test_held_out_few_shot_samples_have_fixed_examples_from_their_source(
    setting: Setting, mixture: TinyMixture
) -> None:
    def questions() -> list[list[str]]:
        """The records of each sample, its own last."""
        _, examples = setting.examples(mixture.sources()[1:2], SIZES[1])
        texts = [setting.encoder.decode(text_ids(example.sample)) for example in examples]
        return [re.findall(r"Of what is block (\d+)\?", text) for text in texts]

    found = questions()
    assert found == questions()
    assert sorted(int(asked[-1]) for asked in found) == list(range(SIZES[1])), "each record is asked about once"
    assert all(len(set(asked)) == len(asked) for asked in found)
    assert {len(asked) for asked in found} == {1, 2, 3, 4}


def test_no_in_context_example_holds_a_passage_of_the_record_asked_about(
    setting: Setting, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Twelve questions per page, as in question sets."""
    records = [
        {"passages": [f"Tower {page} stands in the sea.", f"Lamp {page}."], "question": f"q {q}?", "answer": f"a {q}"}
        for page in range(3)
        for q in range(12)
    ]
    records[0]["answer"] = "a lamp in the sea"
    shards = write_question_shards(tmp_path / "questions", setting.encoder_path, records)
    limits = TaskLimits(max_passages=2, max_answer=8)
    source = Source(shards=shards, task="few_shot", in_context_examples=3, limits=limits)
    with caplog.at_level(logging.INFO):
        _, examples = setting.examples([source], 30)
    assert len(examples) == 30 and sum(len(example.contexts) > 1 for example in examples) > 10
    for example, other in zip(examples, mismatched(examples), strict=True):
        own = example.contexts[-1].split("\n")[0]
        given = [setting.encoder.decode(ids) for ids in context_ids(other)]
        assert not any(own in context for context in (*example.contexts[:-1], *given))
    (said,) = [record.getMessage() for record in caplog.records if "held-out" in record.getMessage()]
    assert re.fullmatch(
        r"held-out samples, of all decoders: 60, cut to the limits: (cut_examples \d+, )?cut_answers 2", said
    )


def test_a_task_that_its_records_cannot_serve_is_refused(mixture: TinyMixture) -> None:
    texts, questions, _ = mixture.sources()
    with pytest.raises(
        DataError, match="texts holds pretraining records, .* Set its `task` to long_context or pretraining"
    ):
        replace(texts, task="few_shot")
    with pytest.raises(DataError, match="questions holds fine_tuning records, .* Set its `task` to few_shot"):
        replace(questions, task="pretraining", in_context_examples=0)
    assert replace(questions, task="long_context", in_context_examples=0).tasks == ("long_context",)
