"""Splitting a rank's share: every micro-batch is under the limits, no sample is lost, and there are never too few."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from arc_ds.batch.groups import GroupRule
from arc_ds.batch.packing import PoolingSpec, pack
from arc_ds.batch.segments import Sample, Segment
from arc_ds.data.loading.micro_batches import (
    MicroBatchLimits,
    SampleSize,
    Split,
    pack_again,
    pack_share,
    planned_splits,
    sample_sizes,
    split,
)
from arc_ds.data.loading.step_batch import StepBatch

MAX_TOKENS, MAX_ROWS = 40, 60
LIMITS = st.builds(
    MicroBatchLimits,
    max_encoder_tokens=st.none() | st.integers(MAX_TOKENS, 4 * MAX_TOKENS),
    max_decoder_rows=st.none() | st.integers(MAX_ROWS, 4 * MAX_ROWS),
)
# Up to six times the smallest limits.
SIZES = st.builds(SampleSize, st.integers(1, 6 * MAX_TOKENS), st.integers(1, 6 * MAX_ROWS))
PARTS = st.lists(st.lists(SIZES, min_size=1, max_size=9), min_size=1, max_size=3)


def _total(parts: list[list[SampleSize]], one: Split) -> SampleSize:
    members = [parts[one.part_idx][place] for place in one.members]
    return SampleSize(sum(size.encoder_tokens for size in members), sum(size.decoder_rows for size in members))


# Found by search: the greedy method succeeds with four bins and fails with five.
FAILS_IN_FIVE = [(5, 2), (20, 5), (12, 5), (1, 2), (12, 1), (9, 1), (20, 12), (1, 15), (9, 5), (20, 12), (1, 15)]


@given(PARTS, LIMITS, st.integers(0, 30))
@example([[SampleSize(*pair) for pair in FAILS_IN_FIVE]], MicroBatchLimits(30, 30), 5)
def test_every_sample_is_in_one_micro_batch_and_those_of_several_samples_obey_the_limits(
    parts: list[list[SampleSize]], limits: MicroBatchLimits, at_least: int
) -> None:
    """There are as many as requested, or as many as the limits need."""
    at_least = min(at_least, sum(map(len, parts)))
    found = split(parts, limits, at_least)
    assert len(found) == max(at_least, len(split(parts, limits)))
    members = [(one.part_idx, place) for one in found for place in one.members]
    assert sorted(members) == [(idx, place) for idx, part in enumerate(parts) for place in range(len(part))]
    for one in found:
        assert one.members == tuple(sorted(one.members)) != ()
        assert limits.allow(*_total(parts, one)) or len(one.members) == 1


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
    assert split(parts, MicroBatchLimits()) == (Split(1, (0, 1)), Split(0, (0, 1)))
    assert planned_splits([parts, parts], MicroBatchLimits()) == 2


def test_as_few_micro_batches_as_the_limits_allow_and_about_equal() -> None:
    sizes = [SampleSize(0, rows) for rows in (10, 10, 20, 30, 5, 25)]
    found = split([sizes], MicroBatchLimits(max_decoder_rows=50))
    assert [_total([sizes], one).decoder_rows for one in found] == [50, 50]
    four = split([sizes], MicroBatchLimits(max_decoder_rows=50), 4)
    assert [_total([sizes], one).decoder_rows for one in four] == [30, 25, 25, 20]
    for limits in (MicroBatchLimits(50, None), MicroBatchLimits(None, 50)):
        assert len(split([[SampleSize(size, size) for size in (34, 34, 17, 15)]], limits)) == 3


def test_more_micro_batches_than_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="3 micro-batches of 2 samples"):
        split([[SampleSize(1, 1)] * 2], MicroBatchLimits(), 3)


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
    assert sample_sizes([sample], pooling) == [(batch.encoder_positions.numel(), batch.num_decoder_rows)]


def _position(place: int) -> tuple[Sample, Sample]:
    """One sample for each of two decoders. The second decoder has more tokens for the text."""
    context = Segment.context([place] * (2 + place), "rec")
    texts = [Segment.text([100 * (which + 1) + place] * (3 + 4 * which), in_loss=True) for which in range(2)]
    return tuple(Sample("t", (context, text)) for text in texts)  # type: ignore[return-value]


def _batch(limits: MicroBatchLimits) -> StepBatch:
    share = (tuple(map(_position, range(3))), tuple(map(_position, range(3, 6))))
    return StepBatch(step=7, decoder_idxs=(0, 1), micro_batches=pack_share(share, (0, 1), POOLING, limits), share=share)


def _places(batch: StepBatch) -> list[tuple[int, int, list[int]]]:
    """The decoder, the part and the samples of each micro-batch."""
    return [
        (micro.decoder_idx, micro.part_idx, sorted(set(micro.batch.encoder_ids.tolist())))
        for micro in batch.micro_batches
    ]


POOLING = PoolingSpec((GroupRule("factor", 4),))


def test_a_share_is_split_alike_for_all_decoders_and_none_exceeds_a_limit() -> None:
    whole = _batch(MicroBatchLimits())
    assert _places(whole) == [(0, 1, [3, 4, 5]), (0, 0, [0, 1, 2]), (1, 1, [3, 4, 5]), (1, 0, [0, 1, 2])]
    limits = MicroBatchLimits(max_decoder_rows=20)
    batch = _batch(limits)
    assert batch.num_splits == 4 and [places[1:] for places in _places(batch)[:4]] == [
        places[1:] for places in _places(batch)[4:]
    ]
    assert max(micro.batch.num_decoder_rows for micro in batch.micro_batches) <= 20
    for micro in batch.micro_batches:
        assert {label // 100 - 1 for label in micro.batch.labels.tolist()} == {micro.decoder_idx}


def test_a_batch_packed_again_has_the_same_samples_in_more_micro_batches() -> None:
    limits = MicroBatchLimits(max_encoder_tokens=100)
    batch = pickle.loads(pickle.dumps(_batch(limits)))
    again = pack_again(batch, 5, POOLING, limits)
    assert (batch.num_splits, again.num_splits, again.step, again.num_labels) == (2, 5, 7, batch.num_labels)
    for part_idx, samples in ((0, [0, 1, 2]), (1, [3, 4, 5])):
        for decoder_idx in (0, 1):
            of_part = [places for *of, places in _places(again) if of == [decoder_idx, part_idx]]
            assert sorted(place for places in of_part for place in places) == samples


def test_a_batch_that_nothing_limits_cannot_be_packed_again() -> None:
    batch = replace(_batch(MicroBatchLimits()), share=None)
    with pytest.raises(ValueError, match="5 micro-batches were requested of a batch of 2 without limits"):
        pack_again(batch, 5, POOLING, MicroBatchLimits())
