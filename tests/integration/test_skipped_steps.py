"""Steps with an infinite loss or a spike on one rank, in whole runs on two ranks: skipped by both and counted."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from arc_ds.batch.packing import PackedBatch
from arc_ds.config.load import load_config
from arc_ds.config.schema import RunConfig
from arc_ds.errors import NonFiniteError
from arc_ds.system import dist
from arc_ds.train import train
from arc_ds.training.build import build_run
from arc_ds.training.engine import PlacedDecoder
from arc_ds.training.hooks import Hook
from arc_ds.training.run import Run
from arc_ds.training.run_folder import RunFolder
from tests.helpers.distributed import run_on_ranks
from tests.helpers.tiny_run import losses, numbers_by_step, read_json

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SMALL = (
    "checkpoint.every=4",
    "validation.every=0",
    "data.validation=null",
    "data.num_workers=0",
    "tracking.mlflow=false",
)


class _Changed:
    """A decoder whose losses on rank 1 are changed. change: the losses of a step (from 0) as they shall be."""

    def __init__(self, decoder: PlacedDecoder, run: Run, change: Callable[[Tensor, int], Tensor]) -> None:
        self.module, self._decoder, self._run, self._change = decoder.module, decoder, run, change
        self.engine, self.placement = decoder.engine, decoder.placement

    def __call__(self, batch: PackedBatch, z_ZD: Tensor | None) -> Tensor:
        nll_L = self._decoder(batch, z_ZD)
        return self._change(nll_L, self._run.step) if dist.rank() == 1 else nll_L


def _build(config: str, overrides: tuple[str, ...], change: Callable[[Tensor, int], Tensor]) -> tuple[RunConfig, Run]:
    loaded = load_config(config, (*SMALL, *overrides))
    run = build_run(loaded, torch.device("cpu"))
    run.decoders = tuple(_Changed(decoder, run, change) for decoder in run.decoders)  # type: ignore[misc]
    return loaded, run


NUM_STEPS, LIMIT = 6, 2


@dataclass
class _Outcome:
    """The end of a run on one rank. skipped: `run.skipped_steps` at the end of the run and after resuming it."""

    skipped: tuple[int, int | None]
    record_ids: dict[int, Any]
    error: str | None = None


def _train_with_infinities(config: str, overrides: tuple[str, ...], spoilt_steps: tuple[int, ...]) -> _Outcome:
    """Train with an infinite loss in the given steps, where the gradients alone are finite, then resume the run."""
    loaded, run = _build(config, overrides, lambda nll_L, step: nll_L + torch.inf if step in spoilt_steps else nll_L)
    ids = {step: run.data[step].record_ids for step in spoilt_steps}
    try:
        train(loaded, run)
    except NonFiniteError as error:
        return _Outcome((run.skipped_steps, None), ids, str(error))
    again = build_run(loaded, torch.device("cpu"))
    RunFolder(loaded, again).close("FINISHED")
    return _Outcome((run.skipped_steps, again.skipped_steps), ids)


def _run_with_infinities(config: Path, run: Path, spoilt_steps: tuple[int, ...]) -> list[_Outcome]:
    overrides = (f"run_dir={run}", f"steps={NUM_STEPS}", f"optimizer.max_skipped_steps={LIMIT}")
    return run_on_ranks(_train_with_infinities, str(config), overrides, spoilt_steps)


def test_steps_with_an_infinite_loss_are_left_out_and_counted(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    outcomes = _run_with_infinities(config, run, (1, 2, 4))
    assert [outcome.error for outcome in outcomes] == [None, None]
    assert [outcome.skipped for outcome in outcomes] == [(3, 3), (3, 3)], "the checkpoint must restore the count"
    found = losses(run)
    assert [step for step in range(NUM_STEPS) if found[step] == float("inf")] == [1, 2, 4]
    counts = [numbers["train/skipped_steps"] for _, numbers in sorted(numbers_by_step(run).items())]
    assert counts == [0, 1, 2, 2, 3, 3]
    assert sorted(path.name for path in run.glob("non_finite_*")) == [
        f"non_finite_step_{step + 1:06d}.json" for step in (1, 2, 4)
    ]


def test_too_many_in_a_row_end_the_run_on_all_ranks_and_name_the_records(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    outcomes = _run_with_infinities(config, run, (1, 2, 3))
    assert outcomes[0].error == outcomes[1].error is not None
    assert "3 steps in a row, up to step 4" in outcomes[0].error and f"max_skipped_steps = {LIMIT}" in outcomes[0].error
    assert len(losses(run)) == 4, "the preceding skipped steps must be logged"
    dump = read_json(run / "non_finite_step_000004.json")
    for rank, outcome in enumerate(outcomes):
        records = [(entry["source"], entry["record"]) for entry in dump["ranks"][rank]["records"]]
        assert tuple(records) == outcome.record_ids[3] and len(records) == 4
        for source, record in records:
            assert f"{source}:{record}" in outcomes[0].error
    assert dump["sources"] == [str(config.parent / "train")] and dump["decoders"] == ["other"]
    assert not list((run / "checkpoints").glob("step_000004")), "a run that fails this way must not save"


# The third step of its decoder: decoders alternate, and the window of 4 decides once it has 2.
SPIKE = 5
GUARDED = ("optimizer.skip_spikes={loss: 2, gradient_norm: 1000, window: 4}",)


@dataclass
class _Masters(Hook):
    digests: list[str] = field(default_factory=list)

    def after_step(self, run: Run, batch: Any, result: Any) -> None:
        flat = torch.cat([each.detach().view(-1) for each in run.engine.optimizer.fp32_partitioned_groups_flat])
        self.digests.append(hashlib.sha256(flat.numpy().tobytes()).hexdigest())


def _train_with_a_spike(config: str, overrides: tuple[str, ...]) -> tuple[list[str], int]:
    """Digest of this rank's fp32 master weights after each step, and the number of skipped steps."""
    loaded, run = _build(config, overrides, lambda nll_L, step: nll_L * 30 if step == SPIKE else nll_L)
    masters = _Masters()
    train(loaded, run, [masters])
    return masters.digests, run.skipped_steps


def test_a_spike_is_skipped_and_counted_also_after_a_resume(config: Path, tmp_path: Path) -> None:
    num_steps = 8

    def run(name: str, *overrides: str) -> list[tuple[list[str], int]]:
        words = (f"run_dir={tmp_path / name}", f"steps={num_steps}", *overrides)
        return run_on_ranks(_train_with_a_spike, str(config), words)

    for (bare, num_bare), (guarded, num_guarded) in zip(run("bare"), run("guarded", *GUARDED), strict=True):
        assert guarded[:SPIKE] == bare[:SPIKE], "the guard must not change other steps"
        assert guarded[SPIKE] == guarded[SPIKE - 1], "a skipped step must not change the weights"
        assert guarded[SPIKE + 1] != guarded[SPIKE]
        assert bare[SPIKE] != bare[SPIKE - 1]
        assert (num_guarded, num_bare) == (1, 0)
    whole = losses(tmp_path / "guarded")
    assert whole[: SPIKE + 1] == losses(tmp_path / "bare")[: SPIKE + 1]
    assert whole[SPIKE] > 5 * whole[SPIKE - 2]
    assert whole[SPIKE + 1 :] != losses(tmp_path / "bare")[SPIKE + 1 :]
    metrics = numbers_by_step(tmp_path / "guarded")
    assert [metrics[step + 1]["train/spikes"] for step in range(num_steps)] == [0] * SPIKE + [1] * (num_steps - SPIKE)
    assert all(numbers["train/grad_norm"] < float("inf") for numbers in metrics.values())
    dump = read_json(tmp_path / "guarded" / "spike_step_000006.json")
    assert dump["loss"] == whole[SPIKE] and len(dump["ranks"]) == 2

    # The spike is among the first steps after the resume: only the windows of the checkpoint can tell it.
    outcomes = run("resumed", *GUARDED, f"checkpoint.resume={tmp_path}/guarded/checkpoints/step_000004")
    assert [num_skipped for _, num_skipped in outcomes] == [1, 1]
    resumed = numbers_by_step(tmp_path / "resumed")
    assert {step: numbers["train/loss"] for step, numbers in resumed.items()} == dict(enumerate(whole[4:], start=5))
