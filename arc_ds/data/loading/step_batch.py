"""One rank's work in one step, as the DataLoader's workers deliver it."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from arc_ds.batch.packing import PackedBatch
from arc_ds.batch.segments import Sample
from arc_ds.data.tasks import TaskCounts

# A rank's samples, by the equal parts of its share, the positions of each part, and the decoders of the step.
Share = tuple[tuple[tuple[Sample, ...], ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """One forward and backward pass.

    decoder_idx: the decoder that reads it.
    batch: the packed samples.
    part_idx: the part of the rank's share (`micro_batches` in the config) to which its samples belong. Splits of a part
        keep its number.
    """

    decoder_idx: int
    batch: PackedBatch
    part_idx: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """One rank's work in one step.

    step: number of the step.
    decoder_idxs: the decoders that the step trains for, the same on all ranks.
    micro_batches: in the order in which they run. Each decoder has equally many, and all ranks have the same decoders
        in the same order.
    skipped: number of this rank's records that could not be used and were replaced.
    over_limit: number of its samples, of all decoders, that exceed a micro-batch limit by themselves. Each is alone in
        one.
    counts: cuts and changes in its samples.
    record_ids: (source, record) of each of its samples.
    share: its samples, to pack them again in more micro-batches. None without limits.
    """

    step: int
    decoder_idxs: tuple[int, ...]
    micro_batches: tuple[MicroBatch, ...]
    skipped: int = 0
    over_limit: int = 0
    counts: TaskCounts = field(default_factory=TaskCounts)
    record_ids: tuple[tuple[int, int], ...] = ()
    share: Share | None = None

    @property
    def num_labels(self) -> int:
        """Labels of this rank, over all decoders."""
        return sum(micro.batch.num_labels for micro in self.micro_batches)

    @property
    def num_splits(self) -> int:
        """Micro-batches per decoder."""
        return len(self.micro_batches) // len(self.decoder_idxs)

    def pin_memory(self) -> StepBatch:
        """The same batch in page-locked memory (called by torch's DataLoader)."""
        pinned = tuple(replace(micro, batch=micro.batch.pin_memory()) for micro in self.micro_batches)
        return replace(self, micro_batches=pinned)

    def __reduce__(self) -> tuple[Callable[[bytes], StepBatch], tuple[bytes]]:
        """Leave a worker as plain bytes. Torch would pass each small tensor in a file descriptor of its own, and a few
        prefetched steps of many micro-batches would exceed the process's limit."""
        buffer = io.BytesIO()
        _ArrayPickler(buffer, protocol=5).dump({one.name: getattr(self, one.name) for one in fields(self)})
        return _restore, (buffer.getvalue(),)


class _ArrayPickler(pickle.Pickler):
    """Writes tensors as numpy arrays."""

    def reducer_override(self, obj: object) -> Any:
        return (torch.from_numpy, (obj.numpy(),)) if isinstance(obj, torch.Tensor) else NotImplemented


def _restore(data: bytes) -> StepBatch:
    return StepBatch(**pickle.loads(data))
