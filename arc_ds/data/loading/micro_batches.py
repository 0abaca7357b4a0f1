"""How a rank's share of a step is split into micro-batches, so that memory stays bounded whatever the lengths.

Limits never change what is trained on: a single sample beyond them has a micro-batch of its own, which exceeds them.

A step's share has as many equal parts as the config's `micro_batches`. Where a part exceeds a limit it is split
further, and every rank splits its share into the same number, since ranks meet in every pass:

1. `planned_splits`, from the index's lengths of the whole global batch: every rank finds the same number.
2. `pack_share`, by the real lengths of the rank's own samples, makes at least that many.
3. Where some rank needed more after all, the ranks agree on the largest number before the step (`training.loop`), and
   the others pack their samples again in that number.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from arc_ds.batch.packing import PoolingSpec, num_outputs, pack
from arc_ds.batch.segments import Sample
from arc_ds.data.loading.step_batch import MicroBatch, Share, StepBatch


class SampleSize(NamedTuple):
    """What a sample takes in a micro-batch. encoder_tokens: with memory tokens; decoder_rows: text and compressed."""

    encoder_tokens: int
    decoder_rows: int

    @property
    def work(self) -> int:
        """About how long it takes; only for balance."""
        return self.encoder_tokens + self.decoder_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatchLimits:
    """The most that one micro-batch may hold; None: no limit."""

    max_encoder_tokens: int | None = None
    max_decoder_rows: int | None = None

    @property
    def any(self) -> bool:
        """Whether there is a limit at all."""
        return self.max_encoder_tokens is not None or self.max_decoder_rows is not None

    def allow(self, encoder_tokens: int, decoder_rows: int) -> bool:
        """Whether a micro-batch may be of this size."""
        return (self.max_encoder_tokens is None or encoder_tokens <= self.max_encoder_tokens) and (
            self.max_decoder_rows is None or decoder_rows <= self.max_decoder_rows
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """The samples of one micro-batch: places within a part of the share, ascending."""

    part_idx: int
    members: tuple[int, ...]


def pack_share(
    share: Share, decoder_idxs: Sequence[int], pooling: PoolingSpec, limits: MicroBatchLimits, at_least: int = 0
) -> tuple[MicroBatch, ...]:
    """A rank's samples as micro-batches, one decoder after the other, split alike for all of them.

    at_least: micro-batches for each decoder, as in `split`.
    """
    if len(share) == 1 and at_least <= 1 and not limits.any:
        splits: tuple[Split, ...] = (Split(part_idx=0, members=tuple(range(len(share[0])))),)
    else:
        splits = split([_position_sizes(part, pooling) for part in share], limits, at_least)
    return tuple(
        MicroBatch(
            decoder_idx=decoder_idx,
            batch=pack([share[one.part_idx][place][which] for place in one.members], pooling),
            part_idx=one.part_idx,
        )
        for which, decoder_idx in enumerate(decoder_idxs)
        for one in splits
    )


def pack_again(batch: StepBatch, num_splits: int, pooling: PoolingSpec, limits: MicroBatchLimits) -> StepBatch:
    """The same samples in more micro-batches: `num_splits` for each decoder.

    ValueError where the batch came without its samples: nothing limits it, so no rank can need more than its plan.
    """
    if batch.share is None:
        raise ValueError(f"{num_splits} micro-batches were asked of a batch that nothing limits to {batch.num_splits}")
    return replace(
        batch, micro_batches=pack_share(batch.share, batch.decoder_idxs, pooling, limits, at_least=num_splits)
    )


def sample_size(sample: Sample, pooling: PoolingSpec) -> SampleSize:
    """The size of a sample, as `pack` will lay it out."""
    return sample_sizes([sample], pooling)[0]


def sample_sizes(samples: Sequence[Sample], pooling: PoolingSpec) -> list[SampleSize]:
    """The sizes of samples, as `pack` will lay them out."""
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
    """Split each part of a rank's share so that every micro-batch is under the limits and all are about equal.

    A sample that exceeds a limit by itself is alone in its micro-batch. As few as that takes, but one for each part and
    `at_least` so many in all. Heaviest first: the ranks run their first ones at the same time, their second ones, and
    so on. ValueError where more micro-batches are asked for than there are samples.
    """
    if at_least > sum(len(part) for part in parts):
        raise ValueError(f"{at_least} micro-batches of {sum(len(part) for part in parts)} samples were asked for")
    room = [[_room(size, limits) for size in part] for part in parts]
    numbers = [_fewest(part, limits) for part in room]
    while sum(numbers) < at_least:
        can_grow = [idx for idx, part in enumerate(parts) if numbers[idx] < len(part)]
        numbers[max(can_grow, key=lambda idx: (_work(parts[idx]) / numbers[idx], -idx))] += 1
    found = [
        (sum(part[place].work for place in members), Split(part_idx=part_idx, members=members))
        for part_idx, (part, number) in enumerate(zip(parts, numbers, strict=True))
        for members in _bins(room[part_idx], limits, number)
    ]
    return tuple(one for _, one in sorted(found, key=lambda pair: (-pair[0], pair[1].part_idx, pair[1].members)))


def planned_splits(shares: Sequence[Sequence[Sequence[SampleSize]]], limits: MicroBatchLimits) -> int:
    """Into how many micro-batches each rank's share is to be split, from estimates of all ranks' shares."""
    if not limits.any:
        return max(len(share) for share in shares)
    return max(sum(_fewest([_room(size, limits) for size in part], limits) for part in share) for share in shares)


def _fewest(sizes: Sequence[SampleSize], limits: MicroBatchLimits) -> int:
    """The smallest number of micro-batches that `_try_bins` finds room in."""
    if not limits.any:
        return 1
    number = 1
    for total, limit in (
        (sum(size.encoder_tokens for size in sizes), limits.max_encoder_tokens),
        (sum(size.decoder_rows for size in sizes), limits.max_decoder_rows),
    ):
        number = number if limit is None else max(number, -(-total // limit))
    while number < len(sizes) and _try_bins(sizes, limits, number) is None:
        number += 1
    return min(number, len(sizes))


def _bins(sizes: Sequence[SampleSize], limits: MicroBatchLimits, number: int) -> list[tuple[int, ...]]:
    """Exactly `number` bins under the limits, at least as many as `_fewest`."""
    found = _try_bins(sizes, limits, number)
    # Greedy dealing can fail in more bins than it managed with: then the fuller bins of that are halved.
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


class _Bin(NamedTuple):
    """A micro-batch being filled; the lightest comes first, of equal ones the one with the lower index."""

    work: int
    idx: int
    encoder_tokens: int = 0
    decoder_rows: int = 0


def _try_bins(sizes: Sequence[SampleSize], limits: MicroBatchLimits, number: int) -> list[list[int]] | None:
    """The heaviest sample first, each into the lightest bin that has room; None where one finds no room."""
    bins: list[list[int]] = [[] for _ in range(number)]
    heap = [_Bin(0, idx) for idx in range(number)]
    for place in sorted(range(len(sizes)), key=lambda place: (-sizes[place].work, place)):
        tokens, rows = sizes[place]
        full = []
        while heap and not limits.allow(heap[0].encoder_tokens + tokens, heap[0].decoder_rows + rows):
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        work, idx, had_tokens, had_rows = heap[0]
        bins[idx].append(place)
        heapq.heapreplace(heap, _Bin(work + tokens + rows, idx, had_tokens + tokens, had_rows + rows))
        for one in full:
            heapq.heappush(heap, one)
    return bins


def _room(size: SampleSize, limits: MicroBatchLimits) -> SampleSize:
    """What a sample takes of a micro-batch: all of it where the sample exceeds a limit."""
    if limits.allow(*size):
        return size
    tokens, rows = size
    return SampleSize(
        tokens if limits.max_encoder_tokens is None else limits.max_encoder_tokens,
        rows if limits.max_decoder_rows is None else limits.max_decoder_rows,
    )


def _position_sizes(part: Sequence[Sequence[Sample]], pooling: PoolingSpec) -> list[SampleSize]:
    """The size of each position: the most that one of its samples takes, of which it has one for each decoder."""
    by_decoder = [sample_sizes(samples, pooling) for samples in zip(*part, strict=True)]
    return [
        SampleSize(max(size.encoder_tokens for size in sizes), max(size.decoder_rows for size in sizes))
        for sizes in zip(*by_decoder, strict=True)
    ]


def _work(sizes: Sequence[SampleSize]) -> int:
    return sum(size.work for size in sizes)
