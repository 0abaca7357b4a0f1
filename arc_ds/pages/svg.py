"""Parts of plots as inline SVG. Colours are CSS classes of the page: `g7` is the group 7."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import NamedTuple

from arc_ds.pages.axes import tick_texts

Ticks = Sequence[tuple[float, str]]


class Area(NamedTuple):
    """The edges of a plot's area in its picture."""

    left: float
    top: float
    right: float
    bottom: float


def figure(title: str, picture: str, details: str = "") -> str:
    """A picture with its title above it. details: a line below the title."""
    small = f"<br><small>{details}</small>" if details else ""
    return f"<figure><figcaption>{escape(title)}{small}</figcaption>{picture}</figure>"


def picture(width: float, height: float, label: str, parts: Iterable[str], attributes: str = "") -> str:
    """An SVG element. label: its text for readers that show no pictures."""
    return (
        f'<svg viewBox="0 0 {width} {height}" role=img aria-label="{escape(label)}"{attributes}>{"".join(parts)}</svg>'
    )


def placed(values: Sequence[float], place_of: Callable[[float], float]) -> list[tuple[float, str]]:
    """Ticks at these values. place_of: coordinate of a value."""
    return list(zip(map(place_of, values), tick_texts(values), strict=True))


def x_axis(ticks: Ticks, area: Area, label: str, *, has_grid: bool = False) -> list[str]:
    """Ticks below the area and a label below them. has_grid: lines through the area instead of the axis."""
    _, top, right, base = area
    parts = [] if has_grid else [f'<path class=axis d="M{area.left} {base}H{right}"/>']
    for x, text in ticks:
        line = f'class=grid d="M{x:.1f} {top}V{base}"' if has_grid else f'class=axis d="M{x:.1f} {base}v4"'
        parts.append(f'<path {line}/><text x="{x:.1f}" y="{base + 15}" class=mid>{escape(text)}</text>')
    return [*parts, f'<text x="{(area.left + right) / 2:.1f}" y="{base + 31}" class=mid>{escape(label)}</text>']


def y_axis(ticks: Ticks, area: Area) -> list[str]:
    """Lines through the area, with their values at its left."""
    return [
        f'<path class=grid d="M{area.left} {y:.1f}H{area.right}"/>'
        f'<text x="{area.left - 6}" y="{y + 4:.1f}" class=end>{escape(text)}</text>'
        for y, text in ticks
    ]
