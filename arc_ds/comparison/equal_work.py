"""Values of runs at equal tokens, time or operations, which runs with other batch sizes reach at other steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from arc_ds.comparison.panels import Axis, x_axes
from arc_ds.comparison.runs import ComparedRun, Curve
from arc_ds.comparison.summary import common_end, summarize
from arc_ds.comparison.tables import number_cell
from arc_ds.pages.tables import EMPTY, Cell, Table


def equal_work_table(runs: Sequence[ComparedRun], names: Sequence[Cell], metrics: Sequence[str], axis: Axis) -> Table:
    """The last values of metrics up to the last x that all runs reached, one row for each run.

    names: heads of the runs.
    axis: with "step" the table has no rows, since the table of values at a step shows them.
    """
    if axis == "step":
        return Table("equal", "", ("run",), ())
    axes, label = x_axes(runs, axis)
    at_x = common_end([float(each.values[-1]) for each in axes if len(each.values)])
    rows = []
    for name, run, own in zip(names, runs, axes, strict=True):
        step = _step_at(own, at_x)
        points = [summarize(run.curves.get(metric), None, step).at for metric in metrics]
        values = [EMPTY if point is None else number_cell(point.value) for point in points]
        rows.append((name, number_cell(float(step)), *values))
    title = f"Value at equal work: {number_cell(at_x).text} {label}"
    return Table("equal", title, ("run", "optimizer steps", *metrics), tuple(rows))


def _step_at(axis: Curve, at_x: float) -> int:
    """The last step that a run had done at x. axis: x by step."""
    return int(np.interp(at_x, axis.values, axis.steps) + 1e-6) if len(axis.steps) else 0
