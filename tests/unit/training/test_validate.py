"""Validation reports its progress, so the watchdog does not mistake a long validation for a stall."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from arc_ds.batch.packing import PackedBatch
from arc_ds.batch.segments import Sample, Segment
from arc_ds.data.loading.micro_batches import MicroBatchLimits
from arc_ds.training import validate
from arc_ds.training.validate import TaskScores, ValidationSet, ValidationStopped, Validator
from tests.helpers.plain_trainer import POOLING

TASK = "continuation"
NO_LIMITS = MicroBatchLimits()


def _set(num: int) -> ValidationSet:
    text = Segment.text([1, 2, 3], in_loss=True)
    compressed = tuple(Sample(TASK, (Segment.text([1]), Segment.context([2, 3]), text)) for _ in range(num))
    plain = tuple(Sample(TASK, (text,)) for _ in range(num))
    return ValidationSet(compressed=compressed, mismatched=compressed, closed=plain, open=plain)


def _score(batch: PackedBatch, z_ZD: Tensor | None) -> Tensor:
    return torch.ones(batch.num_labels)


def _zeros(batch: PackedBatch, decoder_idx: int) -> Tensor:
    return torch.zeros(1)


def _fake_ranks(monkeypatch: pytest.MonkeyPatch, world_size: int, all_reduce: Any = lambda _: None) -> None:
    """This process becomes rank 0 of a fake group."""
    group = SimpleNamespace(get_rank=lambda: 0, get_world_size=lambda: world_size, all_reduce=all_reduce)
    monkeypatch.setattr(validate, "torch_dist", group)


@pytest.mark.parametrize(("world_size", "first", "later"), [(1, 2 * 4 * 3, 2 * 2 * 3), (2, 2 * 4 * 2, 2 * 2 * 2)])
def test_each_batch_is_told_and_counted_before(
    world_size: int, first: int, later: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two decoders, four forms, five samples in batches of two. Closed and open are scored once."""
    _fake_ranks(monkeypatch, world_size)
    validator = _validator(_set(5), _set(5))
    told: list[None] = []
    for expected in (first, later, later):
        told.clear()
        assert validator.num_forwards == expected
        scores = validator.run(_zeros, (_score, _score), lambda: told.append(None) is not None)
        assert len(told) == expected
    assert scores[1][TASK].compressed == 1.0 and validator.num_samples == 10
    assert validator.num_samples_of_tasks == [{TASK: 5}, {TASK: 5}]


@pytest.mark.parametrize("own", [True, False], ids=["this rank", "another rank"])
def test_a_stop_ends_it_before_the_next_batch_on_all_ranks(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(100))

    def all_reduce(tensor: Tensor) -> None:
        if tensor.ndim == 0 and not own and next(calls) == 3:
            tensor += 1

    _fake_ranks(monkeypatch, 2, all_reduce)
    batches: list[PackedBatch] = []

    def score(batch: PackedBatch, z_ZD: Tensor | None) -> Tensor:
        batches.append(batch)
        return _score(batch, z_ZD)

    validator = _validator(_set(5), batch_size=1)
    with pytest.raises(ValidationStopped):
        validator.run(_zeros, (score,), lambda: own and next(calls) == 3)
    assert len(batches) == 3
    assert validator.run(_zeros, (score,), lambda: False)[0][TASK].closed == 1.0, "validation must be restartable"
    assert len(batches) == 3 + 4 * 3


def test_each_form_has_its_own_score(monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_ranks(monkeypatch, 1)
    target = Segment.text([1, 2, 3], in_loss=True)
    contexts = (Segment.context([2, 3]), Segment.context(range(5)), Segment.text([]), Segment.text(range(9)))
    samples = ValidationSet._make((Sample(TASK, (context, target)),) for context in contexts)

    def score(batch: PackedBatch, z_ZD: Tensor | None) -> Tensor:
        return torch.full((batch.num_labels,), float(batch.num_decoder_rows))

    (scores,) = _validator(samples).run(_zeros, (score,), lambda: False)
    assert scores[TASK] == (1 + 1 + 3, 2 + 1 + 3, 3, 9 + 3), "groups of three, a marker and the target"


def _ragged_set() -> ValidationSet:
    """Samples with 3 to 8 labels; open samples have up to 40 additional rows."""
    texts = [Segment.text(range(10, 13 + num), in_loss=True) for num in range(6)]
    compressed = tuple(
        Sample(TASK, (Segment.text([1]), Segment.context(range(1, 5 + 6 * num)), text))
        for num, text in enumerate(texts)
    )
    opened = tuple(Sample(TASK, (Segment.text(range(1, 2 + 8 * num)), text)) for num, text in enumerate(texts))
    closed = tuple(Sample(TASK, (Segment.text([1]), text)) for text in texts)
    return ValidationSet(compressed=compressed, mismatched=compressed[::-1], closed=closed, open=opened)


@pytest.mark.parametrize(
    "limits", [MicroBatchLimits(max_decoder_rows=30), MicroBatchLimits(max_encoder_tokens=24)], ids=["rows", "tokens"]
)
def test_large_samples_are_scored_within_the_limits_with_the_same_result(
    limits: MicroBatchLimits, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fake_ranks(monkeypatch, 1)
    batches: list[PackedBatch] = []

    def score(batch: PackedBatch, z_ZD: Tensor | None) -> Tensor:
        batches.append(batch)
        return batch.labels.float() / 8  # sums of eighths are exact in any order

    def run(limits: MicroBatchLimits) -> list[dict[str, TaskScores]]:
        batches.clear()
        validator = _validator(_ragged_set(), batch_size=6, limits=limits)
        expected = validator.num_forwards
        scores = validator.run(_zeros, (score,), lambda: False)
        assert len(batches) == expected
        return scores

    together = run(NO_LIMITS)
    assert len(batches) == 4
    assert run(limits) == together
    sizes = [(len(batch.tasks), batch.num_encoder_tokens, batch.num_decoder_rows) for batch in batches]
    assert all(num == 1 or limits.allow(tokens, rows) for num, tokens, rows in sizes)
    assert len(sizes) > 4 and any(num > 1 for num, _, _ in sizes)
    assert not all(limits.allow(tokens, rows) for _, tokens, rows in sizes), "the largest sample must exceed the limits"


def test_other_held_out_samples_have_another_fingerprint() -> None:
    prints = [_validator(each).fingerprint for each in (_set(5), _set(5), _set(4), _ragged_set())]
    assert prints[0] == prints[1] and len(set(prints)) == 3


def _validator(*sets: ValidationSet, batch_size: int = 2, limits: MicroBatchLimits = NO_LIMITS) -> Validator:
    return Validator(sets=sets, packing=POOLING, batch_size=batch_size, limits=limits, device=torch.device("cpu"))
