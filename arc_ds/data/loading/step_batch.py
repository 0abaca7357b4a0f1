"""What one rank does in one step, as the DataLoader's workers hand it over."""

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

# A rank's samples: the equal parts of its share, the positions of each part, and for each decoder of the step a sample.
Share = tuple[tuple[tuple[Sample, ...], ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """One forward and backward pass.

    decoder_idx: which of the run's decoders reads it. part_idx: to which of the equal parts of the rank's share
    (`micro_batches` in the config) its samples belong; what is split to stay under a limit keeps its part.
    """

    decoder_idx: int
    batch: PackedBatch
    part_idx: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """What one rank does in one step.

    decoder_idxs: the decoders that the step trains for, the same on all ranks. micro_batches: in the order in which
    they run, as many for each of the decoders, and on every rank the same decoders in the same order.
    skipped: records of this rank that could not be used and were replaced. over_limit: its samples, of all decoders
    together, that exceed a limit of a micro-batch by themselves; each is alone in one. counts: what of its records was
    cut or changed. record_ids: (source, record) of each sample of this rank. share: its samples, from which the batch
    can be packed again in more micro-batches; None where nothing limits them.
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
        """Micro-batches for each decoder: into how many this rank's share is split."""
        return len(self.micro_batches) // len(self.decoder_idxs)

    def pin_memory(self) -> StepBatch:
        """The same batch in page-locked memory (called by torch's DataLoader)."""
        pinned = tuple(replace(micro, batch=micro.batch.pin_memory()) for micro in self.micro_batches)
        return replace(self, micro_batches=pinned)

    def __reduce__(self) -> tuple[Callable[[bytes], StepBatch], tuple[bytes]]:
        """Cross from a worker as plain bytes: torch would hand over each small tensor by a file descriptor of its own,
        and a few prefetched steps of many micro-batches would use up the process's limit."""
        buffer = io.BytesIO()
        _ArrayPickler(buffer, protocol=5).dump([getattr(self, one.name) for one in fields(self)])
        return _restore, (buffer.getvalue(),)


class _ArrayPickler(pickle.Pickler):
    """Writes tensors as numpy arrays."""

    def reducer_override(self, obj: object) -> Any:
        return (torch.from_numpy, (obj.numpy(),)) if isinstance(obj, torch.Tensor) else NotImplemented


def _restore(data: bytes) -> StepBatch:
    names = [one.name for one in fields(StepBatch)]
    return StepBatch(**dict(zip(names, pickle.loads(data), strict=True)))
