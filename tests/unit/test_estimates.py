"""Estimates from the index against the samples that are made."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest

from arc_ds.data.batches.estimates import Estimate, Estimator, WorkRates
from arc_ds.data.batches.micro_batches import SampleSize, sample_size
from arc_ds.data.batches.packing import PoolingSpec
from arc_ds.data.groups import GroupRule
from arc_ds.data.tasks import TaskLimits
from tests.helpers.tiny_mixture import TinyMixture

LIMITS = TaskLimits(bos=False, markers=frozenset())
FOURS = PoolingSpec((GroupRule("factor", 4),))


def estimate(task: str, tokens: list[int], *, limits: TaskLimits = LIMITS, is_asked: bool = False) -> Estimate:
    return Estimator(limits, FOURS, is_asked=is_asked).estimate(task, tokens)  # type: ignore[arg-type]


def test_pretraining_samples_take_their_windows() -> None:
    assert estimate("reconstruction", [500]) == Estimate((256,), 0, 64 + 256)
    assert estimate("reconstruction", [100]) == Estimate((100,), 0, 25 + 100)
    assert estimate("continuation", [9000]) == Estimate((256,), 256, 64 + 256)
    assert estimate("continuation", [300]) == Estimate((100,), 100, 25 + 100)


def test_markers_and_the_beginning_of_text_are_rows() -> None:
    assert estimate("reconstruction", [100], limits=TaskLimits()) == Estimate((100,), 1, 26 + 100)


def test_in_context_examples_that_find_no_room_are_left_out_from_the_first_on() -> None:
    limits = TaskLimits(bos=False, markers=frozenset(), max_documents=400)
    lengths = [estimate("few_shot", [124, *examples], limits=limits).context_lengths for examples in (
        [], [224], [324], [224, 124], [124, 224], [124, 524, 124]
    )]  # fmt: skip
    assert lengths == [(100,), (200, 100), (300, 100), (200, 100, 100), (100, 200, 100), (100, 100)]
    assert estimate("few_shot", [1000], limits=limits).context_lengths == (400,)


def test_long_contexts_are_chunks() -> None:
    limits = TaskLimits(bos=False, markers=frozenset(), chunk_tokens=100, max_chunks=3)
    assert estimate("long_context", [450], limits=limits).context_lengths == (100, 100, 25)
    assert estimate("long_context", [9999], limits=limits).context_lengths == (100, 100, 100)
    assert estimate("long_context", [174], limits=limits, is_asked=True).context_lengths == (100, 50)


def test_memory_tokens_are_encoder_tokens_of_each_context() -> None:
    found = Estimate((100, 30), 1, 50)
    assert found.size(FOURS) == SampleSize(130, 51)
    assert found.size(PoolingSpec((), memory_tokens=7)) == SampleSize(144, 51)


def test_attention_makes_one_long_context_dearer_than_many_short_ones() -> None:
    rates = WorkRates(encoder_pair=0.001)
    one, many = Estimate((1000,), 0, 0), Estimate((100,) * 10, 0, 0)
    assert rates.work(one) == pytest.approx(3000 + 1000)
    assert rates.work(many) == pytest.approx(3000 + 100)
    assert WorkRates().work(one) == WorkRates().work(many)


def test_estimates_are_near_the_samples_that_are_made(tmp_path: Path) -> None:
    """The encoder's tokenizer is the second decoder's, so that a token is a token."""
    data = TinyMixture.write(tmp_path).data(schedule="same_batch")
    ratios = defaultdict(list)
    for step in range(10):
        for pick in data.order.batch(step):
            (made,) = data._maker.make([pick], (1,))
            real, expected = sample_size(made.samples[0], data.pooling), data._estimate(pick).size(data.pooling)
            ratios[pick.task].append(
                (expected.encoder_tokens / real.encoder_tokens, expected.decoder_rows / real.decoder_rows)
            )
    assert len(ratios) == 4
    for task, found in ratios.items():
        # Of fine-tuning records the index knows one number: two passages, of which one or both are taken.
        bound = 2.5 if task == "few_shot" else 1.25
        assert all(1 / bound <= ratio <= bound for pair in found for ratio in pair), task
