"""Plots as data: the curves of one metric, thinned, with the seeds of a group as mean and band."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from arc_ds.comparison.configs import RunGroup
from arc_ds.comparison.runs import ComparedRun, Curve, Floats
from arc_ds.errors import DataError

Axis = Literal["step", "tokens", "time", "flops"]

AXES: dict[Axis, str] = {
    "step": "optimizer steps",
    "tokens": "encoder tokens",
    "time": "time in steps, h",
    "flops": "required operations, FLOP",
}
WALL_CLOCK = "time since the first step, h"
# Units of the metrics of training (`training/README.md`), by the first pattern that matches.
_UNITS = (
    (r"eval/", "points of 100"),
    (r"gap_closed|mfu|share", "share"),
    (r"loss|nll", "nats per label"),
    (r"^lr/", "learning rate"),
    (r"mib_per_s", "MiB/s"),
    (r"_per_s$", "1/s"),
    (r"gib", "GiB"),
    (r"mib", "MiB"),
    (r"(_s|seconds)$", "s"),
)
_RATE = {"tokens": ("speed/encoder_tokens_per_s", 1.0), "flops": ("speed/tflops_per_s", 1e12)}
_STEP_S = "speed/step_s"
# Of the lines of the first groups. Later ones are dashed too, so that lines differ without colour.
DASHES: tuple[tuple[float, ...], ...] = ((), (), (), (), (7, 3), (3, 2), (9, 2, 2, 2), (1.5, 2.5))
_LARGEST = 1e150  # squares of larger values overflow
_MARKED_POINTS = 40  # a curve with fewer points shows each of them
_WARM_UP = 0.1  # of the x-axis; losses fall steeply there
_OUTLIERS = 0.01
_MUCH = 2.0


@dataclass(frozen=True, kw_only=True)
class Series:
    """A line of a plot. x, y, low and high have one length.

    group: place of its group; it decides the colour.
    label: name of the group or run.
    low, high: band of one standard deviation over seeds; None for a single run.
    is_member: whether it is one run of a group of seeds, which is drawn faintly.
    is_marked: whether it has so few points that each is marked.
    """

    group: int
    label: str
    x: Floats
    y: Floats
    low: Floats | None = None
    high: Floats | None = None
    is_member: bool = False
    is_marked: bool = False


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A plot of one metric.

    x_range: shown range of x, the same in all plots.
    limits: shown range of y.
    is_log: whether y is logarithmic.
    note: sentences on what is not shown.
    """

    metric: str
    unit: str
    x_label: str
    series: tuple[Series, ...]
    x_range: tuple[float, float]
    limits: tuple[float, float]
    is_log: bool
    note: str


def unit_of(metric: str) -> str:
    """The unit of a metric of training; empty if unknown."""
    return next((unit for pattern, unit in _UNITS if re.search(pattern, metric)), "")


def x_axes(runs: Sequence[ComparedRun], axis: Axis) -> tuple[list[Curve], str]:
    """The x value of each step for each run, and the label of the axis. Steps between are interpolated.

    Tokens and operations are rate x time of a step x steps, summed over the reports of a run. Time is the time in
    steps, without saves, validations and pauses; it is the time of day if a run did not log the former.

    Raises DataError if a run lacks the metrics of the axis.
    """
    if axis == "step":
        return [Curve(run.clock.steps, run.clock.steps.astype(np.float64)) for run in runs], AXES["step"]
    with_points = [run for run in runs if run.curves]
    if axis == "time" and not all(_STEP_S in run.curves for run in with_points):
        # A host's clock may be set back.
        elapsed = [np.maximum.accumulate(run.clock.values - run.clock.values[:1]) for run in runs]
        return [Curve(run.clock.steps, value / 3600) for run, value in zip(runs, elapsed, strict=True)], WALL_CLOCK
    needed = (_STEP_S,) if axis == "time" else (_RATE[axis][0], _STEP_S)
    lacking = [run.name for run in with_points if not all(name in run.curves for name in needed)]
    if lacking:
        raise DataError(
            f"the runs have different x-axes: --x {axis} needs the metrics {' and '.join(needed)}, which "
            f"{len(lacking)} of {len(with_points)} runs lack "
            f"({', '.join(lacking[:3])}{', …' if len(lacking) > 3 else ''}). Use --x step, or leave these runs out."
        )
    return [_cumulative(run, axis) if run.curves else run.clock for run in runs], AXES[axis]


def _cumulative(run: ComparedRun, axis: Axis) -> Curve:
    """Sum of time, tokens or operations up to each report of a run, extended to its first and last step."""
    seconds = run.curves[_STEP_S]
    rate_N = np.full(len(seconds.steps), 1 / 3600)
    if axis != "time":
        metric, factor = _RATE[axis]
        rate_N = factor * np.interp(seconds.steps, *run.curves[metric])
    per_step_N = rate_N * seconds.values
    per_step_N = np.where(np.isfinite(per_step_N), per_step_N, 0.0)
    total_N = np.cumsum(per_step_N * np.diff(seconds.steps, prepend=0))
    rest = run.last_step - seconds.steps[-1]
    steps = np.concatenate(([0], seconds.steps, [run.last_step][: int(rest > 0)]))
    return Curve(steps, np.concatenate(([0.0], total_N, [total_N[-1] + rest * per_step_N[-1]][: int(rest > 0)])))


def make_panel(
    metric: str,
    runs: Sequence[ComparedRun],
    groups: Sequence[RunGroup],
    axes: Sequence[Curve],
    *,
    x_label: str,
    bins: int,
    is_log: bool,
    with_members: bool,
) -> Panel:
    """The plot of a metric.

    axes: `x_axes` of the runs.
    bins: a curve with more points is replaced by its means over so many parts of the x-axis.
    is_log: logarithmic y, if all values are positive.
    with_members: whether runs of a group of seeds are drawn besides their mean, and the points of short curves marked.
    """
    points = [_points(run.curves.get(metric), axis) for run, axis in zip(runs, axes, strict=True)]
    x_range = _x_range(axes)
    edges = np.linspace(*x_range, bins + 1)
    thin = [_thinned(x, y, edges) for x, y, _ in points]
    series: list[Series] = []
    num_left_out = 0
    for place, group in enumerate(groups):
        own = [(member, *thin[member]) for member in group.members if len(thin[member][0])]
        if len(own) == 1:
            ((_, x, y),) = own
            series.append(Series(group=place, label=group.label, x=x, y=y, is_marked=with_members and _is_short(x)))
            continue
        mean = _mean_and_band([(x, y) for _, x, y in own], x_range[0]) if own else None
        if with_members or mean is None:
            series += [Series(group=place, label=runs[m].name, x=x, y=y, is_member=True) for m, x, y in own]
        if mean is not None:
            x, y, low, high, num_short = mean
            num_left_out += num_short
            is_marked = with_members and _is_short(x)
            series.append(Series(group=place, label=group.label, x=x, y=y, low=low, high=high, is_marked=is_marked))
    shown = np.concatenate([one.y for one in series] or [np.zeros(0)])
    is_log = is_log and bool(len(shown)) and bool((shown > 0).all())
    start = edges[0] + _WARM_UP * (edges[-1] - edges[0])
    later = np.concatenate([one.y[one.x >= start] for one in series] or [np.zeros(0)])
    limits, num_outside = _limits(shown, later, is_log)
    num_lost = sum(lost for _, _, lost in points)
    notes = [
        f"{_count(num_lost, 'NaN or infinite value')} not drawn." if num_lost else "",
        f"{_count(num_outside, 'drawn point')} outside the shown range." if num_outside else "",
        f"{_count(num_left_out, 'seed')} not in a mean: ended early." if num_left_out else "",
    ]
    return Panel(
        metric=metric,
        unit=unit_of(metric),
        x_label=x_label,
        series=tuple(series),
        x_range=x_range,
        limits=limits,
        is_log=is_log,
        note=" ".join(filter(None, notes)),
    )


def _count(num: int, noun: str) -> str:
    return f"{num} {noun}{' is' if num == 1 else 's are'}"


def _is_short(x: Floats) -> bool:
    return len(x) <= _MARKED_POINTS


def _x_range(axes: Sequence[Curve]) -> tuple[float, float]:
    ends = [(axis.values[0], axis.values[-1]) for axis in axes if len(axis.values)]
    low, high = float(min(start for start, _ in ends)), float(max(end for _, end in ends))
    return low, high if high > low else low + 1.0


def _points(curve: Curve | None, axis: Curve) -> tuple[Floats, Floats, int]:
    """Points of a metric over x, and the number of points that cannot be drawn."""
    if curve is None or not len(axis.steps):
        return np.zeros(0), np.zeros(0), 0
    is_drawn = np.abs(curve.values) < _LARGEST  # not for NaN
    x = np.interp(curve.steps[is_drawn], axis.steps, axis.values)
    return x, curve.values[is_drawn], int(np.count_nonzero(~is_drawn))


def _thinned(x: Floats, y: Floats, edges: Floats) -> tuple[Floats, Floats]:
    """Means of the points between edges; the points themselves if there are fewer than parts."""
    if len(x) < len(edges):
        return x, y
    part = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, len(edges) - 2)
    starts = np.flatnonzero(np.diff(part, prepend=-1))
    sizes = np.diff(np.append(starts, len(x)))
    return np.add.reduceat(x, starts) / sizes, np.add.reduceat(y, starts) / sizes


def _mean_and_band(
    lines: Sequence[tuple[Floats, Floats]], origin: float
) -> tuple[Floats, Floats, Floats, Floats, int] | None:
    """Mean of several lines, less and plus a standard deviation, over the range that they share.

    Lines that ended before the middle of the longest one are left out; the last value is their number. None if they
    share no range.

    origin: start of the x-axis.
    """
    last = max(x[-1] for x, _ in lines)
    kept = [(x, y) for x, y in lines if x[-1] - origin >= (last - origin) / 2]
    start, end = max(x[0] for x, _ in kept), min(x[-1] for x, _ in kept)
    grid = kept[0][0]
    grid = grid[(grid >= start) & (grid <= end)]
    if not len(grid):
        return None
    values = np.stack([np.interp(grid, x, y) for x, y in kept])
    mean = values.mean(axis=0)
    deviation = values.std(axis=0, ddof=1) if len(kept) > 1 else np.zeros(len(grid))
    return grid, mean, mean - deviation, mean + deviation, len(lines) - len(kept)


def _limits(values: Floats, later: Floats, is_log: bool) -> tuple[tuple[float, float], int]:
    """Shown range, and number of values outside.

    The warm-up and rare outliers are cut off if they would flatten everything else. Few values are all shown.

    values: all drawn values.
    later: the values after the warm-up.
    """
    if not len(values):
        return (0.0, 1.0), 0
    scaled = np.log10(values) if is_log else values
    low, high = float(scaled.min()), float(scaled.max())
    inner = (np.log10(later) if is_log else later) if len(later) > _MARKED_POINTS else scaled
    # The nearest points inside, because a quantile between two points would follow a single spike.
    inner_low = float(np.quantile(inner, _OUTLIERS, method="higher"))
    inner_high = float(np.quantile(inner, 1 - _OUTLIERS, method="lower"))
    if len(values) > _MARKED_POINTS and inner_high > inner_low and high - low > _MUCH * (inner_high - inner_low):
        low, high = inner_low, inner_high
    margin = 0.05 * (high - low) or abs(high) * 0.05 or 1.0
    low, high = low - margin, high + margin
    if is_log:
        low, high = max(low, -307.0), min(high, 307.0)  # powers of ten that a float can hold
    num_outside = int(np.count_nonzero((scaled < low) | (scaled > high)))
    return ((10**low, 10**high) if is_log else (low, high)), num_outside
