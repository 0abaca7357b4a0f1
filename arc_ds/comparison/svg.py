"""Plots as inline SVG. Colours are CSS classes of the page: `g7` is the group 7."""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape

import numpy as np

from arc_ds.comparison.panels import Panel, Series
from arc_ds.comparison.runs import Floats
from arc_ds.comparison.tables import number
from arc_ds.pages.axes import nice_ticks

WIDTH, HEIGHT = 430, 236
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 18, 8, 36
_TICKS = 5

Scale = Callable[[Floats], Floats]


def draw_panel(panel: Panel) -> str:
    """A plot of one metric. Its attributes hold the ranges, from which the page's script computes values."""
    low, high = panel.x_range
    x_of = _linear(low, high, _LEFT, WIDTH - _RIGHT)
    y_low, y_high = (math.log10(each) for each in panel.limits) if panel.is_log else panel.limits
    to_y = _linear(y_low, y_high, HEIGHT - _BOTTOM, _TOP)

    def y_of(y: Floats) -> Floats:
        # A point far outside keeps the slope of its line, but no SVG reader has to draw at 1e300.
        return np.clip(to_y(np.log10(np.maximum(y, 1e-300)) if panel.is_log else y), -2.0 * HEIGHT, 3.0 * HEIGHT)

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role=img aria-label="{escape(panel.metric)}" '
        f'data-x="{low:.9g},{high:.9g}" data-y="{y_low:.9g},{y_high:.9g}" data-log="{int(panel.is_log)}">',
        f'<clipPath id="{_clip_id(panel)}"><rect x="{_LEFT}" y="{_TOP}" width="{WIDTH - _LEFT - _RIGHT}" '
        f'height="{HEIGHT - _TOP - _BOTTOM}"/></clipPath>',
        *_x_axis(low, high, x_of, panel.x_label),
        *_y_axis(panel, y_low, y_high, to_y),
        f'<g clip-path="url(#{_clip_id(panel)})">',
        *(text for one in sorted(panel.series, key=_depth) for text in _series(one, x_of, y_of)),
        "</g></svg>",
    ]
    return "".join(parts)


def _clip_id(panel: Panel) -> str:
    return "c_" + "".join(each if each.isalnum() else "_" for each in panel.metric)


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
    label = escape(series.label)
    if len(x) > 1:
        found.append(
            f'<path class="{kind} g{series.group}" data-g="{series.group}" data-l="{label}" d="{_path(x, y)}"/>'
        )
    if series.is_marked or len(x) == 1:
        dots = "".join(f"M{px:.1f} {py:.1f}h0" for px, py in zip(x, y, strict=True))
        label_again = f' data-l="{label}"' if len(x) == 1 else ""
        found.append(f'<path class="dots g{series.group}" data-g="{series.group}"{label_again} d="{dots}"/>')
    return found


def _path(x: Floats, y: Floats) -> str:
    return "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in zip(x.tolist(), y.tolist(), strict=True))


def _linear(low: float, high: float, start: float, end: float) -> Scale:
    span = (high - low) or 1.0
    return lambda values: start + (np.asarray(values, np.float64) - low) / span * (end - start)


def _x_axis(low: float, high: float, x_of: Scale, label: str) -> list[str]:
    base = HEIGHT - _BOTTOM
    parts = [f'<path class=axis d="M{_LEFT} {base}H{WIDTH - _RIGHT}"/>']
    for tick in nice_ticks(low, high):
        x = float(x_of(np.array(tick)))
        parts.append(
            f'<path class=axis d="M{x:.1f} {base}v4"/><text x="{x:.1f}" y="{base + 15}" class=mid>{number(tick)}</text>'
        )
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    return [*parts, f'<text x="{middle}" y="{HEIGHT - 4}" class="mid lab">{escape(label)}</text>']


def _y_axis(panel: Panel, low: float, high: float, y_of: Scale) -> list[str]:
    ticks = log_ticks(low, high) if panel.is_log else [(tick, number(tick)) for tick in nice_ticks(low, high)]
    parts = []
    for place, text in ticks:
        y = float(y_of(np.array(place)))
        parts.append(
            f'<path class=grid d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}"/>'
            f'<text x="{_LEFT - 6}" y="{y + 3.5:.1f}" class=end>{text}</text>'
        )
    return parts


def log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Places, as powers of ten, and texts of ticks between two powers: at 1, 2 and 5, or at 1 if there are many."""
    if high - low < 1:
        return [(math.log10(value), number(value)) for value in nice_ticks(10**low, 10**high) if value > 0]
    factors = (1, 2, 5) if high - low < 2.5 else (1,)
    every = max(1, round((high - low) / (2 * _TICKS)))
    exponents = range(math.floor(low), math.ceil(high) + 1, every)
    values = [factor * 10.0**exponent for exponent in exponents for factor in factors]
    inside = [value for value in values if low <= math.log10(value) <= high]
    return [(math.log10(value), number(value)) for value in inside]
