"""The order of the run's samples as a pure function of (seed, position), without state.

Position j of the run belongs to step j // batch_size. Its source, record, task, in-context examples and private
randomness follow from (seed, j) alone. The step's decoders follow from (seed, step). The resume state is one integer
and `RunOrder.fingerprint`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from arc_ds.data.order.mixture import Mixture
from arc_ds.data.order.randomness import permutation, random_words
from arc_ds.data.order.shuffle import WindowShuffle
from arc_ds.errors import ConfigError

DecoderSchedule = Literal["sample", "alternate", "same_batch"]
_GOLDEN = 0.6180339887498949  # any number of its multiples fills [0, 1) evenly


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceShape:
    """The properties of a source that the order depends on.

    shard_sizes: records in each shard.
    fingerprint: of the shards.
    weight: share of the samples, relative to the other sources.
    task: name of the task in the config.
    samples: names of the task's samples, one or two.
    in_context_examples: maximum number per sample.
    name: for messages; not part of the order.
    num_records: in all shards.
    """

    shard_sizes: tuple[int, ...]
    fingerprint: str
    weight: float = 1.0
    task: str = "pretraining"
    samples: tuple[str, ...] = field(default=("reconstruction", "continuation"), compare=False)
    in_context_examples: int = 0
    name: str = field(default="", compare=False)
    num_records: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_records", sum(self.shard_sizes))


class Pick(NamedTuple):
    """The sample at one position of the run.

    position: global index in the run.
    source_idx: its source.
    epoch: epoch of the source.
    record_idx: its record in the source.
    task: name of the sample.
    seed: 64-bit number for this position's own random choices.
    example_idxs: other records of the source that are its in-context examples, all different.
    """

    position: int
    source_idx: int
    epoch: int
    record_idx: int
    task: str
    seed: int
    example_idxs: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RunOrder:
    """The samples of every step of a run. Raises ConfigError if a source cannot give its samples.

    The config checks the ranges of the other values (`config.schema`, `config.validate`).

    seed: the run's seed.
    batch_size: sequences of a global batch.
    sources: the mixture.
    reconstruction_share: (from_step, share) pairs with increasing steps. The last pair with from_step <= step sets the
        share of reconstruction among the samples of pretraining sources.
    num_decoders: of the run.
    decoder_schedule: see `decoders`.
    window_shards: number of shards whose records are shuffled together.
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
        for idx, source in enumerate(self.sources):
            _check_source(idx, source)
        shuffles = tuple(
            WindowShuffle(source.shard_sizes, self.window_shards, (self.seed, idx))
            for idx, source in enumerate(self.sources)
        )
        object.__setattr__(self, "_mixture", Mixture([source.weight for source in self.sources]))
        object.__setattr__(self, "_shuffles", shuffles)

    @property
    def fingerprint(self) -> str:
        """sha256 of everything that the order depends on. A resumed run must have the same."""
        spec = [self.seed, self.batch_size, self.reconstruction_share, self.num_decoders, self.decoder_schedule]
        sources = [[s.fingerprint, s.shard_sizes, s.weight, s.task, s.in_context_examples] for s in self.sources]
        return hashlib.sha256(json.dumps([2, spec, self.window_shards, sources]).encode()).hexdigest()

    def decoders(self, step: int) -> tuple[int, ...]:
        """Indices of the decoders that all ranks use in a step.

        "same_batch": all of them. "alternate": one, in turns. "sample": one, drawn without replacement in every group
        of as many steps as there are decoders.
        """
        if self.decoder_schedule == "same_batch" or self.num_decoders == 1:
            return tuple(range(self.num_decoders))
        if self.decoder_schedule == "alternate":
            return (step % self.num_decoders,)
        turn, place = divmod(step, self.num_decoders)
        return (int(permutation(self.num_decoders, self.seed, "decoder", turn)[place]),)

    def batch(self, step: int) -> tuple[Pick, ...]:
        """The global batch of a step: positions step * batch_size to (step + 1) * batch_size - 1."""
        first = step * self.batch_size
        source_idxs, ranks = self._mixture.span(self.seed, first, self.batch_size)
        epochs, record_idxs = np.empty_like(ranks), np.empty_like(ranks)
        for source_idx in set(source_idxs.tolist()):
            mine = source_idxs == source_idx
            epochs[mine], record_idxs[mine] = self._shuffles[source_idx].records(ranks[mine])
        columns = (  # in the order of the fields of `Pick`
            range(first, first + self.batch_size),
            source_idxs.tolist(),
            epochs.tolist(),
            record_idxs.tolist(),
            self._tasks(step, source_idxs),
            random_words(self.batch_size, self.seed, "sample", step).tolist(),
            self._examples(step, source_idxs, record_idxs),
        )
        return tuple(Pick(*row) for row in zip(*columns, strict=True))

    def windows(self, step: int) -> dict[int, tuple[tuple[int, ...], tuple[int, ...]]]:
        """For each source of a step, the shards of its window at the end of the step, and those of the next window."""
        source_idxs, ranks = self._mixture.span(self.seed, step * self.batch_size, self.batch_size)
        return {
            source_idx: self._shuffles[source_idx].windows_from(int(ranks[source_idxs == source_idx][-1]))
            for source_idx in np.unique(source_idxs).tolist()
        }

    def _tasks(self, step: int, source_idxs: NDArray[np.int64]) -> list[str]:
        """The name of the sample at each place of the step, from the sources of the places.

        Among samples of sources with two names, the share of the first (reconstruction) is exact to within one sample
        per step, and exact over many steps.
        """
        names = [self.sources[source_idx].samples for source_idx in source_idxs.tolist()]
        num_mixed = sum(len(each) == 2 for each in names)
        order = permutation(num_mixed, self.seed, "task", step)
        quantiles = iter(((order + (step + 1) * _GOLDEN % 1.0) / max(num_mixed, 1)).tolist())
        share = [value for from_step, value in self.reconstruction_share if from_step <= step][-1]
        return [each[0] if len(each) == 1 or next(quantiles) < share else each[1] for each in names]

    def _examples(
        self, step: int, source_idxs: NDArray[np.int64], record_idxs: NDArray[np.int64]
    ) -> list[tuple[int, ...]]:
        """The in-context examples at each place of the step: 0 to the source's maximum, all numbers equally likely."""
        most = max(source.in_context_examples for source in self.sources)
        if most == 0:
            return [()] * self.batch_size
        words = random_words(self.batch_size * (most + 1), self.seed, "examples", step).reshape(self.batch_size, -1)
        places = zip(source_idxs.tolist(), record_idxs.tolist(), words.tolist(), strict=True)
        return [draw_examples(self.sources[source_idx], record_idx, row) for source_idx, record_idx, row in places]


def _check_source(idx: int, source: SourceShape) -> None:
    where = f"data.sources.{idx}" + (f" ({source.name})" if source.name else "")
    if source.num_records < 1:
        raise ConfigError(f"{where} holds no record; expected at least one. Remove it or build its shards again.")
    if source.num_records <= source.in_context_examples:
        raise ConfigError(
            f"{where} holds {source.num_records} records; a sample with {source.in_context_examples} in-context "
            f"examples needs at least {source.in_context_examples + 1}, all different. Lower in_context_examples or "
            "give more records."
        )


def draw_examples(source: SourceShape, record_idx: int, words: Sequence[int]) -> tuple[int, ...]:
    """Draw the in-context examples of a record, all different. Numbers from 0 to the maximum are equally likely.

    source: the record's source.
    record_idx: the record; it is never its own example.
    words: random 64-bit words, one more than the maximum number of examples.
    """
    count = words[0] % (source.in_context_examples + 1)
    taken = [record_idx]
    for word in words[1 : count + 1]:
        drawn = word % (source.num_records - len(taken))
        for other in sorted(taken):  # count only records that are still free
            drawn += drawn >= other
        taken.append(drawn)
    return tuple(taken[1:])
