"""From the NLL of labels to the loss of a batch. Shape letters: L labels, C classes of labels (decoder and task)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from arc_ds.batch.packing import PackedBatch

Normalize = Literal["global", "rank_mean"]


def label_tasks(batch: PackedBatch, tasks: Sequence[str]) -> Tensor:
    """The task of each label as an index into `tasks`: int64 [L] on the batch's device.

    ValueError where the batch has a task that `tasks` lacks.
    """
    unknown = sorted(set(batch.tasks) - set(tasks))
    if unknown:
        raise ValueError(f"the batch has samples of {', '.join(unknown)}; expected only {', '.join(tasks)}")
    task_of_sequence = torch.tensor([tasks.index(task) for task in batch.tasks], dtype=torch.int64)
    return task_of_sequence.to(batch.labels.device, non_blocking=True)[batch.label_sequences]


def class_sums(values_L: Tensor, class_L: Tensor, num_classes: int) -> Tensor:
    """Sums of the labels' values by class, float64 [C]. Not differentiable, and in a fixed order of addition."""
    is_class_LC = class_L[:, None] == torch.arange(num_classes, device=class_L.device)
    return torch.where(is_class_LC, values_L.detach().double()[:, None], 0.0).sum(0)


def label_weight(
    normalize: Normalize, *, global_labels: Tensor, part_labels: int, num_parts: int, world_size: int
) -> Tensor:
    """What a micro-batch's summed NLL is multiplied by before backward: float32 scalar.

    DeepSpeed adds the gradients of micro-batches and averages those of ranks. "global": every label of the global
    batch weighs the same, 1 / `global_labels` (scalar) after that average. "rank_mean": every part of every rank's
    share (with each of its decoders) weighs the same, whatever labels it has; the reference's micro-batches are such
    parts. `part_labels` counts the whole part, so that splitting it further changes nothing. A part without labels has
    a loss of 0.
    """
    if normalize == "global":
        return world_size / global_labels.clamp(min=1).float()
    return torch.full_like(global_labels, 1.0 / (max(part_labels, 1) * num_parts), dtype=torch.float32)


def micro_batch_loss(nll_L: Tensor, weight: Tensor) -> Tensor:
    """The loss whose gradients DeepSpeed sums and averages: float32 scalar.

    Where the NLL is not finite the gradients become NaN, though they may have been finite (a label of probability 0
    has an infinite NLL and a finite gradient): so all ranks find it in the gradient norm and leave the step out.
    """
    total = nll_L.sum()
    return total * torch.where(total.detach().isfinite(), weight, torch.nan)
