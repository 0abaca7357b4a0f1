"""The plots of a report as inline SVG: scores with intervals, scores against sizes, differences.

Every point has its system's name next to it, and its values as a tooltip.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

from arc_ds.evaluation.report.content import Report
from arc_ds.evaluation.report.tables import AVERAGE, METRICS, TITLES, unit_of
from arc_ds.evaluation.scoring import Score, SystemScores
from arc_ds.evaluation.tables import digits_of
from arc_ds.evaluation.task import Metric
from arc_ds.pages.axes import log_ticks, nice_ticks, without_middle
from arc_ds.pages.frame import NUM_COLOURS
from arc_ds.pages.svg import Area, figure, picture, placed, x_axis, y_axis

_WIDTH = 430
_ROW = 20  # height of a row of a dot plot
_TOP, _BOTTOM = 8, 36
_CHAR = 7.0  # mean width of a character of a label
_MAX_LABEL = 24
_HEIGHT = 250
_LEFT, _RIGHT = 44, 12  # of a scatter plot
_LINE = 12  # height of a label
_MAX_OPEN, _NUM_FIRST = 13, 6  # more plots are folded, except the first ones
Box = tuple[float, float, float, float]


class Point(NamedTuple):
    """A point with its 95% interval. group: place of its system. note: a text at the right. x: of scatter plots."""

    label: str
    group: int
    value: float
    low: float
    high: float
    note: str = ""
    x: float = math.nan


def score_plots(report: Report) -> str:
    """A dot plot for each task, and one for the average."""
    return _grid([figure(title, dot_plot(points, unit)) for title, unit, points in _panels(report)])


def size_plots(report: Report, field: str, label: str) -> str:
    """The score over a field of `Sizes`, for each task and the average; empty if no system states it.

    label: of the x-axis.
    """
    panels = []
    for title, unit, points in _panels(report, field):
        known = [point for point in points if point.x > 0]  # not for NaN
        if known:
            panels.append(figure(title, scatter_plot(known, label, unit)))
    return _grid(panels) if panels else ""


def difference_plots(report: Report) -> str:
    """Differences from the baseline system for each task and the average."""
    panels = []
    groups = {system.name: group for group, system in enumerate(report.systems)}
    for task in _columns(report):
        points = []
        for name, comparison in report.comparisons.items():
            metrics = comparison.by_task.get(task, {})
            found = comparison.average if task == AVERAGE else metrics.get(_metric(report, task))
            if found is not None:
                note = f"{found.value:+.{_digits(report, task)}f}"
                if found.p_holm is not None:
                    note += " p<0.001" if found.p_holm < 1e-3 else f" p={found.p_holm:.3f}"
                points.append(Point(name, groups[name], found.value, found.low, found.high, note))
        if points:
            unit = f"minus {without_middle(report.baseline, _MAX_LABEL)}: {_unit(report, task)}"
            panels.append(figure(_title(task), dot_plot(points, unit, has_zero=True)))
    return _grid(panels)


def _columns(report: Report) -> tuple[str, ...]:
    """The average, if there are several tasks, and the tasks."""
    return (AVERAGE, *report.tasks) if len(report.tasks) > 1 else report.tasks


def _panels(report: Report, field: str = "") -> list[tuple[str, str, list[Point]]]:
    """Title, unit and points of the average and of each task."""
    found = []
    for task in _columns(report):
        points = []
        for group, system in enumerate(report.systems):
            score, size = _score_and_size(report, system, task, field)
            if score is not None and not math.isnan(score.value):
                note = f"{score.value:.{_digits(report, task)}f}"
                x = math.nan if size is None else size
                points.append(Point(system.name, group, score.value, score.low, score.high, note, x))
        if points:
            found.append((_title(task), _unit(report, task), points))
    return found


def _metric(report: Report, task: str) -> Metric:
    return report.headline(report.tasks[0] if task == AVERAGE else task)


def _digits(report: Report, task: str) -> int:
    return digits_of(_metric(report, task))


def _unit(report: Report, task: str) -> str:
    metric = _metric(report, task)
    return f"{'mean of tasks' if task == AVERAGE else METRICS[metric]}, {unit_of(metric)}"


def _title(task: str) -> str:
    return f"{AVERAGE} of headline metrics" if task == AVERAGE else TITLES.get(task, task)


def _score_and_size(report: Report, system: SystemScores, task: str, field: str) -> tuple[Score | None, float | None]:
    if task == AVERAGE:
        return system.average, report.mean_size(system, field) if field else None
    if task not in system.by_task:
        return None, None
    score = next(iter(system.by_task[task].values()))
    return score, getattr(report.sizes[system.name, task], field) if field else None


def _grid(panels: Sequence[str]) -> str:
    """Plots side by side. Of very many, all but the first ones are folded."""
    first, rest = (panels, []) if len(panels) <= _MAX_OPEN else (panels[:_NUM_FIRST], panels[_NUM_FIRST:])
    grid = f"<div class=grid-of>{''.join(first)}</div>"
    folded = f"<details><summary>{len(rest)} more plots</summary><div class=grid-of>{''.join(rest)}</div></details>"
    return grid + folded if rest else grid


def dot_plot(points: Sequence[Point], unit: str, *, has_zero: bool = False) -> str:
    """Points and intervals in rows, with their names at the left and their notes at the right.

    unit: label of the x-axis.
    has_zero: whether the axis contains 0, with a line.
    """
    left = 14 + _CHAR * max(len(without_middle(point.label, _MAX_LABEL)) for point in points)
    right = 10 + _CHAR * max(len(point.note) for point in points)
    low, high = _range([value for point in points for value in point[2:5]] + ([0.0] if has_zero else []))
    base = _TOP + _ROW * len(points)
    area = Area(left, _TOP, _WIDTH - right, base)

    def x_of(value: float) -> float:
        return left + (value - low) / (high - low) * (area.right - left)

    parts = x_axis(placed(nice_ticks(low, high, 4), x_of), area, unit, has_grid=True)
    if has_zero:
        parts.append(f'<path class=axis d="M{x_of(0):.1f} {_TOP}V{base}"/>')
    for row, point in enumerate(points):
        y = _TOP + _ROW * (row + 0.5)
        name = escape(without_middle(point.label, _MAX_LABEL))
        bar = (
            "" if math.isnan(point.low) else f'<path class=bar d="M{x_of(point.low):.1f} {y}H{x_of(point.high):.1f}"/>'
        )
        parts.append(
            f'<g class="g{point.group}">{_tooltip(point)}{bar}{_marker(point.group, x_of(point.value), y)}'
            f'<text x="{left - 8:.1f}" y="{y + 4}" class="end name">{name}</text>'
            f'<text x="{_WIDTH - right + 8:.1f}" y="{y + 4}" class=note>{escape(point.note)}</text></g>'
        )
    return picture(_WIDTH, base + _BOTTOM, unit, parts)


def scatter_plot(points: Sequence[Point], x_label: str, unit: str) -> str:
    """Scores over a size on a logarithmic axis. Infinite sizes stand at the right end, after a gap.

    unit: label of the y-axis.
    """
    finite = [point.x for point in points if math.isfinite(point.x)]
    has_infinite = len(finite) < len(points)
    low, high = (min(finite) / 1.15, max(finite) * 1.15) if finite else (0.9, 1.1)
    area = Area(_LEFT, _TOP, _WIDTH - _RIGHT - (50 if has_infinite else 0), _HEIGHT - _BOTTOM)
    y_low, y_high = _range([value for point in points for value in point[2:5]])

    def x_of(value: float) -> float:
        if math.isinf(value):
            return _WIDTH - _RIGHT - 14
        return _LEFT + math.log(value / low) / math.log(high / low) * (area.right - _LEFT)

    def y_of(value: float) -> float:
        return area.bottom - (value - y_low) / (y_high - y_low) * (area.bottom - _TOP - _LINE)

    powers_of_two = [2.0**k for k in range(12) if low <= 2.0**k <= high] if low < 2 < high < 300 else []
    x_ticks = placed(powers_of_two or log_ticks(low, high), x_of)
    parts = [
        f'<text x="4" y="{_TOP + 4}">{escape(unit)}</text>',
        *y_axis(placed(nice_ticks(y_low, y_high), y_of), area._replace(right=_WIDTH - _RIGHT)),
        *x_axis([*x_ticks, *([(x_of(math.inf), "∞")] if has_infinite else [])], area, x_label),
    ]
    for point in points:
        x, y = x_of(point.x), y_of(point.value)
        bar = (
            ""
            if math.isnan(point.low)
            else f'<path class=bar d="M{x:.1f} {y_of(point.low):.1f}V{y_of(point.high):.1f}"/>'
        )
        parts.append(f'<g class="g{point.group}">{_tooltip(point)}{bar}{_marker(point.group, x, y)}</g>')
    return picture(_WIDTH, _HEIGHT, unit, [*parts, *_labels(points, x_of, y_of)])


def _labels(points: Sequence[Point], x_of: Callable[[float], float], y_of: Callable[[float], float]) -> list[str]:
    """The names of points, next to them. A name moves, with a line to its point, if it would cover another."""
    # Boxes (left, top, right, bottom) that names avoid. If there is no room, they may cover intervals.
    intervals = [(x_of(p.x) - 2, y_of(p.high), x_of(p.x) + 2, y_of(p.low)) for p in points if not math.isnan(p.low)]
    taken = [(x_of(p.x) - 5, y_of(p.value) - 5, x_of(p.x) + 5, y_of(p.value) + 5) for p in points]
    parts = []
    for point in sorted(points, key=lambda each: -each.value):
        x, y, text = x_of(point.x), y_of(point.value), without_middle(point.label, _MAX_LABEL)
        boxes = _places(x, y, _CHAR * len(text))
        free = [box for box in boxes if not any(_overlap(box, other) for other in taken)]
        clear = (box for box in free if not any(_overlap(box, other) for other in intervals))
        box = next(clear, (free or boxes)[0])
        taken.append(box)
        middle = box[1] + _LINE / 2
        if abs(middle - y) > 1:
            edge = box[0] - 2 if box[0] > x else box[2] + 2
            parts.append(f'<path class="lead g{point.group}" d="M{x:.1f} {y:.1f}L{edge:.1f} {middle:.1f}"/>')
        parts.append(f'<text x="{box[0]:.1f}" y="{middle + 4:.1f}" class=name>{escape(text)}</text>')
    return parts


def _places(x: float, y: float, width: float) -> list[Box]:
    """Boxes for the name of a point inside the plot, the best ones first: near its height, and at its right."""
    starts = [start for start in (x + 9, x - 9 - width) if start > _LEFT and start + width < _WIDTH]
    moves = sorted((half / 2 * sign for half in range(40) for sign in (1, -1)), key=abs)
    tops = [y + _LINE * (move - 0.5) for move in moves]
    inside = [top for top in tops if _TOP + _LINE <= top <= _HEIGHT - _BOTTOM - _LINE]
    return [(start, top, start + width, top + _LINE) for top in inside or tops for start in starts or [x + 9]]


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _marker(group: int, x: float, y: float) -> str:
    """A filled shape. Shapes tell systems apart without colour, and those that share one."""
    shape = (
        f"M{x - 4:.1f} {y:.1f}a4 4 0 1 0 8 0a4 4 0 1 0 -8 0Z",
        f"M{x - 3.6:.1f} {y - 3.6:.1f}h7.2v7.2h-7.2Z",
        f"M{x:.1f} {y - 5:.1f}l5 5l-5 5l-5 -5Z",
        f"M{x:.1f} {y - 4.6:.1f}l4.8 8.4h-9.6Z",
    )[(group + group // NUM_COLOURS) % 4]
    return f'<path class=mark d="{shape}"/>'


def _tooltip(point: Point) -> str:
    interval = "" if math.isnan(point.low) else f" [{point.low:.2f}, {point.high:.2f}]"
    x = "" if math.isnan(point.x) else f" at {'∞' if math.isinf(point.x) else f'{point.x:.4g}'}"
    return f"<title>{escape(point.label)}: {point.value:.2f}{interval}{x}</title>"


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Limits of an axis, with margins."""
    known = [value for value in values if math.isfinite(value)]
    low, high = min(known), max(known)
    margin = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return low - margin, high + margin
