"""A run whose checkpoints cannot be written goes on or stops, as `checkpoint.on_error` says, on all ranks."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from arc_ds.checkpoints.checkpoint import check_checkpoint, list_checkpoints
from arc_ds.config.load import load_config
from arc_ds.data.loading.step_batch import StepBatch
from arc_ds.errors import StorageError
from arc_ds.launch.exit_codes import EXIT_DATA, EXIT_DISK_FULL, EXIT_OK, exit_code_of
from arc_ds.system import dist, files
from arc_ds.tracking.metrics_log import METRICS_NAME, read_metrics
from arc_ds.train import train
from arc_ds.training.build import build_run
from arc_ds.training.hooks import Hook
from arc_ds.training.run import Run
from arc_ds.training.step import StepResult
from tests.helpers.distributed import run_on_ranks
from tests.helpers.tiny_run import losses

pytestmark = pytest.mark.distributed

STEPS = 24
EVERY = 4


@dataclass
class AtStep(Hook):
    """Changes the run's folder on rank 0 after some steps, while no other rank is in a save."""

    changes: dict[int, Callable[[Path], None]]
    priority = 31  # after the save of the step has started

    def after_step(self, run: Run, batch: StepBatch, result: StepResult) -> None:
        if run.step in self.changes:
            dist.barrier()
            if dist.is_main():
                self.changes[run.step](run.folder / "checkpoints")
            dist.barrier()


def fill(checkpoints: Path) -> None:
    """Take all space of a disk."""
    with suppress(OSError), (checkpoints / "filler").open("wb", buffering=0) as file:
        while file.write(bytes(1 << 12)):
            pass


def free(checkpoints: Path) -> None:
    (checkpoints / "filler").unlink()


def make_read_only(checkpoints: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(checkpoints)], check=True)


def make_writable(checkpoints: Path) -> None:
    subprocess.run(["mount", "-o", "remount,rw", str(checkpoints)], check=True)


def move(checkpoints: Path) -> None:
    checkpoints.rename(checkpoints.with_name("moved"))


def run_with(config: str, run_dir: Path, overrides: list[str], changes: dict[int, Any]) -> tuple[int, int, str]:
    """Exit code, last step and message of a run."""
    fixed = [f"run_dir={run_dir}", f"steps={STEPS}", f"checkpoint.every={EVERY}", "checkpoint.keep_last=1",
             "tracking.mlflow=false", "data.num_workers=0", "data.validation=null",
             "validation.every=0"]  # fmt: skip
    settings = load_config(config, [*fixed, *overrides])
    run = build_run(settings, torch.device("cpu"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        if not dist.is_main():
            monkeypatch.setattr(files, "sync", _sync_late)
        try:
            return train(settings, run, [AtStep(changes)]), run.step, ""
        except StorageError as error:
            return exit_code_of(error), run.step, str(error)


def _sync_late(path: Path, sync: Callable[[Path], None] = files.sync) -> None:
    """Sync folders so late that rank 0 can rename a checkpoint's folder before another rank syncs it."""
    if path.is_dir():
        time.sleep(0.3)
    sync(path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """The folder of a run whose checkpoints lie on a disk for three of them."""
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(checkpoints)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no small disk without the right to mount one: {mounted.stderr.decode().strip()}")
    yield checkpoints.parent
    subprocess.run(["umount", "--lazy", str(checkpoints)], check=True)


def whole_steps(run: Path) -> list[str]:
    """The names of all entries of the checkpoints' folder; every checkpoint is whole."""
    assert [check_checkpoint(path) for path in list_checkpoints(run / "checkpoints")] == [[]]
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def failed_saves(run: Path) -> dict[int, float]:
    """The number of failed saves that the run has logged, by step."""
    name = "checkpoint/failed_saves"
    entries = read_metrics(run / METRICS_NAME)
    return {entry.step: entry.metrics[name] for entry in entries if name in entry.metrics}


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_run_goes_on_while_its_disk_is_full(config: Path, small_disk: Path, asynchronous: bool) -> None:
    overrides = ["checkpoint.on_error=continue", f"checkpoint.asynchronous={str(asynchronous).lower()}"]
    changes = {7: fill, 13: free}
    results = run_on_ranks(run_with, str(config), small_disk, overrides, changes)
    assert results == [(EXIT_OK, STEPS, "")] * 2
    assert whole_steps(small_disk) == ["latest", "step_000024"] and len(losses(small_disk)) == STEPS
    # In the background, the failure of a save is known at the next one.
    late = 4 * asynchronous
    assert failed_saves(small_disk) == {
        step: float(min(max((step - late - 4) // 4, 0), 2)) for step in range(EVERY, STEPS + 1, EVERY)
    }


def test_a_run_whose_last_save_fails_does_not_end_well(config: Path, small_disk: Path) -> None:
    results = run_on_ranks(run_with, str(config), small_disk, ["checkpoint.on_error=continue"], {21: fill})
    for code, step, message in results:
        assert (code, step) == (EXIT_DISK_FULL, STEPS)
        assert "step_000024 cannot be written" in message and "step_000020 is whole" in message
    free(small_disk / "checkpoints")
    assert whole_steps(small_disk) == ["latest", "step_000020"]


def test_a_full_disk_stops_a_run_with_its_own_code_and_the_same_command_repeats_it_to_the_last_bit(
    config: Path, small_disk: Path, tmp_path: Path
) -> None:
    for code, step, message in run_on_ranks(run_with, str(config), small_disk, [], {5: fill}):
        assert code == EXIT_DISK_FULL and 8 < step <= 12, "it stops at the next save at the latest"
        assert "step_000008 cannot be written" in message and "step_000004 is whole" in message
        assert "MiB are free on its disk" in message and "Free some space there" in message
    free(small_disk / "checkpoints")
    assert whole_steps(small_disk) == ["latest", "step_000004"]
    for run, on_error in ((small_disk, "stop"), (tmp_path / "other", "continue")):
        overrides = [f"checkpoint.on_error={on_error}"]
        assert run_on_ranks(run_with, str(config), run, overrides, {}) == [(EXIT_OK, STEPS, "")] * 2
    assert losses(small_disk) == losses(tmp_path / "other")


def test_a_read_only_folder_is_named(config: Path, small_disk: Path) -> None:
    overrides = ["checkpoint.asynchronous=false"]
    results = run_on_ranks(run_with, str(config), small_disk, overrides, {5: make_read_only})
    make_writable(small_disk / "checkpoints")
    for code, step, message in results:
        assert (code, step) == (EXIT_DATA, 8)
        assert "step_000008 cannot be written: Read-only file system" in message
        assert "Make it writable" in message and "step_000004 is whole" in message
    assert whole_steps(small_disk) == ["latest", "step_000004"]


def test_a_moved_folder_is_made_anew(config: Path, tmp_path: Path) -> None:
    overrides = ["checkpoint.asynchronous=false"]
    results = run_on_ranks(run_with, str(config), tmp_path / "run", overrides, {5: move})
    assert results == [(EXIT_OK, STEPS, "")] * 2
    assert whole_steps(tmp_path / "run") == ["latest", "step_000024"]
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "moved")] == ["step_000004"]
