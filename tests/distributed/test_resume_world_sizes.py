"""A run that moves from 2 ranks to 1, 4 and 3 and back, twice, continues as if it had stayed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from arc_ds.checkpoints.checkpoint import list_checkpoints
from arc_ds.checkpoints.manifest import read_manifest
from arc_ds.config.load import load_config
from arc_ds.data.loading.step_batch import StepBatch
from arc_ds.train import train
from arc_ds.training.build import build_run
from arc_ds.training.hooks import Hook
from arc_ds.training.run import Run
from arc_ds.training.step import StepResult
from tests.helpers import distributed
from tests.helpers.distributed import run_on_ranks
from tests.helpers.tiny_run import PLAIN, losses, numbers_by_step

pytestmark = pytest.mark.distributed

WORLDS = (2, 1, 4, 3, 2, 1, 4, 3, 2)
STEPS_EACH = 2
STEPS = STEPS_EACH * len(WORLDS)


class StopAt(Hook):
    """Ends a run after some steps."""

    priority = 0

    def __init__(self, step: int) -> None:
        self.step = step

    def after_step(self, run: Run, batch: StepBatch, result: StepResult) -> None:
        run.is_stopping = run.step == self.step


def train_to(config: str, run_dir: Path, stop_at: int) -> int:
    """Start or resume a run, and save and stop it at a step."""
    changes = (f"run_dir={run_dir}", f"steps={STEPS}", "data.batch_size=12", "micro_batches=1")
    loaded = load_config(config, (*changes, *PLAIN, "checkpoint.keep_last=99"))
    run = build_run(loaded, torch.device("cpu"))
    train(loaded, run, [StopAt(stop_at)])
    return run.step


def labels(run: Path) -> list[float]:
    by_step = numbers_by_step(run)
    return [by_step[step]["train/labels"] for step in sorted(by_step)]


def test_a_run_on_2_1_4_3_and_2_ranks_has_the_losses_of_one_on_2(config: Path, tmp_path: Path) -> None:
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    try:
        assert run_on_ranks(train_to, str(config), whole, STEPS) == [STEPS] * 2
        for number, num_ranks in enumerate(WORLDS, start=1):
            stop_at = number * STEPS_EACH
            assert run_on_ranks(train_to, str(config), moved, stop_at, num_ranks=num_ranks) == [stop_at] * num_ranks
    finally:
        for num_ranks in (3, 4):
            if (pool := distributed._POOLS.pop(num_ranks, None)) is not None:
                pool.close()
    checkpoints = list_checkpoints(moved / "checkpoints")
    assert [read_manifest(path).world_size for path in checkpoints] == list(WORLDS)
    assert labels(moved) == labels(whole), "another order of the data"
    # The order of additions differs: float32 has 6e-8 per addition, and errors grow over steps.
    assert losses(moved) == pytest.approx(losses(whole), rel=1e-6, abs=0)
    assert losses(moved) != losses(whole)[::-1] and len(set(losses(whole))) == STEPS
