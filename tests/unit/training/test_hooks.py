"""Hooks at the start and end of a run: validation and saving happen exactly once per due step."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from arc_ds.batch.packing import pack
from arc_ds.config.schema import EncoderConfig
from arc_ds.data.loading.micro_batches import MicroBatchLimits
from arc_ds.data.loading.step_batch import MicroBatch, StepBatch
from arc_ds.data.tasks import TaskCounts
from arc_ds.model.decoder import Decoder
from arc_ds.model.frozen_decoder import TransformersSizes
from arc_ds.model.spec import CompressorSpec
from arc_ds.planning.flops import count_flops
from arc_ds.training import hooks, meters
from arc_ds.training.collectives import ENCODER, CollectiveCounter
from arc_ds.training.engine import PlacedDecoder
from arc_ds.training.hooks import VALIDATION_KEY, CheckpointHook, MetricsHook, ValidationHook
from arc_ds.training.memory import EngineMemory
from arc_ds.training.run import DataClock, Run
from arc_ds.training.step import AllNotices, StepResult
from arc_ds.training.validate import ValidationStopped
from tests.helpers.tiny_compressor import TINY, sample

STEPS = 10
NOTICES = AllNotices(stop=False, failed=False, splits=(0,))


# Of the encoder and of the decoder, in GiB.
MEMORY = [
    EngineMemory(*(round(gib * hooks.GIB) for gib in gibs)) for gibs in ((1.0, 0.25, 2.0, 6.0), (3.0, 0.5, 0.0, 0.0))
]

with torch.device("meta"):
    DECODER = Decoder(TINY)
SPEC = CompressorSpec(backbone=TINY, num_layers=3, decoder_sizes=(TINY.hidden_size,))


class _Validator:
    """Fake `Validator`: three batches, no scores."""

    tasks, num_samples, num_forwards = ("continuation",), 24, 3
    num_samples_of_tasks: tuple[dict[str, int], ...] = ({}, {})

    def run(self, engine: Any, decoders: Any, before_forward: Any) -> list[dict[str, Any]]:
        for _ in range(self.num_forwards):
            if before_forward():
                raise ValidationStopped
        return [{}, {}]


def _run(step: int, **changes: Any) -> Run:
    fields: dict[str, Any] = {
        "folder": Path("run"), "device": torch.device("cpu"), "spec": SPEC, "inputs": None,
        "engine": SimpleNamespace(module=None, empty_partition_cache=lambda: None),
        "ds_config": {}, "decoders": (PlacedDecoder(module=DECODER),) * 2, "ports": None,
        "decoder_names": ("wide", "other"), "data": None,
        "num_workers": 0,
        "schedule": SimpleNamespace(total_steps=STEPS), "normalize": "global", "validator": _Validator(), "step": step,
    }  # fmt: skip
    return Run(**{**fields, **changes})


def _result(step: int, **changes: Any) -> StepResult:
    fields: dict[str, Any] = {
        "step": step, "decoder_idxs": (0,), "nll_DK": torch.ones(1, 1), "labels_DK": torch.ones(1, 1),
        "grad_norm": torch.ones(()), "applied": True, "learning_rates": {}, "notices": NOTICES,
    }  # fmt: skip
    return StepResult(**{**fields, **changes})


class _Validation(ValidationHook):
    """Records the steps that it logs, and how often it resets the watchdog."""

    def __init__(self, every: int = 5, done: int | None = None, is_stopped: Any = lambda: False) -> None:
        self.steps: list[int] = []
        self.num_alive = 0
        super().__init__(log=self._note, every=every, done=done, alive=self._alive_once, is_stopped=is_stopped)

    def _note(self, step: int, metrics: dict[str, float]) -> None:
        assert VALIDATION_KEY in metrics
        self.steps.append(step)

    def _alive_once(self) -> None:
        self.num_alive += 1

    def after(self, run: Run, **changes: Any) -> None:
        self.after_step(run, BATCH, _result(run.step, **changes))


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
    hook = _Validation(every, done)
    hook.on_start(_run(start))
    for step in range(start + 1, end + 1):
        hook.after(_run(step))
    hook.on_end(_run(end))
    assert hook.steps == expected


def test_a_run_that_is_asked_to_stop_saves_first() -> None:
    hook = _Validation()
    hook.after(_run(5), notices=dataclasses.replace(NOTICES, stop=True))
    hook.on_end(_run(5))
    assert hook.steps == []
    hook.after(_run(5))
    assert hook.steps == [5]


@pytest.mark.parametrize("end", [5, STEPS])
def test_a_stop_breaks_a_validation_off(end: int) -> None:
    hook, run = _Validation(is_stopped=iter([False, True]).__next__), _run(end)
    hook.after(run)
    hook.on_end(run)
    assert run.is_stopping and hook.steps == []


def test_a_long_validation_says_what_it_does_and_is_no_stall(caplog: pytest.LogCaptureFixture) -> None:
    hook = _Validation()
    with caplog.at_level("INFO"):
        hook.after(_run(5))
    assert hook.num_alive == 3
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

    @contextmanager
    def around(run: Run, work: str) -> Iterator[None]:
        assert work == hooks.SAVE
        flushed.append(run.step)
        yield

    hook = CheckpointHook(
        save=save, finish=lambda: finished.append(run.step), has_failed=lambda: run.step == 7,
        request_stop=lambda: stops.append(run.step), every=every,
    )  # fmt: skip
    finished: list[int] = []
    stops: list[int] = []
    run = _run(start, around_pauses=[around])
    hook.on_start(run)
    for step in range(start + 1, end + 1):
        run.step = step
        hook.after_step(run, BATCH, _result(step))
    assert stops == [7] * (start < 7 <= end) and finished == []
    hook.on_end(run)
    assert saved == expected and finished == [end]


def _reduced_over(*loads: float) -> Any:
    """Fake collective: rank r has `loads[r]` times the values of this rank."""

    def reduced(own: Sequence[float], _device: torch.device, how: Any) -> list[float]:
        factor = sum(loads) if how == torch.distributed.ReduceOp.SUM else max(loads)
        return [factor * value for value in own]

    return reduced


def _two_steps(
    monkeypatch: pytest.MonkeyPatch,
    *,
    every: int = 2,
    peak: float | None = None,
    loads: Any = (1, 1),
    decoder: Any = DECODER,
    leaked: Sequence[str] = (),
    times: Sequence[float] = (0.0, 4.0, 4.0, 4.0, 9.0, 13.0, 13.0),
    counter: CollectiveCounter | None = None,
) -> tuple[Run, dict[int, dict[str, float]]]:
    """Two steps on two ranks. They took 4 s, and this rank waited for 1 s. Returns the logged metrics by step."""
    monkeypatch.setattr(meters, "_reduced", _reduced_over(*loads))
    monkeypatch.setattr(hooks.dist, "world_size", lambda: 2)
    monkeypatch.setattr(hooks, "time", SimpleNamespace(perf_counter=iter(times).__next__))
    monkeypatch.setattr(hooks, "engine_memory", lambda module, *_: MEMORY[module is decoder])
    monkeypatch.setattr(hooks, "leaked_parameters", lambda _: leaked)
    monkeypatch.setattr(hooks, "peak_memory_bytes", lambda _: hooks.GIB)
    data = SimpleNamespace(limits=MicroBatchLimits(max_encoder_tokens=36), tasks=("continuation",))
    run = _run(
        0, data=data, decoders=(PlacedDecoder(module=decoder),), decoder_names=("a",),
        data_counts=Counter(cut_answers=5), clock=DataClock(waited_s=1.0, remade=1),
    )  # fmt: skip
    logged: dict[int, dict[str, float]] = {}
    encoder = EncoderConfig(backbone="", trained_layers=1, train_embeddings=False)
    counter = counter or CollectiveCounter()
    hook = MetricsHook(
        log=lambda step, metrics: logged.setdefault(step, {}).update(metrics),
        every=every,
        encoder=encoder,
        peak_flops=peak,
        counter=counter,
    )
    counter.add("broadcast", 2, 7 << 20)  # while the run starts
    hook.on_start(run)
    for step in (1, 2):
        run.step = step
        counter.add("all_gather", 4, 3 << 20)
        counter.add("all_gather", 2, 1 << 20)
        counter.add("all_reduce", 4, 1 << 20)
        counter.engine = "a"
        counter.add("all_gather", 2, 5 << 20)
        counter.add("all_gather", 1, 9 << 20)  # a group of one sends nothing
        counter.engine = ENCODER
        hook.after_step(run, BATCH, _result(step - 1))
    return run, logged


def _speed_of_two_steps(monkeypatch: pytest.MonkeyPatch, **options: Any) -> dict[str, float]:
    return _two_steps(monkeypatch, **options)[1][2]


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


def test_mfu_is_the_share_of_all_devices_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = EncoderConfig(backbone="", trained_layers=1, train_embeddings=False).trained_parts
    a_step = sum(count_flops(part.batch, SPEC, TINY, trained).total for part in BATCH.micro_batches)
    found = _speed_of_two_steps(monkeypatch, peak=1e6)
    assert found["train/mfu"] == pytest.approx(2 * 2 * a_step / (4.0 * 2 * 1e6))
    assert found["speed/encoder_tokens_per_s"] == 2 * 2 * 18 / 4.0
    assert "train/mfu" not in _speed_of_two_steps(monkeypatch), "there is no peak to compare with"


def test_estimated_operations_balance_ranks_but_make_no_mfu(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = TransformersSizes(
        model_type="gpt_neox", hidden_size=TINY.hidden_size, vocab_size=TINY.vocab_size, num_parameters=9000,
        layer_parameters=7000, attention_size=48, max_positions=None, cache_row_values=96, config_digest="",
    )  # fmt: skip
    decoder = SimpleNamespace(implementation="transformers", sizes=sizes)
    found = _speed_of_two_steps(monkeypatch, peak=1e6, decoder=decoder, loads=(1, 3))
    assert "train/mfu" not in found and found["data/balance"] == pytest.approx(3 / 2)


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


def test_a_pause_logs_pending_metrics_and_its_own_collectives_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A save or a validation may be the last thing that a run does, and steps in the log must never decrease."""
    counter = CollectiveCounter()
    run, steps = _two_steps(monkeypatch, every=10, counter=counter)
    assert steps == {}
    with run.pause():
        assert set(steps) == {1, 2}
        counter.add("all_gather", 2, 1 << 20)
    assert not counter.read()


def test_balance_waits_and_memory_are_those_of_the_slowest_or_largest_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _speed_of_two_steps(monkeypatch)["data/balance"] == pytest.approx(1.0)
    found = _speed_of_two_steps(monkeypatch, loads=(1, 3))
    assert found["data/balance"] == pytest.approx(3 / 2) and found["speed/data_wait_share"] == pytest.approx(3 / 4)
    assert {key: value for key, value in found.items() if key.startswith("memory/")} == pytest.approx(
        {
            "memory/peak_gib": 3 * 1.0,
            "memory/peak_rank": 0.0,
            "memory/leaked_parameters": 0.0,
            "memory/parameters_gib/encoder": 3 * 1.0,
            "memory/gathered_gib/encoder": 3 * 0.25,
            "memory/gradients_gib/encoder": 3 * 2.0,
            "memory/optimizer_gib/encoder": 3 * 6.0,
            "memory/parameters_gib/a": 3 * 3.0,
            "memory/gathered_gib/a": 3 * 0.5,
        }
    )


def test_network_figures_are_means_of_the_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collectives of the start, of pauses and of the reports themselves do not count."""
    found = _speed_of_two_steps(monkeypatch)
    sent = 3 * 3 / 4 + 1 * 1 / 2 + 5 * 1 / 2 + 2 * 1 * 3 / 4
    assert {key: value for key, value in found.items() if key.startswith("network/")} == pytest.approx(
        {
            "network/all_gather_mib/encoder": 4.0,
            "network/all_gather_mib/a": 5.0,
            "network/all_reduce_mib/encoder": 1.0,
            "network/sent_mib": sent,
            "network/sent_mib_per_s": 2 * sent / 4.0,
        }
    )


def test_a_pause_counts_in_the_next_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps take 4 s and wait for data for 1 s, a save takes 5 s, and two more steps take 4 s."""
    run, steps = _two_steps(monkeypatch)
    hook: Any = run.around_pauses[0].__self__  # type: ignore[attr-defined]
    before = steps[2]
    assert before["speed/save_share"] == before["speed/validation_share"] == 0.0
    assert before["speed/data_wait_s"] == 0.5 and before["speed/step_s"] == 2.0
    with run.pause(hooks.SAVE):
        pass
    assert steps[2]["checkpoint/seconds"] == 5.0
    for step in (3, 4):
        run.step = step
        hook.after_step(run, BATCH, _result(step - 1))
    after = steps[4]
    assert after["speed/step_s"] == 2.0 and after["speed/save_share"] == 5 / 9 and "checkpoint/seconds" not in after


def test_leaks_are_counted_and_named_once_for_each_engine(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _, steps = _two_steps(monkeypatch, every=1, leaked=["layers.0.wq", "norm"], times=(0, 2, 2, 4, 4))
    assert steps[1]["memory/leaked_parameters"] == steps[2]["memory/leaked_parameters"] == 2 * 2
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    for warning, engine in zip(warnings, (ENCODER, "a"), strict=True):
        assert f"2 parameters of {engine} are still gathered" in warning and "layers.0.wq, norm." in warning


def test_losses_are_told_by_decoder_and_task_where_there_were_labels() -> None:
    data = SimpleNamespace(tasks=("reconstruction", "continuation"))
    result = _result(
        0,
        decoder_idxs=(0, 2),
        nll_DK=torch.tensor([[6.0, 0.0], [4.0, torch.inf]]),
        labels_DK=torch.tensor([[3, 0], [1, 4]]),
    )
    metrics = hooks._step_metrics(_run(0, data=data, decoder_names=("wide", "other", "third")), result)
    assert {key: value for key, value in metrics.items() if key.startswith("train/loss")} == {
        "train/loss": float("inf"),
        "train/loss/wide/reconstruction": 2.0,
        "train/loss/third/reconstruction": 4.0,
        "train/loss/third/continuation": float("inf"),
    }
