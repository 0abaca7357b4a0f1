"""Learning rates: torch's schedule, the configured start and end rates, and the reference's tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arc_ds.training.schedule import RateSchedule

PAPER = RateSchedule(total_steps=80_000, warmup_steps=1000, initial_lr=1e-20, final_lr=1e-10)


def test_the_ends_and_the_peak_are_exactly_what_the_config_says() -> None:
    assert PAPER.lr(0, 5e-5) == 1e-20
    assert PAPER.lr(999, 5e-5) == 5e-5
    assert PAPER.lr(79_999, 5e-5) == 1e-10


@pytest.mark.parametrize(("total", "warmup"), [(20, 4), (7, 2), (500, 100)])
def test_shape_is_that_of_torch_where_the_final_rate_is_torchs_own(total: int, warmup: int) -> None:
    initial, peak, final = 1e-6, 1e-3, 1e-8
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=peak, total_steps=total, pct_start=warmup / total, div_factor=peak / initial,
        final_div_factor=initial / final, cycle_momentum=False,
    )  # fmt: skip
    ours = RateSchedule(total_steps=total, warmup_steps=warmup, initial_lr=initial, final_lr=final)
    for step in range(total):
        assert ours.lr(step, peak) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12, abs=1e-15 * peak)
        optimizer.step()
        if step < total - 1:
            theirs.step()


def test_reference_tables_follow_with_their_own_ends(golden: Path) -> None:
    """The reference divides its final rate by peak / initial, scales the bridge's initial rate, and cycles beta1."""
    rows = json.loads((golden / "tables" / "onecycle_lr.json").read_text())
    tables = [table for table in rows if table["type"] == "cycle"]
    assert len(tables) == 2
    for table in tables:
        for idx, name in enumerate(table["param_groups"]):
            peak = table["max_lr_projector"] if name == "bridge_module" else table["max_lr"]
            initial = table["initial_lr"] * peak / table["max_lr"]
            rates = _schedule(table, initial, initial * table["final_lr"] / table["max_lr"])
            beta1 = _schedule(table, 0.95, 0.95)
            for step, row in enumerate(table["rows"]):
                assert rates.lr(step, peak) == pytest.approx(row["lr"][idx], rel=1e-12, abs=1e-15 * peak)
                assert beta1.lr(step, 0.85) == pytest.approx(row["beta1"][idx], rel=1e-12)


def _schedule(table: dict, initial: float, final: float) -> RateSchedule:
    return RateSchedule(
        total_steps=table["max_steps"], warmup_steps=table["warm_up_steps"], initial_lr=initial, final_lr=final
    )


@given(
    total=st.integers(1, 60), warmup=st.integers(0, 59), peak=st.floats(1e-6, 1e-2),
    kind=st.sampled_from(["one_cycle", "constant"]),
)  # fmt: skip
def test_rates_rise_to_the_peak_and_never_again(total: int, warmup: int, peak: float, kind: str) -> None:
    schedule = RateSchedule(
        total_steps=total, warmup_steps=min(warmup, total - 1), initial_lr=1e-9, final_lr=1e-8, kind=kind
    )
    rates = [schedule.lr(step, peak) for step in range(total)]
    top = max(min(warmup, total - 1) - 1, 0)
    assert rates[top] == peak == max(rates)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    if kind == "constant":
        assert set(rates[top:]) == {peak}


def test_a_group_with_a_peak_of_zero_is_never_moved() -> None:
    assert {PAPER.lr(step, 0.0) for step in (0, 500, 999, 40_000, 79_999)} == {0.0}
