"""kill -9 of a process that saves all the time: the newest checkpoint is always whole, and no newer one is lost.

The process has a real ZeRO-3 engine and is forked, so a kill costs milliseconds. ARC_KILLS sets the number of kills.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from arc_ds.checkpoints import writer
from arc_ds.checkpoints.checkpoint import LATEST_NAME, TrainerState, find_resumable, load_checkpoint, step_of
from arc_ds.checkpoints.writer import CheckpointWriter
from arc_ds.system.processes import die_with_parent
from arc_ds.training.optim import ParamGroup, PortAdamW
from tests.helpers.distributed import run_on_ranks

pytestmark = pytest.mark.distributed

KILLS = int(os.environ.get("ARC_KILLS", 20))
SEED = 1501
# The phases of a save in order, and whether a kill before each of them leaves the new checkpoint.
PHASES = {"write_shards": False, "seal_file": False, "_leave_part": False, "write_manifest": False, "replace": False,
          "latest": True, "prune": True}  # fmt: skip


def _engine() -> Any:
    import deepspeed

    net = nn.Sequential(nn.Linear(257, 301), nn.Linear(301, 7, bias=False))
    groups = [
        ParamGroup(name=str(idx), params=tuple(part.parameters()), port=None, peak_lr=1e-2, weight_decay=0.0)
        for idx, part in enumerate(net)
    ]
    config = {"train_batch_size": 2, "zero_allow_untested_optimizer": True, "zero_optimization": {"stage": 3}}
    engine, *_ = deepspeed.initialize(
        model=net, optimizer=PortAdamW(groups, betas=(0.9, 0.999), eps=1e-8), config=config
    )
    engine.backward(engine(torch.ones(2, 257)).square().mean())
    engine.step()  # from now on there are moments
    return engine


def _states(engine: Any) -> list[torch.Tensor]:
    optimizer = engine.optimizer
    flats = optimizer.fp32_partitioned_groups_flat
    states = [optimizer.optimizer.state[flat] for flat in flats]
    return [flat.data for flat in flats] + [state[name] for state in states for name in sorted(state)]


def _fill(engine: Any, step: int) -> None:
    """Make every state a function of the step, so that a mixture of two checkpoints is seen."""
    for idx, state in enumerate(_states(engine)):
        state.fill_(step + idx / 8)


def _checked_step(engine: Any, directory: Path) -> int:
    """Resume from the newest checkpoint and return its step; all its values must be of that step."""
    path = find_resumable(directory)
    assert path is not None
    _fill(engine, -1)
    step = load_checkpoint(engine, path).step
    assert step == step_of(path) == engine.global_steps
    for idx, state in enumerate(_states(engine)):
        assert bool((state == step + idx / 8).all()), (path, idx)
    return step


def _save_for_ever(engine: Any, directory: Path, first: int, before: Callable[[int], None]) -> None:
    """Save one step after another in the background. before: called with each step."""
    die_with_parent()
    background = CheckpointWriter(directory, keep_last=2, keep_every=0, asynchronous=True)
    for step in itertools.count(first):
        before(step)
        _fill(engine, step)
        engine.global_steps = step
        state = TrainerState(step=step, data_position=step, data_fingerprint="", config_hash="")
        background.save(engine, state)


def _forked(function: Callable[..., None], *arguments: Any) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            function(*arguments)
        finally:
            os._exit(1)
    return pid


def _latest(directory: Path) -> int:
    path = directory / LATEST_NAME
    return int(path.read_text().strip().removeprefix("step_")) if path.exists() else 0


def _kill_at_random(directory: Path, kills: int) -> dict[str, int]:
    engine, chance = _engine(), random.Random(SEED)
    newest, torn, inside = 0, 0, 0
    for _ in range(kills):
        pid = _forked(_save_for_ever, engine, directory, newest + 1, lambda step: None)
        while _latest(directory) <= newest:
            time.sleep(0.001)  # until the process has saved once
        time.sleep(chance.uniform(0.0, 0.1))
        known = _latest(directory)
        os.kill(pid, signal.SIGKILL)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL, "the process failed before it was killed"
        inside += bool(list(directory.glob(".tmp-*")) or list(directory.glob(".trash-*")))
        torn += sum(not (path / "manifest.json").exists() for path in directory.glob("step_*"))
        step = _checked_step(engine, directory)
        assert step >= known > newest, "a whole checkpoint was lost"
        newest = step
    return {"inside": inside, "torn": torn, "saved": newest}


def test_kills_at_random_instants_leave_a_whole_checkpoint(tmp_path: Path) -> None:
    (found,) = run_on_ranks(_kill_at_random, tmp_path, KILLS, num_ranks=1, timeout_s=60 + 10 * KILLS)
    print(f"{KILLS} kills: {found}")
    assert found["torn"] == 0 and found["inside"] > 0, "no kill was inside a save"


def _suicide(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_in_phase(engine: Any, directory: Path, phase: str) -> None:
    """Save steps 1 and 2, and be killed before a phase of the second one."""

    def before(step: int) -> None:
        if step != 2:
            return
        while not (directory / LATEST_NAME).exists():
            time.sleep(0.001)
        real = writer.write_whole
        if phase == "replace":
            writer.os = SimpleNamespace(replace=_suicide, listdir=os.listdir)
        elif phase == "latest":
            writer.write_whole = lambda path, content: _suicide() if path.name == LATEST_NAME else real(path, content)
        elif phase != "prune":
            setattr(writer, phase, _suicide)

    if phase == "prune":
        writer.prune_checkpoints = lambda *_, **__: _suicide() if (directory / "step_000002").exists() else None
    _save_for_ever(engine, directory, 1, before)


def _kill_in_each_phase(directory: Path) -> dict[str, bool]:
    engine, found = _engine(), {}
    for phase in PHASES:
        pid = _forked(_kill_in_phase, engine, directory / phase, phase)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL, phase
        found[phase] = _checked_step(engine, directory / phase) == 2
    return found


def test_a_kill_before_any_phase_of_a_save_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    assert run_on_ranks(_kill_in_each_phase, tmp_path, num_ranks=1) == [PHASES]
