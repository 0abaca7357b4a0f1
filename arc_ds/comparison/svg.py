"""Panels as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape

import numpy as np

from arc_ds.comparison.panels import Panel, Series
from arc_ds.comparison.runs import Floats
from arc_ds.pages.axes import log_ticks, nice_ticks
from arc_ds.pages.svg import Area, picture, placed, x_axis, y_axis

_WIDTH, _HEIGHT = 430, 236
_AREA = Area(left=52, top=8, right=412, bottom=200)
_EDGE = 4  # so far dots at the edge of the area reach out of it

Scale = Callable[[Floats], Floats]


def draw_panel(panel: Panel) -> str:
    """A plot of one metric. Its attributes hold ranges and area, from which the page's script computes values."""
    low, high = panel.x_range
    x_of = _linear(low, high, _AREA.left, _AREA.right)
    y_low, y_high = (math.log10(each) for each in panel.limits) if panel.is_log else panel.limits
    to_y = _linear(y_low, y_high, _AREA.bottom, _AREA.top)

    def y_of(y: Floats) -> Floats:
        # A point far outside keeps the slope of its line, but no SVG reader has to draw at 1e300.
        return np.clip(to_y(np.log10(np.maximum(y, 1e-300)) if panel.is_log else y), -2.0 * _HEIGHT, 3.0 * _HEIGHT)

    y_ticks = (log_ticks if panel.is_log else nice_ticks)(*panel.limits)
    clip = "c_" + "".join(each if each.isalnum() else "_" for each in panel.metric)
    left, top, right, bottom = _AREA
    parts = [
        f'<clipPath id="{clip}"><rect x="{left - _EDGE}" y="{top - _EDGE}" width="{right - left + 2 * _EDGE}" '
        f'height="{bottom - top + 2 * _EDGE}"/></clipPath>',
        *x_axis(placed(nice_ticks(low, high), lambda value: float(x_of(np.array(value)))), _AREA, panel.x_label),
        *y_axis(placed(y_ticks, lambda value: float(y_of(np.array(value)))), _AREA),
        f'<g clip-path="url(#{clip})">',
        *(text for one in sorted(panel.series, key=_depth) for text in _series(one, x_of, y_of)),
        "</g>",
    ]
    ranges = (
        f' data-x="{low:.9g},{high:.9g}" data-y="{y_low:.9g},{y_high:.9g}" data-log="{int(panel.is_log)}" '
        f'data-area="{",".join(map(str, _AREA))}"'
    )
    return picture(_WIDTH, _HEIGHT, panel.metric, parts, ranges)


def _depth(series: Series) -> tuple[bool, int]:
    """Order of drawing: single runs of a group below its mean, and the first groups above the later ones."""
    return not series.is_member, -series.group


def _series(series: Series, x_of: Scale, y_of: Scale) -> list[str]:
    x, y = x_of(series.x), y_of(series.y)
    found = []
    if series.low is not None and series.high is not None:
        edge = _path(np.concatenate([x, x[::-1]]), np.concatenate([y_of(series.high), y_of(series.low)[::-1]]))
        found.append(f'<path class="band g{series.group}" data-g="{series.group}" d="{edge}Z"/>')
    kind = "line member" if series.is_member else "line"
    label = f' data-l="{escape(series.label)}"'
    if len(x) > 1:
        found.append(f'<path class="{kind} g{series.group}" data-g="{series.group}"{label} d="{_path(x, y)}"/>')
    if series.is_marked or len(x) == 1:
        dots = "".join(f"M{px:.1f} {py:.1f}h0" for px, py in zip(x, y, strict=True))
        label = label if len(x) == 1 else ""
        found.append(f'<path class="dots g{series.group}" data-g="{series.group}"{label} d="{dots}"/>')
    return found


def _path(x: Floats, y: Floats) -> str:
    return "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in zip(x.tolist(), y.tolist(), strict=True))


def _linear(low: float, high: float, start: float, end: float) -> Scale:
    span = (high - low) or 1.0
    return lambda values: start + (np.asarray(values, np.float64) - low) / span * (end - start)
