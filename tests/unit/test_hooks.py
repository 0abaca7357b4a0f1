"""Hooks of the loop that are called around a run's end and start: what must happen once happens once."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from arc_ds.data.packing import pack
from arc_ds.data.step_batch import MicroBatch, StepBatch
from arc_ds.model.spec import CompressorSpec
from arc_ds.training import hooks
from arc_ds.training.flops import count_flops
from arc_ds.training.hooks import VALIDATION_KEY, CheckpointHook, MetricsHook, ValidationHook
from arc_ds.training.run import DataClock
from arc_ds.training.step import Agreed, StepResult
from tests.helpers.tiny_compressor import TINY, sample

STEPS = 10
AGREED = Agreed(stop=False, failed=False, splits=(0,))


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
        hook.after_step(_run(step), None, _result(step))  # type: ignore[arg-type]
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
        pytest.param(4, 4, 8, STEPS, [8, 10], id="what a stop left out is made up for"),
        pytest.param(4, 8, 8, STEPS, [10], id="what was validated before the stop is not repeated"),
        pytest.param(0, 10, STEPS, STEPS, [], id="a finished run started again has been validated"),
        pytest.param(0, None, STEPS, STEPS, [10], id="killed between the last checkpoint and the last validation"),
    ],
)
def test_validation_comes_once_a_step(every: int, done: int | None, start: int, end: int, expected: list[int]) -> None:
    assert _validated_steps(every=every, done=done, start=start, end=end) == expected


def test_a_run_that_is_asked_to_stop_saves_first() -> None:
    logged: list[int] = []
    hook = ValidationHook(lambda step, _: logged.append(step), _Metrics(), every=5)  # type: ignore[arg-type]
    asked = dataclasses.replace(_result(5), agreed=dataclasses.replace(AGREED, stop=True))
    hook.after_step(_run(5), None, asked)  # type: ignore[arg-type]
    hook.on_end(_run(5))
    assert logged == []
    hook.after_step(_run(5), None, _result(5))  # type: ignore[arg-type]
    assert logged == [5]


def test_a_long_validation_says_what_it_does_and_is_no_stall(caplog: pytest.LogCaptureFixture) -> None:
    alive: list[None] = []
    hook = ValidationHook(lambda *_: None, _Metrics(), every=5, alive=lambda: alive.append(None))  # type: ignore[arg-type]
    with caplog.at_level("INFO"):
        hook.after_step(_run(5), None, _result(5))  # type: ignore[arg-type]
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
        hook.after_step(_run(step), None, _result(step))  # type: ignore[arg-type]
    hook.on_end(_run(end))
    assert saved == expected


SPEC = CompressorSpec(backbone=TINY, num_layers=3, decoder_sizes=(TINY.hidden_size,))


def _speed_of_two_steps(monkeypatch: pytest.MonkeyPatch, *, peak: float | None, precision: str) -> dict[str, float]:
    """What `MetricsHook` logs after two steps of a batch, of which each rank of two has done one half in 4 s."""
    monkeypatch.setattr(hooks, "peak_bf16_flops", lambda _device: peak)
    monkeypatch.setattr(hooks, "_summed", lambda own, _device: (2 * own).tolist())
    monkeypatch.setattr(hooks.dist, "world_size", lambda: 2)
    monkeypatch.setattr(hooks, "time", SimpleNamespace(perf_counter=iter([0.0, 4.0, 4.0]).__next__))
    encoder = SimpleNamespace(trained_layers=1, train_embeddings=False)
    run: Any = SimpleNamespace(
        step=0, config=SimpleNamespace(steps=9, log_every=2, precision=precision, encoder=encoder), spec=SPEC,
        device=torch.device("cpu"), decoders=(SimpleNamespace(module=SimpleNamespace(config=TINY)),),
        decoder_names=("a",), tasks=("continuation",), skipped_steps=0, clock=DataClock(),
    )  # fmt: skip
    logged: dict[str, float] = {}
    hook = MetricsHook(lambda _step, found: logged.update(found), show_progress=False)
    hook.on_start(run)
    for step in (1, 2):
        run.step = step
        hook.after_step(run, BATCH, _result(step - 1))
    return logged


BATCH = StepBatch(
    step=0,
    decoder_idxs=(0,),
    micro_batches=tuple(
        MicroBatch(decoder_idx=0, batch=pack([sample(3, -9, 5, seed=seed)], SPEC.packing), part_idx=seed)
        for seed in (0, 1)
    ),
)


def _result(step: int) -> StepResult:
    return StepResult(
        step=step, decoder_idxs=(0,), nll_DK=torch.ones(1, 1), labels_DK=torch.ones(1, 1), grad_norm=torch.ones(()),
        applied=True, learning_rates={}, agreed=AGREED,
    )  # fmt: skip


def test_mfu_is_the_share_of_all_devices_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    a_step = sum(
        count_flops(part.batch, SPEC, TINY, trained_layers=1, train_embeddings=False).total
        for part in BATCH.micro_batches
    )
    found = _speed_of_two_steps(monkeypatch, peak=1e6, precision="bf16")
    assert found["train/mfu"] == pytest.approx(2 * 2 * a_step / (4.0 * 2 * 1e6))
    assert found["speed/encoder_tokens_per_s"] == 2 * 2 * 18 / 4.0


@pytest.mark.parametrize(("peak", "precision"), [(None, "bf16"), (1e6, "fp32")])
def test_mfu_is_left_out_where_there_is_no_peak_to_compare_with(
    peak: float | None, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "train/mfu" not in _speed_of_two_steps(monkeypatch, peak=peak, precision=precision)
