"""Checkpoints of a real ZeRO-3 engine on two ranks: bit-exact resume, kills, corruption, other world sizes."""

from __future__ import annotations

import logging
import os
import random
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from arc_ds.checkpoints import checkpoint
from arc_ds.checkpoints.checkpoint import TrainerState, find_resumable, load_checkpoint, save_checkpoint
from arc_ds.system.dist import raise_together
from arc_ds.training.optim import ParamGroup, PortAdamW
from tests.helpers.distributed import RankError, run_on_ranks

GLOBAL_BATCH = 4


class _Net(nn.Module):
    """Odd sizes (so shards are padded), a frozen weight, a buffer, and two bridges used in different steps."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(5, 7, bias=False).requires_grad_(False)
        self.trunk = nn.Linear(7, 11, bias=False)
        self.marker = nn.Parameter(torch.ones(1, 11))
        self.bridges = nn.ModuleList([nn.Linear(11, 3, bias=False), nn.Linear(11, 3, bias=False)])
        self.register_buffer("scale", torch.tensor([1.0]))

    def forward(self, x_BD: Tensor, which: int) -> Tensor:
        x_BD = torch.tanh(self.trunk(self.frozen(x_BD))) * self.scale + self.marker
        outputs = [bridge(x_BD) for bridge in self.bridges]
        return (outputs[which] + 0.0 * outputs[1 - which]).square().mean()


def _engine(seed: int = 0, zero_stage: int = 3) -> Any:
    import deepspeed

    torch.manual_seed(seed)
    net = _Net()
    parts = (
        ("trunk", (net.trunk.weight, net.marker), 1e-2, 0.1),
        ("bridge.0", tuple(net.bridges[0].parameters()), 3e-2, 0.0),
        ("bridge.1", tuple(net.bridges[1].parameters()), 5e-2, 0.3),
    )
    groups = [ParamGroup(name=n, params=p, port=None, peak_lr=lr, weight_decay=decay) for n, p, lr, decay in parts]
    zero = {"stage": zero_stage, "stage3_param_persistence_threshold": 20, "sub_group_size": 40}
    config = {
        "train_batch_size": GLOBAL_BATCH,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
    }
    engine, *_ = deepspeed.initialize(
        model=net, optimizer=PortAdamW(groups, betas=(0.9, 0.999), eps=1e-8), config=config
    )
    for index, group in enumerate(engine.optimizer.optimizer.param_groups):
        group["index"] = index
    return engine


def _train(engine: Any, first: int, last: int) -> list[float]:
    """Run steps [first, last) and return the losses of this rank. The batch is a function of the step."""
    losses = []
    for step in range(first, last):
        which = int(step % 3 == 2)
        x_BD = torch.randn(GLOBAL_BATCH, 5, generator=torch.Generator().manual_seed(step))
        mine = x_BD.chunk(dist.get_world_size())[dist.get_rank()]
        loss = engine(mine, which)
        engine.backward(loss)
        for group in engine.optimizer.optimizer.param_groups:
            group["active"] = group["index"] in (0, 1 + which)
        engine.step()
        losses.append(loss.item())
    return losses


def _weights(engine: Any) -> dict[str, Tensor]:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return {name: param.detach().clone() for name, param in engine.module.named_parameters()}


def _moments(engine: Any) -> list[dict[str, Any]]:
    """Optimizer state and hyperparameters of each sub-group on this rank."""
    optimizer = engine.optimizer
    found = []
    for sub_group, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
        group = optimizer.optimizer.param_groups[optimizer.sub_group_to_group_id[sub_group]]
        hyper = {key: group[key] for key in ("lr", "weight_decay", "index")}
        state = {key: value.clone() for key, value in optimizer.optimizer.state[flat].items()}
        found.append({**hyper, **state})
    return found


def _state(step: int) -> TrainerState:
    return TrainerState(
        step=step, data_position=step * GLOBAL_BATCH, data_fingerprint="data", config_hash="config",
        mlflow_run_id="run", versions={"torch": torch.__version__}, extra={"skipped": 2},
    )  # fmt: skip


def _save(engine: Any, directory: Path, step: int) -> Path:
    return save_checkpoint(engine, directory, _state(step), keep_last=9, keep_every=0)


def _draw() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


def _resume_is_exact(directory: Path) -> dict[str, Any]:
    engine = _engine()
    _train(engine, 0, 4)
    random.seed(dist.get_rank())
    path = _save(engine, directory, 4)
    drawn = _draw()
    losses = _train(engine, 4, 7)
    wanted = _weights(engine)
    fresh = _engine(seed=1)
    before = _weights(fresh)
    state = load_checkpoint(fresh, find_resumable(directory))
    drawn_again = _draw()
    losses_again = _train(fresh, 4, 7)
    found = _weights(fresh)
    return {
        "path": path, "state": state, "drawn": (drawn, drawn_again), "losses": (losses, losses_again),
        "steps": (engine.global_steps, fresh.global_steps),
        "equal": all(torch.equal(wanted[name], found[name]) for name in wanted),
        "loaded": not torch.equal(before["trunk.weight"], found["trunk.weight"]),
    }  # fmt: skip


def test_resume_continues_bit_for_bit(tmp_path: Path) -> None:
    for result in run_on_ranks(_resume_is_exact, tmp_path):
        assert result["state"] == _state(4)
        assert result["equal"] and result["loaded"]
        assert result["losses"][0] == result["losses"][1]
        assert result["drawn"][0] == result["drawn"][1], "random states were not restored"
        assert result["steps"] == (7, 7)
        assert result["path"] == tmp_path / "step_000004"
    assert (tmp_path / "latest").read_text() == "step_000004\n"
    names = {path.name for path in (tmp_path / "step_000004").iterdir()}
    assert {"trainer.json", "manifest.json", "rng_00000.json", "rng_00001.json"} <= names
    assert not list(tmp_path.glob(".tmp*"))


class _Killed(BaseException):
    """Stands for kill -9: no code catches it, and a save runs no clean-up."""


def _kill(*_: Any, **__: Any) -> None:
    raise _Killed


# The steps of a save, in order. A test kills it before each one.
# Rank 0 does the last four alone, before the ranks exchange errors.
SAVE = ("_write_own_state", "seal_file", "write_manifest", "os", "write_whole", "prune_checkpoints")
ON_RANK_0 = SAVE[2:]


def _fail_before_each_part(directory: Path) -> list[tuple[str | None, int]]:
    engine = _engine()
    _save(engine, directory, 1)
    found = []
    for step, part in enumerate(SAVE, start=2):
        replacement = SimpleNamespace(replace=_kill) if part == "os" else _kill
        try:
            with mock.patch.object(checkpoint, part, replacement):
                _save(engine, directory, step)
        except _Killed:
            if part in ON_RANK_0:
                raise_together(None)
        dist.barrier()
        resumable = find_resumable(directory)
        found.append((resumable and resumable.name, len(list(directory.glob(".tmp-step_*")))))
        dist.barrier()
    return found


def test_a_kill_in_any_phase_leaves_a_loadable_checkpoint(tmp_path: Path) -> None:
    first, second = run_on_ranks(_fail_before_each_part, tmp_path)
    assert first == second
    assert [name for name, _ in first] == ["step_000001"] * 4 + ["step_000006", "step_000007"]
    assert [left for _, left in first] == [1, 1, 1, 1, 0, 0], "the next save must remove leftovers of a kill"


def _save_and_be_killed(directory: Path) -> None:
    engine = _engine()
    _save(engine, directory, 1)
    _train(engine, 0, 1)
    with mock.patch.object(checkpoint, "seal_file", lambda *_: os.kill(os.getpid(), signal.SIGKILL)):
        _save(engine, directory, 2)


def _load_newest(directory: Path) -> int:
    return load_checkpoint(_engine(seed=1), find_resumable(directory)).step


def test_kill_9_of_all_ranks_while_saving_resumes_from_the_one_before(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="exit code -9"):
        run_on_ranks(_save_and_be_killed, tmp_path)
    assert list(tmp_path.glob(".tmp-step_000002/*optim_states.pt"))
    assert run_on_ranks(_load_newest, tmp_path) == [1, 1]


def _save_steps(directory: Path, steps: list[int]) -> None:
    engine = _engine()
    for step in steps:
        _save(engine, directory, step)


def _find_with_warnings(directory: Path) -> tuple[str | None, list[str]]:
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    checkpoint.logger.addHandler(handler)
    try:
        found = find_resumable(directory)
    finally:
        checkpoint.logger.removeHandler(handler)
    return found and found.name, messages


def test_a_flipped_byte_is_named_and_passed_over(tmp_path: Path) -> None:
    run_on_ranks(_save_steps, tmp_path, [1, 2])
    damaged = next((tmp_path / "step_000002").glob("*rank_1*optim_states.pt"))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    (name, messages), (other, silent) = run_on_ranks(_find_with_warnings, tmp_path)
    assert name == other == "step_000001"
    assert len(messages) == 1 and str(damaged) in messages[0] and "checksum" in messages[0]
    assert silent == [], "only one rank may log"


def test_a_whole_checkpoint_is_never_overwritten_a_damaged_one_is_set_aside(tmp_path: Path) -> None:
    run_on_ranks(_save_steps, tmp_path, [3])
    with pytest.raises(RankError, match=r"(?s)rank 0.*not overwritten.*rank 1.*not overwritten"):
        run_on_ranks(_save_steps, tmp_path, [3])
    (tmp_path / "step_000003" / "trainer.json").unlink()
    run_on_ranks(_save_steps, tmp_path, [3])
    assert (tmp_path / "damaged-1-step_000003").is_dir()
    assert run_on_ranks(_load_newest, tmp_path) == [3, 3]


def _train_and_save(directory: Path) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    engine = _engine()
    _train(engine, 0, 4)
    _save(engine, directory, 4)
    return _weights(engine), _moments(engine)


def _load_and_save(directory: Path, out: Path) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    engine = _engine(seed=1)
    load_checkpoint(engine, directory / "step_000004")
    weights, moments = _weights(engine), _moments(engine)
    _save(engine, out, 4)
    return weights, moments


def test_another_world_size_keeps_every_bit_of_weights_and_optimizer(tmp_path: Path) -> None:
    """2 → 1 → 2: back on two ranks, every group is unchanged."""
    saved = run_on_ranks(_train_and_save, tmp_path / "two")
    ((one_weights, one_moments),) = run_on_ranks(_load_and_save, tmp_path / "two", tmp_path / "one", num_ranks=1)
    back = run_on_ranks(_load_and_save, tmp_path / "one", tmp_path / "back")
    for (weights, moments), (back_weights, back_moments) in zip(saved, back, strict=True):
        for name, weight in weights.items():
            assert torch.equal(weight, one_weights[name]) and torch.equal(weight, back_weights[name]), name
        assert len(moments) == len(back_moments) >= 3
        for old, new in zip(moments, back_moments, strict=True):
            assert old.keys() == new.keys()
            assert all(torch.equal(torch.as_tensor(old[key]), torch.as_tensor(new[key])) for key in old)
    steps = {int(moment["index"]): float(moment["step"]) for moment in one_moments}
    assert steps[0] > steps[1] > steps[2], "each group must keep its own step count"
    assert {int(moment["index"]): moment["weight_decay"] for moment in one_moments} == {0: 0.1, 1: 0.0, 2: 0.3}


def test_only_stage_3_changes_the_number_of_ranks(tmp_path: Path) -> None:
    run_on_ranks(_save_steps, tmp_path, [1])
    with pytest.raises(RankError, match="only ZeRO stage 3"):
        run_on_ranks(_load_stage_one, tmp_path / "step_000001", num_ranks=1)


def _load_stage_one(path: Path) -> None:
    load_checkpoint(_engine(zero_stage=1), path)
