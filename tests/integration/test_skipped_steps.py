"""Steps with a non-finite loss on one rank, in whole runs on two ranks: skipped on all ranks, counted and reported."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from arc_ds.batch.packing import PackedBatch
from arc_ds.config.load import load_config
from arc_ds.errors import NonFiniteError
from arc_ds.system import dist
from arc_ds.train import train
from arc_ds.training.build import build_run
from arc_ds.training.engine import PlacedDecoder
from arc_ds.training.run import Run
from arc_ds.training.run_folder import RunFolder
from tests.helpers.distributed import run_on_ranks
from tests.helpers.tiny_run import losses, numbers_by_step, read_json

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STEPS = 6
LIMIT = 2
SMALL = (
    f"steps={STEPS}",
    f"optimizer.max_skipped_steps={LIMIT}",
    "checkpoint.every=4",
    "validation.every=0",
    "data.validation=null",
    "data.num_workers=0",
    "tracking.mlflow=false",
)


class Outcome(NamedTuple):
    """Results of one rank. skipped: `run.skipped_steps` at the end of the run and after resuming it."""

    error: str | None
    skipped: tuple[int, int | None]
    record_ids: dict[int, Any]


class _Spoilt:
    """A decoder with infinite losses on rank 1 in some steps; the gradients alone would be finite."""

    def __init__(self, decoder: PlacedDecoder, run: Run, steps: Collection[int]) -> None:
        self.module, self._decoder, self._run, self._steps = decoder.module, decoder, run, steps
        self.engine, self.placement = decoder.engine, decoder.placement

    def __call__(self, batch: PackedBatch, z_ZD: Tensor | None) -> Tensor:
        nll_L = self._decoder(batch, z_ZD)
        return nll_L + torch.inf if dist.rank() == 1 and self._run.step in self._steps else nll_L


def _train(config: str, overrides: tuple[str, ...], spoilt_steps: tuple[int, ...]) -> Outcome:
    """Train on this rank with a non-finite loss in the given steps (from 0), then resume the run."""
    loaded = load_config(config, overrides)
    run = build_run(loaded, torch.device("cpu"))
    run.decoders = tuple(_Spoilt(decoder, run, spoilt_steps) for decoder in run.decoders)  # type: ignore[misc]
    error, again = None, None
    try:
        train(loaded, run)
        again = build_run(loaded, torch.device("cpu"))
        RunFolder(loaded, again).close("FINISHED")
    except NonFiniteError as caught:
        error = str(caught)
    ids = {step: run.data[step].record_ids for step in spoilt_steps}
    return Outcome(error, (run.skipped_steps, None if again is None else again.skipped_steps), ids)


def _run(config: Path, run: Path, spoilt_steps: tuple[int, ...]) -> list[Outcome]:
    return run_on_ranks(_train, str(config), (f"run_dir={run}", *SMALL), spoilt_steps, timeout_s=300.0)


def test_steps_with_an_infinite_loss_are_left_out_and_counted(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    outcomes = _run(config, run, (1, 2, 4))
    assert [outcome.error for outcome in outcomes] == [None, None]
    assert [outcome.skipped for outcome in outcomes] == [(3, 3), (3, 3)], "the checkpoint must restore the count"
    found = losses(run)
    assert [step for step in range(STEPS) if found[step] == float("inf")] == [1, 2, 4]
    counts = [numbers["train/skipped_steps"] for _, numbers in sorted(numbers_by_step(run).items())]
    assert counts == [0, 1, 2, 2, 3, 3]
    assert sorted(path.name for path in run.glob("non_finite_*")) == [
        f"non_finite_step_{step + 1:06d}.json" for step in (1, 2, 4)
    ]


def test_too_many_in_a_row_end_the_run_on_all_ranks_and_name_the_records(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    outcomes = _run(config, run, (1, 2, 3))
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
