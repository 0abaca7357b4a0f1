"""Whole runs on two ranks with micro-batch limits: the losses do not depend on the splits or on the planned numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch

from arc_ds.config.load import load_config
from arc_ds.data.loading.micro_batches import MicroBatchLimits, planned_splits
from arc_ds.data.loading.step_batch import StepBatch
from arc_ds.train import train
from arc_ds.training.build import build_run
from arc_ds.training.hooks import Hook
from arc_ds.training.run import Run
from arc_ds.training.step import StepResult
from tests.helpers.distributed import run_on_ranks
from tests.helpers.tiny_run import PLAIN, numbers_by_step

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STEPS, PARTS = 6, 2
MAX_TOKENS, MAX_ROWS = 40, 90
TOLERANCE = 1e-6  # as in test_parity; measured: 7e-9 for losses, 6e-8 for gradient norms
SMALL = (f"steps={STEPS}", f"micro_batches={PARTS}", "data.batch_size=16", "decoder_schedule=same_batch", *PLAIN)


class Outcome(NamedTuple):
    """Results of one rank.

    had: micro-batches per decoder in each step as first built by this rank.
    ran: micro-batches per decoder in each step as executed.
    largest: maximum encoder tokens and maximum decoder rows of a micro-batch.
    remade: number of repacked batches.
    over_limit: number of samples that exceed a limit.
    """

    had: tuple[int, ...] = ()
    ran: tuple[int, ...] = ()
    largest: tuple[int, int] = (0, 0)
    remade: int = 0
    over_limit: int = 0


class _Watch(Hook):
    """Records the batches that a run trains on."""

    def __init__(self) -> None:
        self.batches: list[StepBatch] = []

    def after_step(self, run: Run, batch: StepBatch, result: StepResult) -> None:
        self.batches.append(batch)


def _train(config: str, overrides: Sequence[str], plan_is_low: bool, max_rows: int | None) -> Outcome:
    """Train a run on this rank.

    plan_is_low: replace the plan from indexed lengths by one without splits.
    max_rows: a row limit that some samples exceed. In practice this happens if a text has more decoder tokens than the
        config can predict.
    """
    loaded = load_config(config, overrides)
    run = build_run(loaded, torch.device("cpu"))
    run.data.limits = run.data.limits if max_rows is None else MicroBatchLimits(max_decoder_rows=max_rows)
    watch = _Watch()
    plan = (lambda *_: PARTS) if plan_is_low else planned_splits
    with mock.patch("arc_ds.data.loading.loader.planned_splits", plan):
        train(loaded, run, [watch])
        had = tuple(run.data[step].num_splits for step in range(STEPS))
    micros = [micro.batch for batch in watch.batches for micro in batch.micro_batches]
    return Outcome(
        had=had,
        ran=tuple(batch.num_splits for batch in watch.batches),
        largest=(max(m.num_encoder_tokens for m in micros), max(m.num_decoder_rows for m in micros)),
        remade=run.data_counts["remade"],
        over_limit=run.data_counts["over_limit"],
    )


def _run(
    config: Path, folder: Path, *overrides: str, plan_is_low: bool = False, max_rows: int | None = None
) -> list[Outcome]:
    overrides = (f"run_dir={folder}", *SMALL, *overrides)
    return run_on_ranks(_train, str(config), overrides, plan_is_low, max_rows)


LIMITS = (f"data.max_encoder_tokens={MAX_TOKENS}", f"data.max_decoder_rows={MAX_ROWS}")


def test_losses_do_not_depend_on_how_shares_are_split_or_what_the_plan_had_promised(
    config: Path, tmp_path: Path
) -> None:
    whole = _run(config, tmp_path / "whole")
    planned = _run(config, tmp_path / "planned", *LIMITS)
    low = _run(config, tmp_path / "low", *LIMITS, plan_is_low=True)
    assert {outcome.ran for outcome in whole} == {(PARTS,) * STEPS}
    for split in (planned, low):
        assert split[0].ran == split[1].ran and all(number > PARTS for number in split[0].ran)
        assert all(rank.largest[0] <= MAX_TOKENS and rank.largest[1] <= MAX_ROWS for rank in split)
    assert any(rank.largest[0] > MAX_TOKENS and rank.largest[1] > MAX_ROWS for rank in whole)
    _assert_one_rank_followed_the_other(low)
    wanted = numbers_by_step(tmp_path / "whole")
    over = _run(config, tmp_path / "over", max_rows=45)
    assert 0 < over[0].over_limit == over[1].over_limit < 16 * 2 * STEPS
    assert over[0].ran == over[1].ran and max(rank.largest[1] for rank in over) > 45
    for name in ("planned", "low", "over"):
        found = numbers_by_step(tmp_path / name)
        assert found.keys() == wanted.keys() and len(found) == STEPS
        for step, numbers in wanted.items():
            assert _of_training(found[step]) == pytest.approx(_of_training(numbers), rel=TOLERANCE), (name, step)


def _of_training(numbers: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in numbers.items() if not key.startswith("data/")}


def _assert_one_rank_followed_the_other(outcomes: list[Outcome]) -> None:
    """In some steps, including the first, the ranks first built different numbers, and the smaller one was raised."""
    first, second = outcomes
    assert first.ran == tuple(max(pair) for pair in zip(first.had, second.had, strict=True))
    followed = [abs(a - b) > 0 for a, b in zip(first.had, second.had, strict=True)]
    assert followed[0] and not all(followed), (first.had, second.had)
    assert first.remade == second.remade == sum(followed)
