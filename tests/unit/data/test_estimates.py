"""Estimates from the index, compared with the real samples."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest

from arc_ds.batch.groups import GroupRule
from arc_ds.batch.packing import PoolingSpec
from arc_ds.data.loading.decoder_reader import ReaderFiles
from arc_ds.data.loading.estimates import AskedMeans, Estimate, Estimator, WorkRates, asked_means, estimated_size
from arc_ds.data.loading.loader import StepData
from arc_ds.data.loading.micro_batches import MicroBatchLimits, SampleSize, pack_share, sample_size
from arc_ds.data.loading.source import Source
from arc_ds.data.order.order import RunOrder
from arc_ds.data.tasks import TaskLimits
from arc_ds.shards.format import Manifest, ShardInfo
from arc_ds.shards.reader import ShardSet
from tests.helpers.tiny_data import write_tiktoken
from tests.helpers.tiny_mixture import TinyMixture, write_question_shards

LIMITS = TaskLimits(bos=False, markers=frozenset())
FOURS = PoolingSpec((GroupRule("factor", 4),))


def estimate(task: str, tokens: list[int], *, limits: TaskLimits = LIMITS, asked: AskedMeans | None = None) -> Estimate:
    return Estimator(limits, FOURS, asked).estimate(task, tokens)  # type: ignore[arg-type]


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
    assert estimate("long_context", [174], limits=limits, asked=AskedMeans()).context_lengths == (100, 50)
    told = AskedMeans(other_tokens=44, asked_rows=30, drawn_share=0.5)
    assert estimate("long_context", [174], limits=limits, asked=told) == Estimate((100, 30), 0, 25 + 8 + 30)


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


def test_estimates_are_near_the_samples_that_are_made(tmp_path: Path) -> None:
    """The encoder and the second decoder share a tokenizer, so their token counts are equal."""
    data = TinyMixture.write(tmp_path).data(schedule="same_batch")
    ratios = defaultdict(list)
    for step in range(10):
        for pick in data.order.batch(step):
            (made,) = data._maker.make([pick], (1,))
            real = sample_size(made.samples[0], data.pooling)
            expected = estimated_size(data._estimate(pick), data.pooling)
            ratios[pick.task].append(
                (expected.encoder_tokens / real.encoder_tokens, expected.decoder_rows / real.decoder_rows)
            )
    assert len(ratios) == 4
    for task, found in ratios.items():
        # The index has one number per fine-tuning record. The record has two passages, and a sample uses one or both.
        bound = 2.5 if task == "few_shot" else 1.25
        assert all(1 / bound <= ratio <= bound for pair in found for ratio in pair), task


def manifest(passage_tokens: dict[str, int], tokens: int, samples: int) -> Manifest:
    shard = ShardInfo(
        name="a.tar",
        samples=samples,
        tokens=tokens,
        bytes=1,
        sha256="0" * 64,
        index_sha256="0" * 64,
        passage_tokens=passage_tokens,
    )
    return Manifest(
        samples=samples,
        tokens=tokens,
        max_tokens=1,
        min_tokens=1,
        tokenizer_fingerprint="",
        shards=(shard,),
        sources=(),
        kind="fine_tuning",
    )


def test_few_shot_samples_read_the_share_of_the_passages_that_is_drawn() -> None:
    """One record has a passage of 500 tokens, the other ten passages of 70. Each has 40 tokens outside of them."""
    made = manifest({"1": 500, "10": 700}, tokens=1280, samples=2)
    for most, drawn in ((1, 1), (2, 1.5), (4, 2.5), (10, 5.5), (99, 5.5)):
        means = asked_means(made, replace(LIMITS, max_passages=most))
        assert means.drawn_share == pytest.approx((500 + 70 * drawn) / 1200)
        assert (means.other_tokens, means.asked_rows) == (40, 40)
    assert asked_means(made, replace(LIMITS, max_question=20, max_answer=5)).asked_rows == 25
    found = estimate("few_shot", [640, 440, 140], asked=AskedMeans(other_tokens=40, asked_rows=25, drawn_share=0.25))
    assert found == Estimate((100, 25, 150), 0, 25 + 7 + 38 + 3 * (25 + 8))


def test_shards_that_do_not_tell_of_their_passages_are_estimated_as_before_they_were_counted() -> None:
    means = asked_means(manifest({}, tokens=1280, samples=2), replace(LIMITS, max_passages=1))
    assert means == AskedMeans() == AskedMeans(other_tokens=24, asked_rows=24, drawn_share=1)


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
    order = RunOrder(seed=1, batch_size=32, sources=(source.shape,))
    tokenizer = ten_passages.folder.parent / "tokenizer.model"

    def data(limits: MicroBatchLimits) -> StepData:
        return StepData(
            order=order,
            sources=[source],
            encoder_tokenizer=tokenizer,
            readers=[ReaderFiles(tokenizer=tokenizer)],
            pooling=FOURS,
            limits=limits,
        )

    whole = [data(MicroBatchLimits())[step].micro_batches[0].batch.num_encoder_tokens for step in range(8)]
    limits = MicroBatchLimits(max_encoder_tokens=sum(whole) // len(whole) * 2 // 5)
    limited = data(limits)
    estimates = [limited._estimate(pick) for step in range(8) for pick in order.batch(step)]
    assert sum(sum(one.context_lengths) for one in estimates) == pytest.approx(sum(whole), rel=0.1)
    made = [limited[step] for step in range(8)]
    needed = [len(pack_share(batch.share or (), (0,), FOURS, limits)) for batch in made]
    assert min(needed) == 3
    assert sum(batch.num_splits for batch in made) <= sum(needed) + 1
