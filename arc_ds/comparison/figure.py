"""The most important plots as one picture (matplotlib)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arc_ds.comparison.panels import DASHES, Panel
from arc_ds.comparison.report import MAX_MAIN, Comparison
from arc_ds.pages.axes import number, without_middle
from arc_ds.pages.frame import NUM_COLOURS
from arc_ds.system.packages import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

_COLUMNS = 3
# Okabe and Ito's palette, without its yellow, which is unreadable on white, and with three dark additions.
_PALETTE = ("#0072b2", "#d55e00", "#009e73", "#b5549a", "#b07d00", "#3a9ed0", "#6a51a3", "#7a4a2a")
_OTHERS = "#c3c9d0"
_PANEL_INCHES = (4.6, 3.1)
_CHAR_INCH, _HANDLE = 0.085, 8  # mean width of a character of the legend; characters that a line and its space take
_MARGIN = 0.015  # of the x-axis, so that its last points are whole


def draw_figure(comparison: Comparison, panels: Sequence[Panel], paths: Sequence[Path]) -> None:
    """Write the first plots of a comparison.

    panels: all plots, see `make_panels`.
    paths: files; the suffix is the format (.png, .svg, .pdf).
    """
    require("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [panel for panel in panels if panel.series][:MAX_MAIN]
    # Without any point to draw, the picture is empty.
    num_rows = max(1, math.ceil(len(panels) / _COLUMNS))
    num_columns = max(1, min(len(panels), _COLUMNS))
    figure = Figure(
        figsize=(_PANEL_INCHES[0] * num_columns, _PANEL_INCHES[1] * num_rows + 0.6), dpi=130, layout="constrained"
    )
    FigureCanvasAgg(figure)
    grid = list(figure.subplots(num_rows, num_columns, squeeze=False).flat)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    for axes, panel in zip(grid, panels, strict=False):
        _draw(axes, panel)
    labels = {one.group: one.label for panel in panels for one in panel.series if not one.is_member}
    lines = [_line(place) for place in sorted(labels) if place < NUM_COLOURS]
    names = [labels[place] for place in sorted(labels) if place < NUM_COLOURS]
    if len(comparison.groups) > NUM_COLOURS:
        lines, names = [*lines, _line(NUM_COLOURS)], [*names, f"{len(comparison.groups) - NUM_COLOURS} others"]
    width = _PANEL_INCHES[0] * num_columns / _CHAR_INCH
    names = [without_middle(name, int(width) - _HANDLE) for name in names]
    in_line = max(1, int(width / (max(map(len, names), default=0) + _HANDLE)))
    figure.legend(lines, names, loc="outside lower center", ncols=min(in_line, 4), frameon=False, fontsize=9)
    for path in paths:
        figure.savefig(path)


def _style(group: int) -> dict[str, Any]:
    if group >= NUM_COLOURS:
        return {"color": _OTHERS, "linewidth": 0.7, "markersize": 3, "zorder": 1}
    return {"color": _PALETTE[group], "linestyle": (0, DASHES[group]), "linewidth": 1.3, "markersize": 3, "zorder": 3}


def _line(group: int) -> Line2D:
    from matplotlib.lines import Line2D

    return Line2D([], [], **_style(group))


def _draw(axes: Axes, panel: Panel) -> None:
    from matplotlib.ticker import FuncFormatter

    for one in panel.series:
        style = _style(one.group)
        if one.is_member:
            axes.plot(one.x, one.y, **{**style, "alpha": 0.3, "linewidth": 0.6}, marker="o" if len(one.x) == 1 else "")
            continue
        axes.plot(one.x, one.y, marker="o" if one.is_marked or len(one.x) == 1 else "", **style)
        if one.low is not None and one.high is not None and one.group < NUM_COLOURS:
            axes.fill_between(one.x, one.low, one.high, color=style["color"], alpha=0.15, linewidth=0)
    if panel.is_log:
        axes.set_yscale("log")
        for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            axis(FuncFormatter(lambda value, _: number(value)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    low, high = panel.x_range
    axes.set_xlim(low - _MARGIN * (high - low), high + _MARGIN * (high - low))
    axes.set_ylim(*panel.limits)
    axes.set_title(panel.metric, fontsize=9, loc="left")
    axes.set_xlabel(panel.x_label, fontsize=8)
    axes.set_ylabel(panel.unit, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(True, linewidth=0.4, color="#e3e6ea")
    axes.spines[["top", "right"]].set_visible(False)
