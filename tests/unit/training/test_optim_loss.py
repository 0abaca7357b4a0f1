"""The loss of a step: weights of labels, and handling of non-finite losses."""

from __future__ import annotations

import pytest
import torch

from arc_ds.batch.packing import pack
from arc_ds.batch.segments import Sample, Segment
from arc_ds.training.loss import class_sums, label_tasks, label_weight, micro_batch_loss
from tests.helpers.plain_trainer import POOLING, TASKS


def _weight(normalize: str, global_labels: int, part_labels: int) -> float:
    return float(label_weight(
        normalize, global_labels=torch.tensor(global_labels), part_labels=part_labels, num_parts=2,
        world_size=4,
    ))  # fmt: skip


def test_global_labels_weigh_alike_after_the_average_over_ranks() -> None:
    assert _weight("global", 64, 3) == _weight("global", 64, 30) == 4 / 64


def test_rank_mean_gives_each_micro_batch_the_same_weight() -> None:
    assert _weight("rank_mean", 64, 4) == 1 / 8
    assert _weight("rank_mean", 64, 16) == 1 / 32


@pytest.mark.parametrize("normalize", ["global", "rank_mean"])
def test_a_batch_without_labels_has_a_loss_of_zero(normalize: str) -> None:
    nll_L = torch.zeros(0, requires_grad=True)
    assert micro_batch_loss(nll_L, torch.tensor(_weight(normalize, 0, 0))).item() == 0


def test_an_infinite_loss_makes_its_finite_gradient_nan() -> None:
    nll_L = torch.tensor([1.0, torch.inf], requires_grad=True)
    micro_batch_loss(nll_L, torch.tensor(0.5)).backward()
    assert nll_L.grad is not None and nll_L.grad.isnan().all()
    finite_L = torch.tensor([1.0, 3.0], requires_grad=True)
    micro_batch_loss(finite_L, torch.tensor(0.5)).backward()
    assert finite_L.grad is not None and finite_L.grad.tolist() == [0.5, 0.5]


def _batch(*tasks_and_labels: tuple[str, int]):
    samples = [
        Sample(task, (Segment.text([1]), Segment.context([2, 3]), Segment.text(range(count + 1), in_loss=True)))
        for task, count in tasks_and_labels
    ]
    return pack(samples, POOLING)


def test_labels_are_summed_by_their_samples_task() -> None:
    batch = _batch(("continuation", 3), ("reconstruction", 1), ("continuation", 2))
    task_L = label_tasks(batch, TASKS)
    assert task_L.tolist() == [1, 1, 1, 0, 1, 1]
    values_L = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    assert class_sums(values_L, task_L, 2).tolist() == [8.0, 55.0]
