"""Hooks at the start and end of a run: validation and saving happen exactly once per due step."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from arc_ds.batch.packing import pack
from arc_ds.data.loading.step_batch import MicroBatch, StepBatch
from arc_ds.data.tasks import TaskCounts
from arc_ds.model.spec import CompressorSpec
from arc_ds.planning.flops import count_flops
from arc_ds.training import hooks, meters
from arc_ds.training.hooks import VALIDATION_KEY, CheckpointHook, MetricsHook, ValidationHook
from arc_ds.training.run import DataWait, Pauses
from arc_ds.training.step import Agreed, StepResult
from arc_ds.training.validate import ValidationStopped
from tests.helpers.tiny_compressor import TINY, sample

STEPS = 10
AGREED = Agreed(stop=False, failed=False, splits=(0,))


class _Validator:
    """Fake `Validator`: three batches, no scores."""

    tasks, num_samples, num_forwards = ("continuation",), 24, 3

    def run(self, engine: Any, decoders: Any, on_forward: Any, is_stopped: Any) -> dict[str, Any]:
        for _ in range(self.num_forwards):
            if is_stopped():
                raise ValidationStopped
            on_forward()
        return {}


def _run(step: int) -> Any:
    return SimpleNamespace(
        step=step, config=SimpleNamespace(steps=STEPS), validator=_Validator(), engine=None, decoders=(),
        decoder_names=("wide", "other"), is_stopping=False, pauses=Pauses(),
    )  # fmt: skip


def _validated_steps(*, every: int, done: int | None, start: int, end: int) -> list[int]:
    """Steps after which the hook validates a run from `start` to `end`."""
    logged: list[tuple[int, dict[str, float]]] = []
    hook = ValidationHook(lambda step, found: logged.append((step, found)), every=every, done=done)  # type: ignore[arg-type]
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
    hook = ValidationHook(lambda step, _: logged.append(step), every=5)  # type: ignore[arg-type]
    asked = dataclasses.replace(_result(5), agreed=dataclasses.replace(AGREED, stop=True))
    hook.after_step(_run(5), None, asked)  # type: ignore[arg-type]
    hook.on_end(_run(5))
    assert logged == []
    hook.after_step(_run(5), None, _result(5))  # type: ignore[arg-type]
    assert logged == [5]


@pytest.mark.parametrize("end", [5, STEPS])
def test_a_stop_breaks_a_validation_off(end: int) -> None:
    logged: list[int] = []
    asked = iter([False, True])
    hook = ValidationHook(
        lambda step, _: logged.append(step), every=5, is_stopped=lambda: next(asked)  # type: ignore[arg-type]
    )  # fmt: skip
    run = _run(end)
    hook.after_step(run, None, _result(end))  # type: ignore[arg-type]
    hook.on_end(run)
    assert run.is_stopping and logged == []


def test_a_long_validation_says_what_it_does_and_is_no_stall(caplog: pytest.LogCaptureFixture) -> None:
    alive: list[None] = []
    hook = ValidationHook(lambda *_: None, every=5, alive=lambda: alive.append(None))  # type: ignore[arg-type]
    with caplog.at_level("INFO"):
        hook.after_step(_run(5), None, _result(5))  # type: ignore[arg-type]
    assert len(alive) == 3
    assert caplog.messages[0] == "step 5: validating 24 samples of continuation for wide, other"


@pytest.mark.parametrize(
    ("every", "start", "end", "expected"),
    [(5, 0, STEPS, [5, 10]), (4, 0, STEPS, [4, 8, 10]), (0, 0, STEPS, [10]), (4, 4, 6, [6]), (4, 10, 10, [])],
)
def test_each_step_is_saved_once_after_its_metrics(every: int, start: int, end: int, expected: list[int]) -> None:
    """A second save of the same step would be an error because checkpoints are never overwritten."""
    saved: list[int] = []
    flushed: list[int] = []

    def save(run: Any) -> None:
        assert flushed[-1] == run.step, "metrics of a step must be logged before the step is saved"
        saved.append(run.step)

    def run_at(step: int) -> Any:
        run = _run(step)
        run.pauses.add(lambda run: flushed.append(run.step), lambda: None)
        return run

    hook = CheckpointHook(save, every=every)
    hook.on_start(run_at(start))
    for step in range(start + 1, end + 1):
        hook.after_step(run_at(step), None, _result(step))  # type: ignore[arg-type]
    hook.on_end(run_at(end))
    assert saved == expected


SPEC = CompressorSpec(backbone=TINY, num_layers=3, decoder_sizes=(TINY.hidden_size,))


def _reduced_over(*loads: float) -> Any:
    """Fake collective: rank r has `loads[r]` times the values of this rank."""

    def reduced(own: Sequence[float], _device: torch.device, how: Any) -> list[float]:
        factor = sum(loads) if how == torch.distributed.ReduceOp.SUM else max(loads)
        return [factor * value for value in own]

    return reduced


def _speed_of_two_steps(
    monkeypatch: pytest.MonkeyPatch, *, peak: float | None = None, precision: str = "fp32", loads: Any = (1, 1)
) -> dict[str, float]:
    """Metrics that `MetricsHook` logs after two steps on two ranks. They took 4 s, and this rank waited for 1 s."""
    monkeypatch.setattr(hooks, "peak_bf16_flops", lambda _device: peak)
    monkeypatch.setattr(meters, "_reduced", _reduced_over(*loads))
    monkeypatch.setattr(hooks.dist, "world_size", lambda: 2)
    monkeypatch.setattr(hooks, "time", SimpleNamespace(perf_counter=iter([0.0, 4.0, 4.0]).__next__))
    encoder = SimpleNamespace(trained_layers=1, train_embeddings=False)
    data = SimpleNamespace(max_encoder_tokens=36, max_decoder_rows=None)
    run: Any = SimpleNamespace(
        step=0, config=SimpleNamespace(steps=9, log_every=2, precision=precision, encoder=encoder, data=data),
        spec=SPEC, device=torch.device("cpu"), decoders=(SimpleNamespace(module=SimpleNamespace(config=TINY)),),
        decoder_names=("a",), tasks=("continuation",), skipped_steps=0, data_counts=Counter(cut_answers=5),
        clock=SimpleNamespace(read=lambda: DataWait(waited_s=1.0, remade=1)), pauses=Pauses(),
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
    skipped=3,
    over_limit=2,
    counts=TaskCounts(cut_answers=1),
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


def test_metrics_tell_how_full_micro_batches_are_and_what_was_lost_since_the_run_began(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = _speed_of_two_steps(monkeypatch)
    rows = sum(micro.batch.num_decoder_rows for micro in BATCH.micro_batches) / 2
    assert found["data/micro_batches"] == 2
    assert found["data/encoder_tokens_per_micro_batch"] == 9 and found["data/decoder_rows_per_micro_batch"] == rows
    assert found["data/encoder_tokens_limit_use"] == 9 / 36 and "data/decoder_rows_limit_use" not in found
    assert found["data/skipped"] == 2 * 2 * 3 and found["data/remade"] == 2 and found["data/degraded"] == 0
    assert found["data/over_limit"] == 2 * 2 * 2
    assert found["data/cut_answers"] == 5 + 2 * 2 * 1, "counts continue from the resumed run"


def test_balance_is_the_slowest_rank_over_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _speed_of_two_steps(monkeypatch)["data/balance"] == pytest.approx(1.0)
    assert _speed_of_two_steps(monkeypatch, loads=(1, 3))["data/balance"] == pytest.approx(3 / 2)


def test_a_rank_that_waits_for_data_makes_all_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _speed_of_two_steps(monkeypatch, loads=(1, 3))["speed/data_wait_share"] == pytest.approx(3 / 4)


def test_losses_are_told_by_decoder_and_task_where_there_were_labels() -> None:
    run: Any = SimpleNamespace(decoder_names=("wide", "other", "third"), tasks=("reconstruction", "continuation"))
    result = dataclasses.replace(
        _result(0),
        decoder_idxs=(0, 2),
        nll_DK=torch.tensor([[6.0, 0.0], [4.0, torch.inf]]),
        labels_DK=torch.tensor([[3, 0], [1, 4]]),
    )
    metrics = hooks._step_metrics(run, result)
    assert {key: value for key, value in metrics.items() if key.startswith("train/loss")} == {
        "train/loss": float("inf"),
        "train/loss/wide/reconstruction": 2.0,
        "train/loss/third/reconstruction": 4.0,
        "train/loss/third/continuation": float("inf"),
    }
