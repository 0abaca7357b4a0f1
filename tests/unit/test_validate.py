"""Validation tells how far it is: a rank that scores for an hour must not be taken for a stalled one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from arc_ds.data.packing import PackedBatch
from arc_ds.data.segments import Sample, Segment
from arc_ds.training import validate
from arc_ds.training.validate import ValidationSet, Validator
from tests.helpers.plain_trainer import POOLING

TASK = "continuation"


def _set(num: int) -> ValidationSet:
    text = Segment.text([1, 2, 3], in_loss=True)
    compressed = tuple(Sample(TASK, (Segment.text([1]), Segment.context([2, 3]), text)) for _ in range(num))
    plain = tuple(Sample(TASK, (text,)) for _ in range(num))
    return ValidationSet(compressed=compressed, mismatched=compressed, closed=plain, open=plain)


def _score(batch: PackedBatch, z_ZD: Tensor | None) -> Tensor:
    return torch.ones(batch.num_labels)


@pytest.mark.parametrize(("world_size", "first", "later"), [(1, 2 * 4 * 3, 2 * 2 * 3), (2, 2 * 4 * 2, 2 * 2 * 2)])
def test_each_batch_is_told_and_counted_before(
    world_size: int, first: int, later: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two decoders, four ways, five samples in batches of two; closed and open are scored once."""
    group = SimpleNamespace(get_rank=lambda: 0, get_world_size=lambda: world_size, all_reduce=lambda _: None)
    monkeypatch.setattr(validate, "dist", group)
    validator = Validator(
        [_set(5), _set(5)], decoder_names=["a", "b"], packing=POOLING, batch_size=2, device=torch.device("cpu")
    )
    told: list[None] = []
    for expected in (first, later, later):
        told.clear()
        assert validator.num_forwards == expected
        scores = validator.run(lambda batch, idx: torch.zeros(1), (_score, _score), lambda: told.append(None))
        assert len(told) == expected
    assert scores["b"][TASK].compressed == 1.0 and validator.num_samples == 10
