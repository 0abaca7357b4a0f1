"""A run to compare, independent of its origin: a run's folder or MLflow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from arc_ds.errors import DataError

Floats = NDArray[np.float64]
Steps = NDArray[np.int64]


class Curve(NamedTuple):
    """The points of one metric: one value for each step, sorted by step. Values may be NaN or infinite."""

    steps: Steps
    values: Floats


@dataclass(frozen=True, kw_only=True)
class ComparedRun:
    """A run and everything that a comparison shows of it.

    name: label, unique among the compared runs (`with_unique_names`).
    source: path of its folder, or MLflow's id.
    config: values by flat key, as text. `deepspeed.…` is DeepSpeed's JSON and `digest.…` the digests of the data.
    curves: points by metric.
    clock: seconds since the epoch of each logged step.
    facts: what describes the run but is no choice: status, host, device, versions, commit.
    notes: faults of its files, as sentences for the user.
    """

    name: str
    source: str
    config: Mapping[str, str]
    curves: Mapping[str, Curve]
    clock: Curve
    facts: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def last_step(self) -> int:
        """The last logged step; 0 if nothing was logged."""
        return int(self.clock.steps[-1]) if len(self.clock.steps) else 0


def make_curve(steps: Iterable[int], values: Iterable[float]) -> Curve:
    """A curve of points in the order in which they were logged. The last point of a step replaces earlier ones."""
    step_N = np.fromiter(steps, np.int64) if not isinstance(steps, np.ndarray) else steps.astype(np.int64)
    value_N = np.fromiter(values, np.float64) if not isinstance(values, np.ndarray) else values.astype(np.float64)
    if len(step_N) > 1 and not np.all(step_N[1:] > step_N[:-1]):
        order = np.argsort(step_N, kind="stable")
        step_N, value_N = step_N[order], value_N[order]
        is_last = np.append(step_N[1:] != step_N[:-1], True)
        step_N, value_N = step_N[is_last], value_N[is_last]
    return Curve(step_N, value_N)


def with_unique_names(runs: Iterable[tuple[str, str]]) -> list[str]:
    """A unique label for each run of (name, source): the name, or the name with the part of the source that differs."""
    pairs = list(runs)
    names = [name for name, _ in pairs]
    labels = []
    for name, source in pairs:
        if names.count(name) == 1:
            labels.append(name)
        elif "/" in source:
            labels.append("/".join(source.rstrip("/").split("/")[-2:]))
        else:
            labels.append(f"{name} ({source[:8]})")
    return labels if len(set(labels)) == len(labels) else [f"{name} ({source})" for name, source in pairs]


def metric_names(runs: Iterable[ComparedRun]) -> list[str]:
    """All metrics of the runs, sorted. Raises DataError if there are none."""
    found = list(runs)
    names = sorted({name for run in found for name in run.curves})
    if not names:
        listed = ", ".join(run.source for run in found[:5])
        raise DataError(
            f"none of the runs has a metric yet ({listed}{', …' if len(found) > 5 else ''}). A run writes its first "
            "metrics at step `log_every`; compare again later, or name other runs."
        )
    return names
