"""Estimates from the index, compared with the real samples."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from arc_ds.batch.groups import GroupRule
from arc_ds.batch.packing import PoolingSpec
from arc_ds.data.loading.estimates import Estimate, Estimator, RecordMeans, WorkRates, estimated_size, record_means
from arc_ds.data.loading.micro_batches import MicroBatchLimits, SampleSize, pack_share, sample_sizes
from arc_ds.data.loading.source import Source
from arc_ds.data.tasks import TaskLimits
from arc_ds.shards.reader import ShardSet
from tests.helpers.tiny_data import write_tiktoken
from tests.helpers.tiny_mixture import TinyMixture, write_question_shards
from tests.unit.data.examples import data_of

LIMITS = TaskLimits(bos=False, markers=frozenset())
FOURS = PoolingSpec((GroupRule("factor", 4),))


def estimate(task: str, tokens: list[int], means: RecordMeans | None = None, **sizes: Any) -> Estimate:
    return Estimator(replace(LIMITS, **sizes), FOURS, means).estimate(task, tokens)


def test_pretraining_samples_take_their_windows() -> None:
    assert estimate("reconstruction", [500]) == Estimate((256,), 0, 64 + 256)
    assert estimate("reconstruction", [100]) == Estimate((100,), 0, 25 + 100)
    assert estimate("continuation", [9000]) == Estimate((256,), 256, 64 + 256)
    assert estimate("continuation", [300]) == Estimate((100,), 100, 25 + 100)


def test_markers_and_the_beginning_of_text_are_rows() -> None:
    assert Estimator(TaskLimits(), FOURS).estimate("reconstruction", [100]) == Estimate((100,), 1, 26 + 100)


def test_in_context_examples_that_find_no_room_are_left_out_from_the_first_on() -> None:
    for examples, lengths in (
        ([], (100,)),
        ([224], (200, 100)),
        ([324], (300, 100)),
        ([224, 124], (200, 100, 100)),
        ([124, 224], (100, 200, 100)),
        ([124, 524, 124], (100, 100)),
    ):
        assert estimate("few_shot", [124, *examples], max_documents=400).context_lengths == lengths
    assert estimate("few_shot", [1000], max_documents=400).context_lengths == (400,)


def test_long_contexts_are_chunks() -> None:
    sizes = {"chunk_tokens": 100, "max_chunks": 3}
    assert estimate("long_context", [450], **sizes).context_lengths == (100, 100, 25)
    assert estimate("long_context", [9999], **sizes).context_lengths == (100, 100, 100)
    assert estimate("long_context", [174], RecordMeans(), **sizes).context_lengths == (100, 50)
    means = RecordMeans(other_tokens=44, question_rows=30, drawn_share=0.5)
    assert estimate("long_context", [174], means, **sizes) == Estimate((100, 30), 0, 25 + 8 + 30)


def test_memory_tokens_are_encoder_tokens_of_each_context() -> None:
    found = Estimate((100, 30), 1, 50)
    assert estimated_size(found, FOURS) == SampleSize(130, 51)
    assert estimated_size(found, PoolingSpec((), memory_tokens=7)) == SampleSize(144, 51)


def test_attention_makes_one_long_context_dearer_than_many_short_ones() -> None:
    rates = WorkRates(encoder_pair=0.001)
    one, many = Estimate((1000,), 0, 0), Estimate((100,) * 10, 0, 0)
    assert rates.work(one) == pytest.approx(3000 + 1000)
    assert rates.work(many) == pytest.approx(3000 + 100)
    assert WorkRates().work(one) == WorkRates().work(many)


def test_estimates_are_near_the_samples_that_are_made(mixture: TinyMixture) -> None:
    """The encoder and the second decoder share a tokenizer, so their token counts are equal."""
    data = mixture.data(schedule="same_batch")
    ratios = defaultdict(list)
    for step in range(10):
        for pick in data.order.batch(step):
            (made,) = data._maker.make([pick], (1,))
            (real,) = sample_sizes(made.samples, data.pooling)
            expected = estimated_size(data._estimate(pick), data.pooling)
            ratios[pick.task] += [one / other for one, other in zip(expected, real, strict=True)]
    assert len(ratios) == 4
    for task, found in ratios.items():
        # The index has one number per fine-tuning record. The record has two passages, and a sample uses one or both.
        bound = 2.5 if task == "few_shot" else 1.25
        assert all(1 / bound <= ratio <= bound for ratio in found), task


def manifest(passage_tokens: dict[int, int]) -> Any:
    """Of two records with 1280 tokens."""
    return SimpleNamespace(passage_tokens=passage_tokens, tokens=1280, samples=2)


def test_few_shot_samples_read_the_share_of_the_passages_that_is_drawn() -> None:
    """One record has a passage of 500 tokens, the other ten passages of 70. Each has 40 tokens outside of them."""
    made = manifest({1: 500, 10: 700})
    for most, drawn in ((1, 1), (2, 1.5), (4, 2.5), (10, 5.5), (99, 5.5)):
        means = record_means(made, replace(LIMITS, max_passages=most))
        assert means.drawn_share == pytest.approx((500 + 70 * drawn) / 1200)
        assert (means.other_tokens, means.question_rows) == (40, 40)
    assert record_means(made, replace(LIMITS, max_question=20, max_answer=5)).question_rows == 25
    means = RecordMeans(other_tokens=40, question_rows=25, drawn_share=0.25)
    assert estimate("few_shot", [640, 440, 140], means) == Estimate((100, 25, 150), 0, 25 + 7 + 38 + 3 * (25 + 8))


def test_shards_that_do_not_tell_of_their_passages_are_estimated_as_before_they_were_counted() -> None:
    means = record_means(manifest({}), replace(LIMITS, max_passages=1))
    assert means == RecordMeans() == RecordMeans(other_tokens=24, question_rows=24, drawn_share=1)


@pytest.fixture(scope="module")
def ten_passages(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Records with ten passages; every third record has a single one."""
    folder = tmp_path_factory.mktemp("ten")
    records = [
        {
            "passages": [f"Block {idx} is of grey stone. " * (1 + (idx + place) % 4) for place in range(number)],
            "question": f"Of what is block {idx}?",
            "answer": "stone",
        }
        for idx, number in enumerate([10, 10, 1] * 30)
    ]
    return write_question_shards(folder / "shards", write_tiktoken(folder / "tokenizer.model"), records)


@pytest.mark.parametrize("max_passages", [1, 4])
@pytest.mark.parametrize("in_context_examples", [0, 5])
def test_no_more_micro_batches_are_planned_than_the_drawn_passages_need(
    ten_passages: ShardSet, max_passages: int, in_context_examples: int
) -> None:
    """The plan is binding. Counting all passages gave up to three times as many micro-batches."""
    source = Source(
        shards=ten_passages,
        task="few_shot",
        in_context_examples=in_context_examples,
        limits=TaskLimits(max_passages=max_passages, max_documents=4096),
    )
    tokenizer = ten_passages.folder.parent / "tokenizer.model"
    data = partial(data_of, source, tokenizer, tokenizer, seed=1, batch_size=32, pooling=FOURS)
    whole = [data()[step].micro_batches[0].batch.num_encoder_tokens for step in range(8)]
    limits = MicroBatchLimits(max_encoder_tokens=sum(whole) // len(whole) * 2 // 5)
    limited = data(limits=limits)
    estimates = [limited._estimate(pick) for step in range(8) for pick in limited.order.batch(step)]
    assert sum(sum(one.context_lengths) for one in estimates) == pytest.approx(sum(whole), rel=0.1)
    made = [limited[step] for step in range(8)]
    needed = [len(pack_share(batch.share or (), (0,), FOURS, limits)) for batch in made]
    assert min(needed) == 3
    assert sum(batch.num_splits for batch in made) <= sum(needed) + 1
