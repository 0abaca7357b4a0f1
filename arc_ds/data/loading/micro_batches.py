"""Split a rank's share of a step into micro-batches, to bound the memory at any lengths.

Limits never change a sample. A single sample beyond them gets a micro-batch of its own, which exceeds them.

A step's share has as many equal parts as the config's `micro_batches`. A part that exceeds a limit is split further.
Every rank splits its share into the same number of micro-batches, because ranks meet in every pass:

1. `planned_splits` computes the number from the index's lengths of the whole global batch, equally on every rank.
2. `pack_share` makes at least that many, by the real lengths of the rank's own samples.
3. If a rank needs more, the ranks agree on the largest number before the step (`training.loop`), and the other ranks
   pack their samples again.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from arc_ds.batch.packing import PoolingSpec, num_outputs, pack
from arc_ds.batch.segments import Sample
from arc_ds.data.loading.step_batch import MicroBatch, Share, StepBatch


class SampleSize(NamedTuple):
    """The size of a sample in a micro-batch.

    encoder_tokens: including memory tokens.
    decoder_rows: text and compressed rows.
    """

    encoder_tokens: int
    decoder_rows: int

    @property
    def work(self) -> int:
        """A rough measure of its time; only for balance."""
        return self.encoder_tokens + self.decoder_rows


class MicroBatchLimits(NamedTuple):
    """The maximum size of one micro-batch, with the fields of `SampleSize`. None: no limit."""

    max_encoder_tokens: int | None = None
    max_decoder_rows: int | None = None

    @property
    def any(self) -> bool:
        """Whether any limit is set."""
        return self != (None, None)

    def allow(self, encoder_tokens: int, decoder_rows: int) -> bool:
        """Whether a micro-batch may have this size."""
        return (self.max_encoder_tokens is None or encoder_tokens <= self.max_encoder_tokens) and (
            self.max_decoder_rows is None or decoder_rows <= self.max_decoder_rows
        )


class Split(NamedTuple):
    """The samples of one micro-batch.

    part_idx: the part of the share.
    members: places within that part, ascending.
    """

    part_idx: int
    members: tuple[int, ...]


def pack_share(
    share: Share, decoder_idxs: Sequence[int], pooling: PoolingSpec, limits: MicroBatchLimits, at_least: int = 0
) -> tuple[MicroBatch, ...]:
    """A rank's samples as micro-batches, one decoder after the other. All decoders have the same split.

    share: the rank's samples.
    decoder_idxs: the decoders of the step.
    at_least: minimum number of micro-batches per decoder, as in `split`.
    """
    if len(share) == 1 and at_least <= 1 and not limits.any:
        splits: tuple[Split, ...] = (Split(0, tuple(range(len(share[0])))),)
    else:
        splits = split([_position_sizes(part, pooling) for part in share], limits, at_least)
    return tuple(
        MicroBatch(
            decoder_idx=decoder_idx,
            batch=pack([share[part_idx][place][which] for place in members], pooling),
            part_idx=part_idx,
        )
        for which, decoder_idx in enumerate(decoder_idxs)
        for part_idx, members in splits
    )


def pack_again(batch: StepBatch, num_splits: int, pooling: PoolingSpec, limits: MicroBatchLimits) -> StepBatch:
    """The same samples in more micro-batches: `num_splits` per decoder.

    Raises ValueError if the batch has no `share`. It then has no limits, and no rank can need more than planned.
    """
    if batch.share is None:
        raise ValueError(f"{num_splits} micro-batches were requested of a batch of {batch.num_splits} without limits")
    return replace(
        batch, micro_batches=pack_share(batch.share, batch.decoder_idxs, pooling, limits, at_least=num_splits)
    )


def sample_sizes(samples: Sequence[Sample], pooling: PoolingSpec) -> list[SampleSize]:
    """The sizes of samples in the layout of `pack`."""
    segments = [sample.segments for sample in samples]
    lengths = [[len(s.ids.array) for s in of_sample if s.kind == "context"] for of_sample in segments]
    flat = [length for of_sample in lengths for length in of_sample]
    outputs = iter(num_outputs(np.array(flat, dtype=np.int64), pooling).tolist())
    return [
        SampleSize(
            encoder_tokens=sum(of_sample) + pooling.memory_tokens * len(of_sample),
            decoder_rows=sum([next(outputs) + (s.marker is not None) for s in own if s.kind == "context"])
            + sum([len(s.ids.array) for s in own if s.kind == "text"]),
        )
        for own, of_sample in zip(segments, lengths, strict=True)
    ]


def split(parts: Sequence[Sequence[SampleSize]], limits: MicroBatchLimits, at_least: int = 0) -> tuple[Split, ...]:
    """Split each part of a rank's share into micro-batches under the limits, of about equal work.

    A sample that exceeds a limit by itself is alone in its micro-batch. The number of micro-batches is the smallest
    possible, but at least one per part and `at_least` in total. They are sorted by work, the heaviest first, because
    all ranks run their first ones at the same time, then their second ones, and so on. Raises ValueError if more
    micro-batches than samples are requested.
    """
    if at_least > sum(len(part) for part in parts):
        raise ValueError(f"{at_least} micro-batches of {sum(len(part) for part in parts)} samples were requested")
    room = [[_room(size, limits) for size in part] for part in parts]
    numbers = [_fewest(part, limits) for part in room]
    work = [sum(size.work for size in part) for part in parts]
    while sum(numbers) < at_least:
        can_grow = [idx for idx, part in enumerate(parts) if numbers[idx] < len(part)]
        numbers[max(can_grow, key=lambda idx: (work[idx] / numbers[idx], -idx))] += 1
    found = [
        (-sum(part[place].work for place in members), Split(part_idx, members))
        for part_idx, (part, number) in enumerate(zip(parts, numbers, strict=True))
        for members in _bins(room[part_idx], limits, number)
    ]
    return tuple(one for _, one in sorted(found))


def planned_splits(shares: Sequence[Sequence[Sequence[SampleSize]]], limits: MicroBatchLimits) -> int:
    """The number of micro-batches of each rank's share, from estimates of all ranks' shares."""
    return max(sum(_fewest([_room(size, limits) for size in part], limits) for part in share) for share in shares)


def _fewest(sizes: Sequence[SampleSize], limits: MicroBatchLimits) -> int:
    """The smallest number of micro-batches with which `_try_bins` succeeds."""
    totals = map(sum, zip(*sizes, strict=True))
    number = max([1, *(-(-total // limit) for total, limit in zip(totals, limits, strict=True) if limit is not None)])
    while number < len(sizes) and _try_bins(sizes, limits, number) is None:
        number += 1
    return min(number, len(sizes))


def _bins(sizes: Sequence[SampleSize], limits: MicroBatchLimits, number: int) -> list[tuple[int, ...]]:
    """Exactly `number` bins under the limits. `number` is at least `_fewest`."""
    found = _try_bins(sizes, limits, number)
    # Greedy dealing may fail with `number` bins although it succeeded with fewer. Then halve the fullest of the fewer.
    fewer = number
    while found is None and fewer > 1:
        fewer -= 1
        found = _try_bins(sizes, limits, fewer)
    assert found is not None, "`_room` lets every sample fit a micro-batch"
    while len(found) < number:
        fullest = max(found, key=lambda members: (len(members) > 1, sum(sizes[place].work for place in members)))
        found.remove(fullest)
        found += [fullest[::2], fullest[1::2]]
    return [tuple(sorted(members)) for members in found]


def _try_bins(sizes: Sequence[SampleSize], limits: MicroBatchLimits, number: int) -> list[list[int]] | None:
    """Put each sample, the heaviest first, into the lightest bin with room. None if a sample finds no room."""
    bins: list[list[int]] = [[] for _ in range(number)]
    heap = [(0, idx, 0, 0) for idx in range(number)]  # work, index, encoder tokens, decoder rows
    for place in sorted(range(len(sizes)), key=lambda place: (-sizes[place].work, place)):
        tokens, rows = sizes[place]
        full = []
        while heap and not limits.allow(heap[0][2] + tokens, heap[0][3] + rows):
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        work, idx, had_tokens, had_rows = heap[0]
        bins[idx].append(place)
        heapq.heapreplace(heap, (work + tokens + rows, idx, had_tokens + tokens, had_rows + rows))
        for one in full:
            heapq.heappush(heap, one)
    return bins


def _room(size: SampleSize, limits: MicroBatchLimits) -> SampleSize:
    """The room that a sample needs in a micro-batch: all of it if the sample exceeds a limit."""
    if limits.allow(*size):
        return size
    return SampleSize(*(own if limit is None else limit for own, limit in zip(size, limits, strict=True)))


def _position_sizes(part: Sequence[Sequence[Sample]], pooling: PoolingSpec) -> list[SampleSize]:
    """The size of each position of a part. A position has one sample per decoder, and the largest counts."""
    by_decoder = [sample_sizes(samples, pooling) for samples in zip(*part, strict=True)]
    return [SampleSize(*map(max, zip(*sizes, strict=True))) for sizes in zip(*by_decoder, strict=True)]
