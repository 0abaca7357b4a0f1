"""The loss of a batch from the NLL of its labels. Shape letters: L labels, C label classes (decoder and task)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from arc_ds.batch.packing import PackedBatch

Normalize = Literal["global", "rank_mean"]


def label_tasks(batch: PackedBatch, tasks: Sequence[str]) -> Tensor:
    """Task of each label as an index into `tasks`, which has all tasks of the batch: int64 [L] on its device."""
    task_of_sequence = torch.tensor([tasks.index(task) for task in batch.tasks], dtype=torch.int64)
    return task_of_sequence.to(batch.labels.device, non_blocking=True)[batch.label_sequences]


def class_sums(values_L: Tensor, class_L: Tensor, num_classes: int) -> Tensor:
    """Sums of the labels' values by class, float64 [C]. Not differentiable. The order of addition is fixed."""
    is_class_LC = class_L[:, None] == torch.arange(num_classes, device=class_L.device)
    return torch.where(is_class_LC, values_L.detach().double()[:, None], 0.0).sum(0)


def label_weight(
    normalize: Normalize, *, global_labels: Tensor, part_labels: int, num_parts: int, world_size: int
) -> Tensor:
    """Factor for a micro-batch's summed NLL before backward: float32 scalar.

    DeepSpeed sums gradients over micro-batches and averages them over ranks.

    "global": every label of the global batch has the same weight, 1 / `global_labels` after averaging over ranks.
    "rank_mean": every part of every rank's share (per decoder) has the same weight, independent of its number of
        labels. The reference's micro-batches are such parts. A part without labels has a loss of 0.

    global_labels: scalar tensor, number of labels of the global batch.
    part_labels: number of labels of the whole part, so splitting it further does not change the loss.
    num_parts: number of parts of this rank's share.
    """
    if normalize == "global":
        return world_size / global_labels.clamp(min=1).float()
    return torch.full_like(global_labels, 1.0 / (max(part_labels, 1) * num_parts), dtype=torch.float32)


def micro_batch_loss(nll_L: Tensor, weight: Tensor) -> Tensor:
    """The loss whose gradients DeepSpeed sums over micro-batches and averages over ranks: float32 scalar.

    If the NLL is not finite, all gradients become NaN, even if they would be finite (a label of probability 0 has an
    infinite NLL but a finite gradient). All ranks then see a non-finite gradient norm and skip the step.
    """
    total = nll_L.sum()
    return total * torch.where(total.detach().isfinite(), weight, torch.nan)
