"""Parameter groups, and the optimizer that does not change ports at rest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from arc_ds.config.schema import OptimizerConfig
from arc_ds.errors import ConfigError
from arc_ds.model.spec import LoraSpec
from arc_ds.training.optim import ParamGroup, PortAdamW, make_param_groups
from arc_ds.training.schedule import RateSchedule
from tests.helpers.plain_trainer import tiny_compressor, tiny_groups
from tests.helpers.tiny_compressor import tiny_compressor as with_shared_bridge

SCHEDULE = RateSchedule(total_steps=20, warmup_steps=5, initial_lr=1e-6, final_lr=1e-5)
HYPER: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8}


def _groups() -> tuple[ParamGroup, ...]:
    torch.manual_seed(0)

    def group(name: str, port: int | None, peak_lr: float, weight_decay: float, *sizes: int) -> ParamGroup:
        params = tuple(nn.Parameter(torch.randn(size)) for size in sizes)
        return ParamGroup(name=name, params=params, port=port, peak_lr=peak_lr, weight_decay=weight_decay)

    return (
        group("encoder", None, 1e-2, 0.1, 3, 4),
        group("bridge.0", 0, 3e-2, 0.2, 5),
        group("bridge.1", 1, 5e-2, 0.3, 2, 6),
    )


def _params(groups: tuple[ParamGroup, ...]) -> Iterator[nn.Parameter]:
    return (param for group in groups for param in group.params)


def _gradients(groups: tuple[ParamGroup, ...], step: int, decoder_idx: int, idle: float | None) -> None:
    """Random gradients. Gradients of groups at rest are filled with `idle`, or None."""
    generator = torch.Generator().manual_seed(step)
    for group in groups:
        for param in group.params:
            grad = torch.randn(param.shape, generator=generator)
            if not group.is_active([decoder_idx]):
                grad = None if idle is None else torch.full_like(grad, idle)
            param.grad = grad


def test_a_port_at_rest_is_as_with_no_gradient_to_the_last_bit() -> None:
    ours, theirs = _groups(), _groups()
    optimizer = PortAdamW(ours, **HYPER)
    plain = torch.optim.AdamW(
        [{"params": list(g.params), "weight_decay": g.weight_decay} for g in theirs], foreach=False, **HYPER
    )
    for step in range(12):
        decoder_idx = (step // 2) % 2
        _gradients(ours, step, decoder_idx, idle=0.0)
        _gradients(theirs, step, decoder_idx, idle=None)
        optimizer.prepare(SCHEDULE, step, [decoder_idx])
        optimizer.step()
        for group, torch_group in zip(theirs, plain.param_groups, strict=True):
            torch_group["lr"] = SCHEDULE.lr(step, group.peak_lr)
        plain.step()
    for a, b in zip(_params(ours), _params(theirs), strict=True):
        assert torch.equal(a, b)
        assert optimizer.state[a]["step"] == plain.state[b]["step"]
        assert torch.equal(optimizer.state[a]["exp_avg_sq"], plain.state[b]["exp_avg_sq"])


def test_a_zero_gradient_alone_would_move_a_port_at_rest() -> None:
    groups = _groups()
    optimizer = PortAdamW(groups, **HYPER)
    for step in range(2):
        _gradients(groups, step, decoder_idx=step, idle=0.0)
        before = groups[1].params[0].detach().clone()
        optimizer.prepare(SCHEDULE, step, [step])
        for torch_group in optimizer.param_groups:
            torch_group["active"] = True
        optimizer.step()
    assert not torch.equal(groups[1].params[0], before)


def test_sub_groups_stepped_one_at_a_time_take_their_groups_flag() -> None:
    """As in ZeRO-3: one flat tensor in its original group, all other groups empty."""
    groups = _groups()
    optimizer = PortAdamW(groups, **HYPER)
    flats = {idx: [param.detach().clone().requires_grad_() for param in g.params] for idx, g in enumerate(groups)}
    before = {idx: [flat.detach().clone() for flat in found] for idx, found in flats.items()}
    for torch_group in optimizer.param_groups:
        torch_group["params"] = []
    optimizer.prepare(SCHEDULE, 3, [1])
    for idx, found in flats.items():
        for flat in found:
            flat.grad = torch.ones_like(flat)
            optimizer.param_groups[idx]["params"] = [flat]
            optimizer.step()
            optimizer.param_groups[idx]["params"] = []
    for idx, moved in ((0, True), (1, False), (2, True)):
        for flat, old in zip(flats[idx], before[idx], strict=True):
            assert torch.equal(flat, old) != moved
            assert (flat in optimizer.state) == moved


def test_prepare_restores_what_a_universal_checkpoint_levels() -> None:
    optimizer = PortAdamW(_groups(), **HYPER)
    for torch_group in optimizer.param_groups[1:]:
        torch_group.update({k: v for k, v in optimizer.param_groups[0].items() if k != "params"})
    rates = optimizer.prepare(SCHEDULE, 4, [0])
    assert rates == {"encoder": 1e-2, "bridge.0": 3e-2}
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 3e-2, 5e-2]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.2, 0.3]
    assert [group["active"] for group in optimizer.param_groups] == [True, True, False]


def test_the_groups_hold_every_trained_parameter_once() -> None:
    compressor = tiny_compressor(decoder_lora=LoraSpec(rank=2, scale=1.0))
    groups = tiny_groups(compressor)
    assert [(group.name, group.port) for group in groups] == [
        ("encoder", None), ("bridge.0", 0), ("markers.0", 0), ("adapters.0", 0),
        ("bridge.1", 1), ("markers.1", 1), ("adapters.1", 1),
    ]  # fmt: skip
    assert [group.peak_lr for group in groups] == [1e-3, 3e-3, 2e-3, 1e-3, 3e-3, 2e-3, 1e-3]
    assert sorted(map(id, _params(groups))) == sorted(map(id, compressor.parameters()))


def test_the_bridge_that_all_decoders_share_is_one_group_which_every_step_trains() -> None:
    compressor = with_shared_bridge(decoder_sizes=(12, 12), bridge_shared=True)
    groups = tiny_groups(compressor)
    assert [group.name for group in groups] == ["encoder", "markers.0", "markers.1", "bridge"]
    assert sorted(map(id, _params(groups))) == sorted(map(id, compressor.parameters()))
    optimizer = PortAdamW(groups, **HYPER)
    for decoder_idx in range(2):
        rates = optimizer.prepare(SCHEDULE, 4, [decoder_idx])
        assert rates == {"encoder": 1e-3, f"markers.{decoder_idx}": 2e-3, "bridge": 3e-3}


def test_frozen_parts_have_no_group() -> None:
    compressor = tiny_compressor(trained_layers=1, train_embeddings=False)
    encoder = tiny_groups(compressor)[0]
    assert set(map(id, encoder.params)) == set(map(id, compressor.encoder.layers[-1].parameters()))
    compressor.encoder.requires_grad_(False)
    compressor.ports[0].bridge.requires_grad_(False)
    assert [group.name for group in tiny_groups(compressor)] == ["markers.0", "bridge.1", "markers.1"]


def test_a_run_that_trains_nothing_is_an_error_with_the_cure() -> None:
    compressor = tiny_compressor().requires_grad_(False)
    with pytest.raises(ConfigError, match=r"nothing is trained.*Set encoder\.trained_layers"):
        make_param_groups(compressor, OptimizerConfig())
