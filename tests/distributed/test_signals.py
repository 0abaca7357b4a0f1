"""A stop signal or an invalid batch on one rank stops all ranks at the same step boundary.

A stop also aborts a validation, which may take long.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

from arc_ds.config.load import load_config
from arc_ds.data.loading.loader import StepData
from arc_ds.data.loading.step_batch import StepBatch
from arc_ds.errors import ArcError, DataError
from arc_ds.launch.exit_codes import EXIT_OK, EXIT_PREEMPTED
from arc_ds.launch.signals import StopRequest
from arc_ds.system import dist
from arc_ds.train import train
from arc_ds.training.build import build_run
from arc_ds.training.hooks import Hook
from arc_ds.training.run import Run
from tests.helpers.distributed import run_on_ranks
from tests.helpers.tiny_run import PLAIN, last_saved_step, losses, numbers_by_step

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SMALL = ("steps=6", "log_every=10", *PLAIN)


class Outcome(NamedTuple):
    """Results of one rank."""

    code: int | None
    error: tuple[type, str] | None
    step: int


class _TornOnRankOne:
    """Data of a run. On rank 1 the batch of one step raises an error."""

    def __init__(self, data: StepData, torn_step: int) -> None:
        self._data, self._torn_step = data, torn_step

    def __getitem__(self, step: int) -> StepBatch:
        if step == self._torn_step and dist.rank() == 1:
            raise DataError("record 7 is torn")
        return self._data[step]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)


class _SignalToRankOne(Hook):
    """Signals rank 1 after a step, like a launcher."""

    def __init__(self, step: int) -> None:
        self._step = step

    def after_step(self, run: Run, batch: Any, result: Any) -> None:
        if run.step == self._step and dist.rank() == 1:
            os.kill(os.getpid(), signal.SIGUSR1)


def _train(config: str, run_dir: str, torn_step: int, signal_after: int) -> Outcome:
    loaded = load_config(config, (f"run_dir={run_dir}", *SMALL))
    run = build_run(loaded, torch.device("cpu"))
    run.data = _TornOnRankOne(run.data, torn_step)  # type: ignore[assignment]
    code, error = None, None
    try:
        code = train(loaded, run, [_SignalToRankOne(signal_after)])
    except ArcError as caught:
        error = (type(caught), str(caught))
    return Outcome(code, error, run.step)


def _validate(config: str, run_dir: str, signal_at: int) -> Outcome:
    """Run with validation. After `signal_at` steps, rank 1 gets a signal when validation first checks for a stop."""
    held_out = f"data.validation={Path(config).parent / 'held_out'}"
    loaded = load_config(config, (f"run_dir={run_dir}", *SMALL, "validation.every=2", "checkpoint.every=2", held_out))
    run = build_run(loaded, torch.device("cpu"))
    is_set = StopRequest.is_set

    def signal_first(stop: StopRequest) -> bool:
        if run.step == signal_at and dist.rank() == 1 and not is_set(stop):
            os.kill(os.getpid(), signal.SIGUSR1)
        return is_set(stop)

    with mock.patch.object(StopRequest, "is_set", signal_first):
        return Outcome(train(loaded, run), None, run.step)


def test_a_signal_to_one_rank_stops_all_at_the_same_step(config: Path, tmp_path: Path) -> None:
    """The signal is exchanged in the next step, and all ranks stop after it."""
    outcomes = run_on_ranks(_train, str(config), str(tmp_path / "run"), -1, 2)
    assert outcomes == [Outcome(EXIT_PREEMPTED, None, 3)] * 2
    assert last_saved_step(tmp_path / "run") == len(losses(tmp_path / "run")) == 3


@pytest.mark.parametrize("torn_step", [0, 2])
def test_a_batch_that_one_rank_cannot_make_stops_all_before_it_with_one_error(
    config: Path, tmp_path: Path, torn_step: int
) -> None:
    outcomes = run_on_ranks(_train, str(config), str(tmp_path / "run"), torn_step, -1)
    assert outcomes == [Outcome(None, (DataError, "rank 1: record 7 is torn"), torn_step)] * 2
    if torn_step:
        assert last_saved_step(tmp_path / "run") == len(losses(tmp_path / "run")) == 2, "earlier progress must be kept"


@pytest.mark.parametrize("signal_at", [0, 2, 6])
def test_a_signal_in_a_validation_breaks_it_off_and_the_next_start_makes_up_for_it(
    config: Path, untouched: dict[int, dict[str, float]], signal_at: int
) -> None:
    """Signals before the first step, after a saved step, and after the last step."""
    run = config.parent / f"stopped_at_{signal_at}"
    outcomes = run_on_ranks(_validate, str(config), str(run), signal_at)
    assert outcomes == [Outcome(EXIT_PREEMPTED, None, signal_at)] * 2
    assert last_saved_step(run) == signal_at
    validated = {step for step, numbers in numbers_by_step(run).items() if any(map(_is_score, numbers))}
    assert validated == set(range(0, signal_at, 2))
    outcomes = run_on_ranks(_validate, str(config), str(run), -1)
    assert outcomes == [Outcome(EXIT_OK, None, 6)] * 2
    assert json.dumps(numbers_by_step(run), sort_keys=True) == json.dumps(untouched, sort_keys=True)


@pytest.fixture(scope="module")
def untouched(config: Path) -> dict[int, dict[str, float]]:
    """Metrics of a run with validation and without a stop."""
    run = config.parent / "untouched"
    assert run_on_ranks(_validate, str(config), str(run), -1) == [Outcome(EXIT_OK, None, 6)] * 2
    numbers = numbers_by_step(run)
    assert [step for step in sorted(numbers) if any(map(_is_score, numbers[step]))] == [0, 2, 4, 6]
    return numbers


def _is_score(name: str) -> bool:
    return name.endswith("/nll_compressed")
