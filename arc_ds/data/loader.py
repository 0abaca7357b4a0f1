"""The steps of a run as a dataset: step number in, this rank's packed micro-batches out.

A step's batch follows from its number alone, so any number of workers gives the same batches, a resumed run begins at
any step, and nothing is saved.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from arc_ds.data.dealing import deal
from arc_ds.data.order import Pick, RunOrder, SourceShape, Task
from arc_ds.data.packing import PoolingSpec, pack
from arc_ds.data.shard_reader import ShardSet
from arc_ds.data.step_batch import MicroBatch, StepBatch
from arc_ds.data.tasks import Example, TaskLimits, make_example
from arc_ds.data.tokenizers import Tokenizer, load_tokenizer
from arc_ds.errors import DataError

logger = logging.getLogger(__name__)

# Records tried in place of an unusable one: more in a row mean that the source is damaged, not one record.
_MAX_REPLACEMENTS = 100


@dataclass(frozen=True, slots=True)
class _Made:
    example: Example
    record_id: tuple[int, int]
    skipped: int


class StepData(Dataset[StepBatch]):
    """A map-style dataset over the steps of a run, for one rank. Tokenizers are loaded when the first step is made.

    order: of the same sources, in the same order, as `sources`. encoder_tokenizer, decoder_tokenizers: paths.
    on_error: what an unusable record does: "stop" raises DataError; "skip" takes the next record of its source
    instead, counts it and names it once in the log.
    """

    def __init__(
        self,
        *,
        order: RunOrder,
        sources: Sequence[ShardSet],
        encoder_tokenizer: str | Path,
        decoder_tokenizers: Sequence[str | Path],
        limits: TaskLimits,
        pooling: PoolingSpec,
        rank: int = 0,
        world_size: int = 1,
        micro_batches: int = 1,
        on_error: Literal["skip", "stop"] = "stop",
    ) -> None:
        """ConfigError where ranks × micro_batches does not divide the batch; DataError on an order of other sources."""
        if [source.fingerprint for source in sources] != [shape.fingerprint for shape in order.sources]:
            raise DataError("the run's order was made of other shards than these. Make the order of these sources.")
        deal([0.0] * order.batch_size, world_size * micro_batches)
        self.order = order
        self.sources = tuple(sources)
        self.limits = limits
        self.pooling = pooling
        self.rank = rank
        self.world_size = world_size
        self.micro_batches = micro_batches
        self.on_error = on_error
        self._encoder_path = encoder_tokenizer
        self._decoder_paths = tuple(decoder_tokenizers)
        self._named: set[tuple[int, int]] = set()

    @cached_property
    def _tokenizers(self) -> tuple[Tokenizer, tuple[Tokenizer, ...]]:
        return load_tokenizer(self._encoder_path), tuple(load_tokenizer(path) for path in self._decoder_paths)

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "_tokenizers"}

    def __getitem__(self, step: int) -> StepBatch:
        picks = self.order.batch(step)
        bins = deal([self._cost(pick) for pick in picks], self.world_size * self.micro_batches)
        mine = bins[self.rank * self.micro_batches : (self.rank + 1) * self.micro_batches]
        (decoder_idx,) = self.order.decoders(step)
        made = [[self._make(picks[idx], decoder_idx) for idx in members] for members in mine]
        everything = [item for micro_batch in made for item in micro_batch]
        return StepBatch(
            step=step,
            decoder_idxs=(decoder_idx,),
            micro_batches=tuple(
                MicroBatch(
                    decoder_idx=decoder_idx,
                    batch=pack([item.example.sample for item in batch], self.pooling),
                    part_idx=part_idx,
                )
                for part_idx, batch in enumerate(made)
            ),
            skipped=sum(item.skipped for item in everything),
            degraded=sum(item.example.degraded for item in everything),
            record_ids=tuple(item.record_id for item in everything),
        )

    def _cost(self, pick: Pick) -> float:
        """About how much work a sample is, in tokens: what the encoder reads and the decoder's rows."""
        tokens = self.sources[pick.source_idx].tokens(pick.record_idx)
        limits = self.limits
        if pick.task == "reconstruction":
            return 2.0 * min(tokens, limits.max_context)
        return float(min(tokens, limits.max_prefix + limits.max_context + limits.max_continuation))

    def _make(self, pick: Pick, decoder_idx: int) -> _Made:
        """The sample of a position, or where its record is unusable that of the next good record of its source."""
        source = self.sources[pick.source_idx]
        attempts = min(_MAX_REPLACEMENTS, len(source))
        for skipped in range(attempts):
            record_idx = (pick.record_idx + skipped) % len(source)
            try:
                example = self._example(source, record_idx, pick, decoder_idx)
            except DataError as error:
                if self.on_error == "stop":
                    raise
                self._name_once((pick.source_idx, record_idx), error)
                continue
            return _Made(example, (pick.source_idx, record_idx), skipped)
        raise DataError(
            f"{source.folder}: {attempts} records in a row from {pick.record_idx} on cannot be used. Run "
            "`arc-ds shards check` on it and build it again."
        )

    def _example(self, source: ShardSet, record_idx: int, pick: Pick, decoder_idx: int) -> Example:
        encoder, decoders = self._tokenizers
        records = [source.record(idx) for idx in (record_idx, *pick.example_idxs)]
        try:
            return make_example(
                records,
                task=pick.task,
                seed=pick.seed,
                encoder=encoder,
                decoder=decoders[decoder_idx],
                limits=self.limits,
            )
        except DataError as error:
            raise DataError(f"{source.folder}, record {record_idx}: {error}") from error

    def _name_once(self, record_id: tuple[int, int], error: DataError) -> None:
        if record_id not in self._named:
            self._named.add(record_id)
            logger.warning("record skipped: %s", error)


def source_shapes(sources: Sequence[ShardSet], weights: Sequence[float]) -> tuple[SourceShape, ...]:
    """What the order must know of opened sources."""
    return tuple(
        SourceShape(shard_sizes=tuple(source.shard_sizes.tolist()), fingerprint=source.fingerprint, weight=weight)
        for source, weight in zip(sources, weights, strict=True)
    )


def make_loader(
    data: StepData, steps: range, *, num_workers: int, prefetch: int = 4, pin_memory: bool = False
) -> DataLoader[StepBatch]:
    """A DataLoader that yields the batches of `steps` in order. 0 workers: made in this process."""
    return DataLoader(
        data,
        batch_size=None,
        sampler=steps,
        num_workers=num_workers,
        prefetch_factor=prefetch if num_workers else None,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
        worker_init_fn=_begin_worker,
    )


def _begin_worker(_: int) -> None:
    """One thread a worker: the ranks' workers share the host's cores.

    A scheduler that stops a job signals all of its processes. A rank then saves at the next step boundary, and until
    there it needs its workers: they leave the signals to it, and end with it.
    """
    for number in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _ignore_once)
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _ignore_once(number: int, _frame: FrameType | None) -> None:
    """The second one ends the worker: it is how Python ends children that an abandoned loader has left behind."""
    signal.signal(number, signal.SIG_DFL)


def validation_examples(
    source: ShardSet,
    num: int,
    *,
    encoder: Tokenizer,
    decoder: Tokenizer,
    limits: TaskLimits,
    tasks: Sequence[Task] = ("reconstruction", "continuation"),
) -> tuple[Example, ...]:
    """A fixed list of held-out examples, task by task, spread evenly over the records; the same on any machines.

    `num` is the total, shared evenly among the tasks. Records too short for their task are passed over. DataError
    where the source has too few usable records.
    """
    per_task = num // len(tasks)
    if per_task < 2 or len(source) < num:
        raise DataError(
            f"{source.folder}: {num} validation samples of {len(tasks)} tasks were asked for; it holds {len(source)} "
            f"records. Ask for {2 * len(tasks)} to {len(source)}, or hold out more text."
        )
    starts = np.linspace(0, len(source), num, endpoint=False).astype(np.int64).tolist()
    used: set[int] = set()
    examples = []
    for task_idx, task in enumerate(tasks):
        for start in starts[task_idx :: len(tasks)][:per_task]:
            for record_idx in (*range(start, len(source)), *range(start)):
                example = None if record_idx in used else _held_out(source, record_idx, task, encoder, decoder, limits)
                if example is not None:
                    used.add(record_idx)
                    examples.append(example)
                    break
            else:
                raise DataError(f"{source.folder}: too few records are long enough for {num} samples. Hold out more.")
    return tuple(examples)


def _held_out(
    source: ShardSet, record_idx: int, task: Task, encoder: Tokenizer, decoder: Tokenizer, limits: TaskLimits
) -> Example | None:
    """The example of a held-out record, None where it is too short for the task."""
    records = [source.record(record_idx)]
    try:
        example = make_example(records, task=task, seed=record_idx, encoder=encoder, decoder=decoder, limits=limits)
    except DataError:
        return None
    return None if example.degraded else example
