"""The files of a comparison."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from arc_ds.comparison.figure import draw_figure
from arc_ds.comparison.page import render_page
from arc_ds.comparison.panels import Panel
from arc_ds.comparison.report import Comparison, make_panels
from arc_ds.pages.tables import Table, to_csv
from arc_ds.system.files import output, write_whole

PAGE = "comparison.html"
_CURVES = "curves.csv"


def write_files(
    comparison: Comparison, folder: Path, *, title: str, command: str, extra: Sequence[Table] = ()
) -> list[Path]:
    """Write the page, a CSV file for each table, the drawn points, and the first plots as PNG and SVG.

    folder: created if it does not exist. Files of the same names are replaced.
    title, command, extra: see `render_page`.

    Returns the paths, the page first. Raises StorageError if the folder cannot be written.
    """
    with output(folder):
        folder.mkdir(parents=True, exist_ok=True)
        panels = make_panels(comparison)
        page = folder / PAGE
        write_whole(page, render_page(comparison, panels, title=title, command=command, extra=extra))
        paths = [page]
        for table in (*comparison.tables.values(), *extra):
            paths.append(folder / f"{table.name}.csv")
            write_whole(paths[-1], to_csv(table))
        _write_curves(comparison, panels, folder / _CURVES)
        pictures = [folder / "curves.png", folder / "curves.svg"]
        draw_figure(comparison, panels, pictures)
    return [*paths, folder / _CURVES, *pictures]


def _write_curves(comparison: Comparison, panels: Sequence[Panel], path: Path) -> None:
    """The drawn points of every metric: one line for each group and x."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("metric", "group", comparison.x_label, "value", "low", "high"))
        for panel in panels:
            for one in panel.series:
                if one.is_member:
                    continue
                low, high = (() if each is None else each.tolist() for each in (one.low, one.high))
                for place, (x, y) in enumerate(zip(one.x.tolist(), one.y.tolist(), strict=True)):
                    band = (low[place], high[place]) if low else ("", "")
                    writer.writerow((panel.metric, one.label, f"{x:.8g}", f"{y:.8g}", *band))
