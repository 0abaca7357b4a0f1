"""The guard on frozen decoders names the rank and the decoder whose weights are wrong, on all ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from arc_ds.errors import TrainingError
from arc_ds.training import frozen_guard
from arc_ds.training.frozen_guard import FrozenGuard, frozen_digest
from tests.distributed.test_parity import Case, _place
from tests.helpers.distributed import run_on_ranks


def _damage(placement: str, rank: int | None, when: str) -> list[str]:
    """The guard's errors, at the start and at the end, if one bit of the second decoder is flipped on a rank."""
    decoders = _place(Case(placement=placement, persistence_threshold=0))
    run: Any = SimpleNamespace(decoders=decoders, decoder_names=("first", "second"), step=7)
    parameter: Any = list(decoders[1].module.parameters())[3]
    held = parameter.data
    if placement != "replicated":
        held = parameter.ds_tensor if placement == "zero3" else parameter.ds_secondary_tensor
    guard, found = FrozenGuard(), []
    for moment, check in (("start", guard.on_start), ("end", guard.on_end)):
        if moment == when and dist.get_rank() == rank:
            held.view(torch.int32).view(-1)[0] ^= 1
        try:
            check(run)
            found.append("")
        except TrainingError as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize("placement", ["replicated", "zero3", "zero3+hpz"])
def test_a_flipped_bit_is_named_with_its_rank_and_decoder(placement: str) -> None:
    assert run_on_ranks(_damage, placement, None, "never") == [["", ""], ["", ""]]
    first, second = run_on_ranks(_damage, placement, 1, "end")
    assert first == second and first[0] == ""
    assert "decoder second changed during training on rank 1" in first[1]
    assert "1 frozen decoder part(s)" in first[1] and "Checkpoints after step 7" in first[1]


def test_ranks_that_start_with_different_copies_are_refused() -> None:
    for errors in run_on_ranks(_damage, "replicated", 0, "start"):
        assert "decoder second differs from the other ranks on rank" in errors[0] and "first" not in errors[0]


def test_the_digest_sees_every_value_in_every_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen_guard, "_PIECE", 4)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        module = torch.nn.Linear(3, 5).to(dtype)
        for parameter in module.parameters():
            for value in parameter.data.view(-1):
                before = frozen_digest(module)
                value.add_(0.25)
                assert frozen_digest(module) != before  # two changes may cancel each other out
        assert frozen_digest(module) == frozen_digest(module)
    twins = torch.nn.ModuleList([torch.nn.Linear(3, 5), torch.nn.Linear(3, 5)])
    assert frozen_digest(twins) != frozen_digest(twins[::-1]), "exchanged weights have the same sum"
