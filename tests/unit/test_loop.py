"""The loop's ends: when it stops early, what it has told the other ranks by then, and what is left to the hooks."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from arc_ds.errors import DataError
from arc_ds.training import loop
from arc_ds.training.exit_codes import EXIT_OK, EXIT_PREEMPTED
from arc_ds.training.loop import LookAhead, fit
from arc_ds.training.step import Agreed, Notice

STEPS = 4


class _Run:
    """Stands in for `Run`: batches of step numbers, the one of `torn_step` cannot be made."""

    def __init__(self, torn_step: int = STEPS) -> None:
        self.step, self._torn_step = 0, torn_step
        self.config = SimpleNamespace(steps=STEPS, loss=SimpleNamespace(normalize="global"))
        self.engine = self.schedule = self.tasks = None
        self.decoders = (None,)

    def batches(self) -> Iterator[Any]:
        for step in range(self.config.steps):
            if step == self._torn_step:
                raise DataError("torn")
            yield SimpleNamespace(step=step, decoder_idxs=(0,))

    def count_step(self, *, applied: bool) -> None:
        self.step += 1


class _Hook:
    """Notes what it is called for; asks for a stop after a step."""

    def __init__(self, stop: SimpleNamespace, stop_after: int) -> None:
        self.calls: list[str] = []
        self._stop, self._stop_after = stop, stop_after

    def on_start(self, run: Any) -> None:
        self.calls.append("start")

    def after_step(self, run: Any, batch: Any, result: Any) -> None:
        assert batch.step + 1 == run.step
        self.calls.append(str(run.step))
        if run.step == self._stop_after:
            self._stop.received = "SIGTERM"

    def on_end(self, run: Any) -> None:
        self.calls.append("end")


def _fit(run: _Run, monkeypatch: pytest.MonkeyPatch, stop_after: int = 0) -> tuple[int | str, list[str], list[Notice]]:
    """The exit code or error, the calls of a hook, and what each step told the other ranks."""
    told: list[Notice] = []

    def train_step(*_: Any, notice: Notice, **__: Any) -> Any:
        told.append(notice)
        return SimpleNamespace(
            applied=True, agreed=Agreed(stop=notice.stop, failed=notice.failed, splits=(notice.num_splits,))
        )

    monkeypatch.setattr(loop, "train_step", train_step)
    stop = SimpleNamespace(received=None)
    hook = _Hook(stop, stop_after)
    try:
        end: int | str = fit(run, [hook], stop)  # type: ignore[arg-type]
    except DataError as error:
        end = str(error)
    return end, hook.calls, told


def test_a_run_that_nothing_stops_does_every_step_once(monkeypatch: pytest.MonkeyPatch) -> None:
    end, calls, told = _fit(_Run(), monkeypatch)
    assert (end, calls) == (EXIT_OK, ["start", "1", "2", "3", "4", "end"])
    assert told == [Notice()] * STEPS


def test_a_stop_is_told_with_the_next_step_and_obeyed_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    end, calls, told = _fit(_Run(), monkeypatch, stop_after=1)
    assert (end, calls) == (EXIT_PREEMPTED, ["start", "1", "2", "end"])
    assert told == [Notice(), Notice(stop=True)]


def test_a_stop_that_comes_with_the_last_step_leaves_a_finished_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _fit(_Run(), monkeypatch, stop_after=STEPS - 1)[0] == EXIT_OK
    assert _fit(_Run(), monkeypatch, stop_after=STEPS)[0] == EXIT_OK


def test_a_batch_that_cannot_be_made_is_told_one_step_before(monkeypatch: pytest.MonkeyPatch) -> None:
    end, calls, told = _fit(_Run(torn_step=2), monkeypatch)
    assert (end, calls) == ("torn", ["start", "1", "2", "end"])
    assert told == [Notice(), Notice(failed=True)]


def test_a_first_batch_that_cannot_be_made_ends_the_run_before_any_step(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _fit(_Run(torn_step=0), monkeypatch) == ("torn", ["start"], [])


def test_an_error_of_our_own_code_is_not_held_back() -> None:
    def batches() -> Iterator[int]:
        yield 1
        raise RuntimeError("a worker died")

    with pytest.raises(RuntimeError, match="a worker died"):
        list(LookAhead(batches()))


def test_what_has_no_batches_is_at_its_end() -> None:
    ahead = LookAhead(iter(()))
    assert list(ahead) == [] and ahead.error is None
