"""A step with a spike of the loss, in whole runs on two ranks: skipped on all ranks, counted, and so after a resume."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from arc_ds.batch.packing import PackedBatch
from arc_ds.config.load import load_config
from arc_ds.system import dist
from arc_ds.train import train
from arc_ds.training.build import build_run
from arc_ds.training.engine import PlacedDecoder
from arc_ds.training.hooks import Hook
from arc_ds.training.run import Run
from tests.helpers.distributed import run_on_ranks
from tests.helpers.tiny_run import losses, numbers_by_step, read_json

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STEPS = 8
# The third step of its decoder: decoders alternate, and the window of 4 decides once it has 2.
SPIKE = 5
SMALL = (
    f"steps={STEPS}",
    "checkpoint.every=4",
    "validation.every=0",
    "data.validation=null",
    "data.num_workers=0",
    "tracking.mlflow=false",
)
GUARDED = ("optimizer.skip_spikes={loss: 2, gradient_norm: 1000, window: 4}",)


class Outcome(NamedTuple):
    """Results of one rank. masters: digest of its fp32 master weights after each step."""

    masters: list[str]
    skipped: int


class _Spiked:
    """A decoder whose losses on rank 1 are thirty times as large in one step."""

    def __init__(self, decoder: PlacedDecoder, run: Run) -> None:
        self.module, self.engine, self._decoder, self._run = decoder.module, decoder.engine, decoder, run

    def __call__(self, batch: PackedBatch, z_ZD: Tensor | None) -> Tensor:
        nll_L = self._decoder(batch, z_ZD)
        return nll_L * 30 if dist.rank() == 1 and self._run.step == SPIKE else nll_L


@dataclass
class _Masters(Hook):
    digests: list[str] = field(default_factory=list)

    def after_step(self, run: Run, batch: Any, result: Any) -> None:
        flat = torch.cat([each.detach().view(-1) for each in run.engine.optimizer.fp32_partitioned_groups_flat])
        self.digests.append(hashlib.sha256(flat.numpy().tobytes()).hexdigest())


def _train(config: str, overrides: tuple[str, ...]) -> Outcome:
    loaded = load_config(config, overrides)
    run = build_run(loaded, torch.device("cpu"))
    run.decoders = tuple(_Spiked(decoder, run) for decoder in run.decoders)  # type: ignore[misc]
    masters = _Masters()
    train(loaded, run, [masters])
    return Outcome(masters.digests, run.skipped_steps)


def test_a_spike_is_skipped_and_counted_also_after_a_resume(config: Path, tmp_path: Path) -> None:
    def run(name: str, *overrides: str) -> list[Outcome]:
        return run_on_ranks(_train, str(config), (f"run_dir={tmp_path / name}", *SMALL, *overrides), timeout_s=300.0)

    for bare, guarded in zip(run("bare"), run("guarded", *GUARDED), strict=True):
        assert guarded.masters[:SPIKE] == bare.masters[:SPIKE], "the guard must not change other steps"
        assert guarded.masters[SPIKE] == guarded.masters[SPIKE - 1], "a skipped step must not change the weights"
        assert guarded.masters[SPIKE + 1] != guarded.masters[SPIKE]
        assert bare.masters[SPIKE] != bare.masters[SPIKE - 1]
        assert (guarded.skipped, bare.skipped) == (1, 0)
    whole = losses(tmp_path / "guarded")
    assert whole[: SPIKE + 1] == losses(tmp_path / "bare")[: SPIKE + 1]
    assert whole[SPIKE] > 5 * whole[SPIKE - 2]
    assert whole[SPIKE + 1 :] != losses(tmp_path / "bare")[SPIKE + 1 :]
    metrics = numbers_by_step(tmp_path / "guarded")
    assert [metrics[step + 1]["train/spikes"] for step in range(STEPS)] == [0] * SPIKE + [1] * (STEPS - SPIKE)
    assert all(numbers["train/grad_norm"] < float("inf") for numbers in metrics.values())
    dump = read_json(tmp_path / "guarded" / "spike_step_000006.json")
    assert dump["loss"] == whole[SPIKE] and len(dump["ranks"]) == 2

    # The spike is among the first steps after the resume: only the windows of the checkpoint can tell it.
    outcomes = run("resumed", *GUARDED, f"checkpoint.resume={tmp_path}/guarded/checkpoints/step_000004")
    assert [outcome.skipped for outcome in outcomes] == [1, 1]
    resumed = numbers_by_step(tmp_path / "resumed")
    assert {step: numbers["train/loss"] for step, numbers in resumed.items()} == dict(enumerate(whole[4:], start=5))
