"""Hooks of the loop that are called around a run's end and start: what must happen once happens once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from arc_ds.training.hooks import VALIDATION_KEY, CheckpointHook, ValidationHook

STEPS = 10


class _Metrics:
    """Stands in for `MetricsHook`: notes when it is asked to write what is pending."""

    def __init__(self) -> None:
        self.flushed = 0

    def flush(self, run: Any) -> None:
        self.flushed += 1

    def restart_clock(self) -> None:
        pass


class _Validator:
    """Stands in for `Validator`: three batches, no scores."""

    tasks, num_samples, num_forwards = ("continuation",), 24, 3

    def run(self, engine: Any, decoders: Any, on_forward: Any) -> dict[str, Any]:
        for _ in range(self.num_forwards):
            on_forward()
        return {}


def _run(step: int) -> Any:
    return SimpleNamespace(
        step=step, config=SimpleNamespace(steps=STEPS), validator=_Validator(), engine=None, decoders=(),
        decoder_names=("wide", "other"),
    )  # fmt: skip


def _validated_steps(*, every: int, done: int | None, start: int, end: int) -> list[int]:
    """The steps after which a hook validates a run that goes from `start` to `end`."""
    logged: list[tuple[int, dict[str, float]]] = []
    hook = ValidationHook(lambda step, found: logged.append((step, found)), _Metrics(), every=every, done=done)  # type: ignore[arg-type]
    hook.on_start(_run(start))
    for step in range(start + 1, end + 1):
        hook.after_step(_run(step), None, None)  # type: ignore[arg-type]
    hook.on_end(_run(end))
    assert all(VALIDATION_KEY in found for _, found in logged)
    return [step for step, _ in logged]


@pytest.mark.parametrize(
    ("every", "done", "start", "end", "expected"),
    [
        pytest.param(5, None, 0, STEPS, [0, 5, 10], id="once at the end, though the end is a multiple"),
        pytest.param(4, None, 0, STEPS, [0, 4, 8, 10], id="at the end, though it is no multiple"),
        pytest.param(0, None, 0, STEPS, [10], id="0 is only at the end"),
        pytest.param(4, 4, 6, STEPS, [8, 10], id="a resumed run does not begin with one"),
        pytest.param(4, 4, 6, 7, [], id="a stop is no end"),
        pytest.param(0, 10, STEPS, STEPS, [], id="a finished run started again has been validated"),
        pytest.param(0, None, STEPS, STEPS, [10], id="killed between the last checkpoint and the last validation"),
    ],
)
def test_validation_comes_once_a_step(every: int, done: int | None, start: int, end: int, expected: list[int]) -> None:
    assert _validated_steps(every=every, done=done, start=start, end=end) == expected


def test_a_long_validation_says_what_it_does_and_is_no_stall(caplog: pytest.LogCaptureFixture) -> None:
    alive: list[None] = []
    hook = ValidationHook(lambda *_: None, _Metrics(), every=5, alive=lambda: alive.append(None))  # type: ignore[arg-type]
    with caplog.at_level("INFO"):
        hook.after_step(_run(5), None, None)  # type: ignore[arg-type]
    assert len(alive) == 3
    assert caplog.messages[0] == "step 5: validating 24 samples of continuation for wide, other"


@pytest.mark.parametrize(
    ("every", "start", "end", "expected"),
    [(5, 0, STEPS, [5, 10]), (4, 0, STEPS, [4, 8, 10]), (0, 0, STEPS, [10]), (4, 4, 6, [6]), (4, 10, 10, [])],
)
def test_each_step_is_saved_once_after_its_metrics(every: int, start: int, end: int, expected: list[int]) -> None:
    """A second save of a step would be an error: nothing saved is overwritten."""
    saved, metrics = [], _Metrics()

    def save(run: Any) -> None:
        assert metrics.flushed == len(saved) + 1, "metrics of a saved step must stand in the log before it is saved"
        saved.append(run.step)

    hook = CheckpointHook(save, metrics, every=every)  # type: ignore[arg-type]
    hook.on_start(_run(start))
    for step in range(start + 1, end + 1):
        hook.after_step(_run(step), None, None)  # type: ignore[arg-type]
    hook.on_end(_run(end))
    assert saved == expected
