"""The order of the run's samples as a pure function of (seed, position): nothing is consumed, nothing need be saved.

Position j of the run belongs to step j // batch_size. Its source, record, task and private randomness follow from
(seed, j) alone, and the step's decoder from (seed, step). The resume state is one integer and `RunOrder.fingerprint`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from arc_ds.data.mixture import Mixture
from arc_ds.data.randomness import permutation, random_words
from arc_ds.errors import ConfigError

Task = Literal["reconstruction", "continuation"]
DecoderSchedule = Literal["sample", "alternate"]
_GOLDEN = 0.6180339887498949  # its multiples fill [0, 1) evenly however many are taken


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceShape:
    """What the order must know of one source: the records in each of its shards, its weight, its fingerprint."""

    shard_sizes: tuple[int, ...]
    fingerprint: str
    weight: float = 1.0

    @property
    def num_records(self) -> int:
        return sum(self.shard_sizes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pick:
    """What stands at one position of the run. `seed` is a 64-bit number for this position's own random choices."""

    position: int
    source_idx: int
    epoch: int
    record_idx: int
    task: Task
    seed: int


@dataclass(frozen=True, kw_only=True)
class RunOrder:
    """The samples of every step of a run.

    batch_size: sequences of a global batch. reconstruction_share: (from_step, share) pairs in rising steps; the share
    of the last pair begun holds. window_shards: shards whose records are shuffled together. ConfigError on a value
    out of range.
    """

    seed: int
    batch_size: int
    sources: tuple[SourceShape, ...]
    reconstruction_share: tuple[tuple[int, float], ...] = ((0, 0.2),)
    num_decoders: int = 1
    decoder_schedule: DecoderSchedule = "sample"
    window_shards: int = 16
    _mixture: Mixture = field(init=False, repr=False, compare=False)
    _shuffles: tuple[WindowShuffle, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._check()
        shuffles = tuple(
            WindowShuffle(source.shard_sizes, self.window_shards, (self.seed, idx))
            for idx, source in enumerate(self.sources)
        )
        object.__setattr__(self, "_mixture", Mixture([source.weight for source in self.sources]))
        object.__setattr__(self, "_shuffles", shuffles)

    def _check(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"data.batch_size is {self.batch_size}; expected at least 1. Set it to the global batch.")
        if not self.sources or any(source.num_records < 1 for source in self.sources):
            raise ConfigError("data.sources: expected at least one source, each with at least one record.")
        steps = [step for step, _ in self.reconstruction_share]
        shares = [share for _, share in self.reconstruction_share]
        if not steps or steps[0] != 0 or steps != sorted(set(steps)) or not all(0 <= share <= 1 for share in shares):
            raise ConfigError(
                f"data.reconstruction_share is {self.reconstruction_share}; expected (step, share) pairs, steps rising "
                "from 0 and shares from 0 to 1. Write one share, or a list such as [[0, 1.0], [500, 0.5]]."
            )
        if self.num_decoders < 1 or self.window_shards < 1:
            raise ConfigError("a run needs at least one decoder, and a shuffle window of at least one shard.")

    @property
    def fingerprint(self) -> str:
        """sha256 of everything that the order follows from; a resumed run must have the same."""
        spec = [self.seed, self.batch_size, self.reconstruction_share, self.num_decoders, self.decoder_schedule]
        sources = [[s.fingerprint, s.shard_sizes, s.weight] for s in self.sources]
        return hashlib.sha256(json.dumps([1, spec, self.window_shards, sources]).encode()).hexdigest()

    def share(self, step: int) -> float:
        """The share of reconstruction among the samples of a step."""
        return [share for from_step, share in self.reconstruction_share if from_step <= step][-1]

    def decoder(self, step: int) -> int:
        """Index of the decoder that all ranks use in a step (a run of steps as long as decoders uses each once)."""
        if self.decoder_schedule == "alternate":
            return step % self.num_decoders
        turn, place = divmod(step, self.num_decoders)
        return int(permutation(self.num_decoders, self.seed, "decoder", turn)[place])

    def batch(self, step: int) -> tuple[Pick, ...]:
        """The global batch of a step: positions step * batch_size up to (step + 1) * batch_size."""
        first = step * self.batch_size
        tasks = self._tasks(step)
        seeds = random_words(self.batch_size, self.seed, "sample", step)
        return tuple(self._pick(first + place, tasks[place], int(seeds[place])) for place in range(self.batch_size))

    def _pick(self, position: int, task: Task, seed: int) -> Pick:
        source_idx, rank = self._mixture.at(self.seed, position)
        epoch, place = divmod(rank, self.sources[source_idx].num_records)
        record_idx = self._shuffles[source_idx].record(epoch, place)
        return Pick(position=position, source_idx=source_idx, epoch=epoch, record_idx=record_idx, task=task, seed=seed)

    def _tasks(self, step: int) -> list[Task]:
        """The step's tasks: its share of reconstruction to within one sample, and exactly over many steps."""
        order = permutation(self.batch_size, self.seed, "task", step)
        quantiles = (order + (step + 1) * _GOLDEN % 1.0) / self.batch_size
        share = self.share(step)
        return ["reconstruction" if quantile < share else "continuation" for quantile in quantiles]


class WindowShuffle:
    """Each epoch's order of one source's records: shards permuted, records permuted within windows of shards."""

    def __init__(self, shard_sizes: Sequence[int], window_shards: int, key: tuple[int, ...]) -> None:
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        self._first = np.cumsum(self._sizes) - self._sizes
        self._window_shards = window_shards
        self._key = key
        self._layout = lru_cache(maxsize=2)(self._make_layout)
        self._window = lru_cache(maxsize=3)(self._make_window)

    def __reduce__(self) -> tuple[type[WindowShuffle], tuple[list[int], int, tuple[int, ...]]]:
        return WindowShuffle, (self._sizes.tolist(), self._window_shards, self._key)

    def record(self, epoch: int, place: int) -> int:
        """The record at one place (0 … records - 1) of an epoch; every record stands at one place."""
        _, bounds = self._layout(epoch)
        window = int(np.searchsorted(bounds, place, side="right")) - 1
        return int(self._window(epoch, window)[place - bounds[window]])

    def _make_layout(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(shards in this epoch's order, the place where each window begins)."""
        shards = permutation(len(self._sizes), *self._key, "shards", epoch)
        window_sizes = np.add.reduceat(self._sizes[shards], np.arange(0, len(shards), self._window_shards))
        return shards, np.cumsum(window_sizes) - window_sizes

    def _make_window(self, epoch: int, window: int) -> NDArray[np.int64]:
        """The records of one window in this epoch's order."""
        shards = self._layout(epoch)[0][window * self._window_shards : (window + 1) * self._window_shards]
        records = np.concatenate([np.arange(self._first[s], self._first[s] + self._sizes[s]) for s in shards])
        return records[permutation(len(records), *self._key, "records", epoch, window)]


def deal(costs: Sequence[float], num_bins: int) -> tuple[tuple[int, ...], ...]:
    """Deal samples to `num_bins` micro-batches of equal size and about equal cost; returns the samples of each.

    Greedy: the costliest sample goes to the cheapest bin that still has room. Deterministic, so that every rank deals
    alike. ConfigError where the number of samples is no multiple of `num_bins`.
    """
    if num_bins < 1 or len(costs) % num_bins:
        raise ConfigError(
            f"a global batch of {len(costs)} sequences cannot be dealt evenly to {num_bins} micro-batches (ranks × "
            "micro-batches a step). Make data.batch_size a multiple of their product, or change the number of ranks."
        )
    room = len(costs) // num_bins
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    totals = [0.0] * num_bins
    for sample in sorted(range(len(costs)), key=lambda idx: (-costs[idx], idx)):
        cheapest = min((b for b in range(num_bins) if len(bins[b]) < room), key=lambda b: (totals[b], b))
        bins[cheapest].append(sample)
        totals[cheapest] += costs[sample]
    return tuple(tuple(sorted(samples)) for samples in bins)
