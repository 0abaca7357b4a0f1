"""Splitting a rank's share: every micro-batch under the limits, nothing lost, and never fewer than asked for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arc_ds.data.groups import GroupRule
from arc_ds.data.micro_batches import (
    MicroBatchLimits,
    SampleSize,
    Split,
    check_size,
    planned_splits,
    sample_size,
    split,
)
from arc_ds.data.packing import PoolingSpec, pack
from arc_ds.data.segments import Sample, Segment
from arc_ds.errors import DataError

MAX_TOKENS, MAX_ROWS = 40, 60
LIMITS = st.builds(
    MicroBatchLimits,
    max_encoder_tokens=st.none() | st.integers(MAX_TOKENS, 4 * MAX_TOKENS),
    max_decoder_rows=st.none() | st.integers(MAX_ROWS, 4 * MAX_ROWS),
)
SIZES = st.builds(SampleSize, st.integers(0, MAX_TOKENS), st.integers(1, MAX_ROWS))
PARTS = st.lists(st.lists(SIZES, min_size=1, max_size=9), min_size=1, max_size=3)


def _total(parts: list[list[SampleSize]], one: Split) -> SampleSize:
    members = [parts[one.part_idx][place] for place in one.members]
    return SampleSize(sum(size.encoder_tokens for size in members), sum(size.decoder_rows for size in members))


@given(PARTS, LIMITS, st.integers(0, 30))
def test_every_sample_is_in_one_micro_batch_and_none_exceeds_a_limit(
    parts: list[list[SampleSize]], limits: MicroBatchLimits, at_least: int
) -> None:
    num_samples = sum(len(part) for part in parts)
    at_least = min(at_least, num_samples)
    found = split(parts, limits, at_least)
    assert len(found) >= max(at_least, len(parts))
    members = [(one.part_idx, place) for one in found for place in one.members]
    assert sorted(members) == [(idx, place) for idx, part in enumerate(parts) for place in range(len(part))]
    for one in found:
        assert one.members == tuple(sorted(one.members)) != ()
        assert limits.allow(*_total(parts, one))


@given(PARTS, LIMITS)
def test_what_one_rank_needed_the_same_rank_can_be_asked_for(
    parts: list[list[SampleSize]], limits: MicroBatchLimits
) -> None:
    """A batch that is made again with a number gets that number exactly, whatever it took before."""
    needed = len(split(parts, limits))
    for number in range(needed, sum(len(part) for part in parts) + 1):
        assert len(split(parts, limits, number)) == number


@given(st.lists(PARTS, min_size=1, max_size=3), LIMITS)
def test_a_plan_from_true_lengths_is_enough_for_every_rank(
    shares: list[list[list[SampleSize]]], limits: MicroBatchLimits
) -> None:
    assert planned_splits(shares, limits) == max(len(split(parts, limits)) for parts in shares)


def test_the_plan_takes_an_estimate_above_a_limit_for_the_limit() -> None:
    limits = MicroBatchLimits(max_encoder_tokens=10)
    assert planned_splits([[[SampleSize(25, 1), SampleSize(4, 1)]]], limits) == 2


def test_without_limits_a_share_is_its_parts() -> None:
    parts = [[SampleSize(1, 9), SampleSize(2, 2)], [SampleSize(50, 1), SampleSize(1, 3)]]
    assert split(parts, MicroBatchLimits()) == (Split(part_idx=1, members=(0, 1)), Split(part_idx=0, members=(0, 1)))
    assert planned_splits([parts, parts], MicroBatchLimits()) == 2


def test_as_few_micro_batches_as_the_limits_allow_and_about_equal() -> None:
    sizes = [SampleSize(0, rows) for rows in (10, 10, 20, 30, 5, 25)]
    found = split([sizes], MicroBatchLimits(max_decoder_rows=50))
    assert [_total([sizes], one).decoder_rows for one in found] == [50, 50]
    four = split([sizes], MicroBatchLimits(max_decoder_rows=50), 4)
    assert [_total([sizes], one).decoder_rows for one in four] == [30, 25, 25, 20]


def test_heavier_micro_batches_come_first_so_that_ranks_run_them_together() -> None:
    parts = [[SampleSize(1, 1)], [SampleSize(9, 9)], [SampleSize(5, 5)]]
    assert [one.part_idx for one in split(parts, MicroBatchLimits())] == [1, 2, 0]


def test_more_micro_batches_than_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="3 micro-batches of 2 samples"):
        split([[SampleSize(1, 1)] * 2], MicroBatchLimits(), 3)


def test_a_sample_that_alone_exceeds_a_limit_is_named() -> None:
    check_size(SampleSize(10, 20), MicroBatchLimits(max_encoder_tokens=10, max_decoder_rows=20))
    with pytest.raises(DataError, match=r"11 encoder tokens .* 10 \(data.max_encoder_tokens\) and any number"):
        check_size(SampleSize(11, 20), MicroBatchLimits(max_encoder_tokens=10))
    with pytest.raises(DataError, match=r"21 decoder rows.*20 \(data.max_decoder_rows\)"):
        check_size(SampleSize(1, 21), MicroBatchLimits(max_decoder_rows=20))


IDS = st.lists(st.integers(0, 99), max_size=30)
SEGMENTS = st.one_of(
    st.builds(Segment.text, IDS),
    st.builds(Segment.context, IDS.filter(len), st.sampled_from(["cont", None])),
)


@given(
    st.lists(SEGMENTS, max_size=5),
    st.sampled_from(
        [PoolingSpec((GroupRule("factor", 3), GroupRule("factor", 2))), PoolingSpec((GroupRule("count", 4),)),
         PoolingSpec(()), PoolingSpec((), 3)]
    ),
)  # fmt: skip
def test_the_size_is_what_packing_makes_of_the_sample(segments: list[Segment], pooling: PoolingSpec) -> None:
    sample = Sample("t", tuple(segments))
    batch = pack([sample], pooling)
    assert sample_size(sample, pooling) == (batch.encoder_positions.numel(), batch.num_decoder_rows)
