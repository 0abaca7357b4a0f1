"""The end of the loop: early stops, notices to the other ranks, and calls of the hooks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from arc_ds.errors import DataError
from arc_ds.launch.exit_codes import EXIT_OK, EXIT_PREEMPTED
from arc_ds.launch.signals import StopRequest
from arc_ds.training import loop
from arc_ds.training.hooks import Hook
from arc_ds.training.loop import fit
from arc_ds.training.run import DataClock, Run
from arc_ds.training.step import AllNotices, Notice

STEPS = 4


class _Batch(NamedTuple):
    """Fake `StepBatch`."""

    step: int
    num_splits: int = 1


class _Loader:
    """Fake `BatchLoader`: its batches are step numbers, and the batch of `torn_step` raises `error`."""

    def __init__(self, torn_step: int = STEPS, error: Exception | None = None, num_splits: int = 1) -> None:
        self._torn_step, self._error, self._num_splits = torn_step, error or DataError("torn"), num_splits
        self._batches, self.stop, self.is_open = self._make_batches(), StopRequest(), False

    def __enter__(self) -> _Loader:
        self.is_open = True
        return self

    def __exit__(self, *_: object) -> None:
        self.is_open = False

    def __next__(self) -> _Batch:
        return next(self._batches)

    def _make_batches(self) -> Iterator[_Batch]:
        for step in range(STEPS):
            if step == self._torn_step:
                raise self._error
            if self.stop.is_set():
                return
            yield _Batch(step, self._num_splits)

    def repack(self, batch: _Batch, num_splits: int) -> _Batch:
        assert num_splits > batch.num_splits
        return _Batch(batch.step, num_splits)


class _Run(Run):
    """A run with a fake loader."""

    def __init__(self, torn_step: int = STEPS, **of_loader: Any) -> None:
        self.step, self.skipped_steps, self.is_stopping = 0, 0, False
        self.engine = self.normalize = self.data = None  # type: ignore[assignment]
        self.data, self.schedule = SimpleNamespace(tasks=()), SimpleNamespace(total_steps=STEPS)  # type: ignore[assignment]
        self.decoders, self.clock = (), DataClock()
        self.loader = _Loader(torn_step, **of_loader)

    def batches(self, stop: StopRequest) -> Any:
        self.loader.stop = stop
        return self.loader


class _Hook(Hook):
    """Records its calls. Requests a stop after a step, or sets `is_stopping` as if all ranks had agreed on it."""

    def __init__(self, stop: StopRequest, stop_after: int, agrees_at: str) -> None:
        self.calls: list[str] = []
        self._stop, self._stop_after, self._agrees_at = stop, stop_after, agrees_at

    def on_start(self, run: Any) -> None:
        self._note(run, "start")

    def after_step(self, run: Any, batch: Any, result: Any) -> None:
        assert batch.step + 1 == run.step
        self._note(run, str(run.step))
        if run.step == self._stop_after:
            self._stop.set()

    def on_end(self, run: Any) -> None:
        self._note(run, "end")

    def _note(self, run: Any, call: str) -> None:
        self.calls.append(call)
        run.is_stopping |= call == self._agrees_at


class _Fitted(NamedTuple):
    """Outcome of a run: exit code or error, calls of a hook, notice of each step, and batches."""

    end: int | str
    calls: list[str]
    told: list[Notice]
    batches: list[_Batch]


def _fit(
    run: _Run,
    monkeypatch: pytest.MonkeyPatch,
    *,
    stop: StopRequest | None = None,
    stop_after: int = 0,
    agrees_at: str = "",
    other: Sequence[int] = (1,) * (STEPS + 1),
) -> _Fitted:
    """Run `fit` with a fake step. other: `num_splits` of another rank in each step; 0 if that rank has no batch."""
    told: list[Notice] = []
    batches: list[_Batch] = []

    def train_step(_engine: Any, _decoders: Any, batch: _Batch, *, notice: Notice, **__: Any) -> Any:
        told.append(notice)
        batches.append(batch)
        assert run.loader.is_open
        splits = (notice.num_splits, other[batch.step + 1] if notice.num_splits else 0)
        return SimpleNamespace(applied=True, notices=AllNotices(stop=notice.stop, failed=notice.failed, splits=splits))

    monkeypatch.setattr(loop, "train_step", train_step)
    monkeypatch.setattr(loop.dist, "gather_objects", lambda own: [own, other[0]] if isinstance(own, int) else [own])
    stop = stop or StopRequest()
    hook = _Hook(stop, stop_after, agrees_at)
    try:
        end: int | str = fit(run, [hook], stop)
    except DataError as error:
        end = str(error)
    assert not run.loader.is_open
    return _Fitted(end, hook.calls, told, batches)


NEXT, LAST, STOP, FAILED = Notice(num_splits=1), Notice(), Notice(stop=True), Notice(failed=True)


@pytest.mark.parametrize(
    ("torn_step", "stop_after", "end", "steps", "told"),
    [
        pytest.param(STEPS, 0, EXIT_OK, "1234", [NEXT, NEXT, NEXT, LAST], id="nothing stops it"),
        pytest.param(STEPS, 1, EXIT_PREEMPTED, "12", [NEXT, STOP], id="a stop, told with the next step"),
        pytest.param(STEPS, 3, EXIT_OK, "1234", [NEXT, NEXT, NEXT, STOP], id="a stop told with the last step"),
        pytest.param(STEPS, 4, EXIT_OK, "1234", [NEXT, NEXT, NEXT, LAST], id="a stop after the last step"),
        pytest.param(2, 0, "torn", "12", [NEXT, FAILED], id="a batch that cannot be made, told one step before"),
    ],
)
def test_the_end_is_told_with_a_step_and_obeyed_after_it(
    torn_step: int,
    stop_after: int,
    end: int | str,
    steps: str,
    told: list[Notice],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fitted = _fit(_Run(torn_step), monkeypatch, stop_after=stop_after)
    assert fitted == (end, ["start", *steps, "end"], told, [_Batch(step) for step in range(len(steps))])


@pytest.mark.parametrize("other", [0, 1])
def test_a_stop_before_the_first_batch_ends_the_run_before_any_step(
    other: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stop arrives on this rank, which stops waiting, or on another rank, which then has no batch."""
    stop = StopRequest()
    if other:
        stop.set()
    found = _fit(_Run(), monkeypatch, stop=stop, other=(other,) * (STEPS + 1))
    assert found == (EXIT_PREEMPTED, ["start", "end"], [], [])


@pytest.mark.parametrize(
    ("agrees_at", "calls"),
    [
        ("start", ["start", "end"]),
        ("2", ["start", "1", "2", "end"]),
        (str(STEPS), ["start", "1", "2", "3", "4", "end"]),
        ("end", ["start", "1", "2", "3", "4", "end"]),
    ],
)
def test_a_stop_that_ranks_agree_on_outside_a_step_is_obeyed_at_once(
    agrees_at: str, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks agree during a validation; if it was the last one, it is still pending."""
    found = _fit(_Run(), monkeypatch, agrees_at=agrees_at)
    assert (found.end, found.calls) == (EXIT_PREEMPTED, calls)


def test_a_first_batch_that_cannot_be_made_ends_the_run_before_any_step(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _fit(_Run(torn_step=0), monkeypatch) == ("torn", ["start"], [], [])


def test_a_batch_is_made_again_where_another_rank_needs_more_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks exchange it one step ahead, and before the first step separately. Each rank announces its own number."""
    run = _Run()
    found = _fit(run, monkeypatch, other=(3, 1, 2, 1, 1))
    assert found.batches == [_Batch(0, 3), _Batch(1, 1), _Batch(2, 2), _Batch(3, 1)]
    assert [notice.num_splits for notice in found.told] == [1, 1, 1, 0]
    waited_s, remade = run.clock.read()
    assert waited_s > 0 and remade == 2


def test_a_rank_that_needs_the_most_makes_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    run = _Run(num_splits=2)
    assert _fit(run, monkeypatch, other=(1, 2, 1, 1, 1)).batches == [_Batch(step, 2) for step in range(STEPS)]


def test_an_error_of_our_own_code_is_not_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        _fit(_Run(2, error=RuntimeError("a bug")), monkeypatch)


def test_hooks_are_called_by_priority_whatever_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Named(_Hook):
        def __init__(self, name: str, priority: int) -> None:
            super().__init__(StopRequest(), 0, "")
            self.name, self.priority = name, priority

        def _note(self, run: Any, call: str) -> None:
            calls.append(f"{self.name} {call}")

    last = SimpleNamespace(applied=True, notices=AllNotices(stop=True, failed=False, splits=(0,)))
    monkeypatch.setattr(loop, "train_step", lambda *_, **__: last)
    monkeypatch.setattr(loop.dist, "gather_objects", lambda own: [own])
    fit(_Run(), [Named("late", 5), Named("early", 1)], StopRequest())
    assert calls[:4] == ["early start", "late start", "early 1", "late 1"]
