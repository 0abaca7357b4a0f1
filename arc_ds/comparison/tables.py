"""Tables of runs as text and HTML, and their numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from html import escape

from arc_ds.pages.tables import EMPTY, Cell, Table, html_cell

_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def number(value: float) -> str:
    """A number with four digits. Large ones have a prefix: 12.3k."""
    if not math.isfinite(value):
        return str(value)
    for size, prefix in _PREFIXES:
        if abs(value) >= max(size, 1e4):
            return f"{value / size:.4g}{prefix}"
    return f"{value:.4g}"


def number_cell(value: float | None, note: str = "", group: int | None = None) -> Cell:
    """A cell with a number; an empty cell for None."""
    return EMPTY if value is None else Cell(number(value), value, note, group)


def transposed(table: Table, corner: str) -> Table:
    """The table with rows and columns exchanged. corner: title of its first column."""
    heads = [row[0].text for row in table.rows]
    rows = tuple(
        (Cell(column, column), *(row[place] for row in table.rows))
        for place, column in enumerate(table.columns)
        if place
    )
    return Table(table.name, table.title, (corner, *heads), rows, table.caption)


def to_text(table: Table, max_rows: int) -> str:
    """The table in columns, for a terminal. max_rows: rows that are shown; a line counts the others."""
    shown = [[f"{cell.text} {cell.note}".strip() for cell in row] for row in table.rows[:max_rows]]
    widths = [max(map(len, column)) for column in zip(table.columns, *shown, strict=True)]
    is_number = [
        all(not isinstance(row[place].value, str) for row in table.rows) for place in range(len(table.columns))
    ]
    lines = [
        "  ".join(
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(row, widths, is_number, strict=True)
        ).rstrip()
        for row in [list(table.columns), *shown]
    ]
    if len(table.rows) > max_rows:
        lines.append(f"… {len(table.rows) - max_rows} more rows: see --out and --json")
    return "\n".join([table.title, *(f"  {line}" for line in lines)])


def to_html(table: Table) -> str:
    """The table as HTML. Cells of a group have its colour and the attribute `data-g`."""
    head = "".join(f'<th scope="col">{_breakable(column)}</th>' for column in table.columns)
    rows = "".join(f"<tr{_group_of(row)}>{''.join(map(html_cell, row))}</tr>" for row in table.rows)
    caption = f"<p class=cap>{escape(table.caption)}</p>" if table.caption else ""
    body = f"<table class=sortable><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f"{caption}<div class=scroll>{body}</div>"


def _breakable(text: str) -> str:
    """A name as HTML, with places at which a new line may begin."""
    return re.sub(r"([./_])", r"\1<wbr>", escape(text))


def _group_of(row: Sequence[Cell]) -> str:
    return "" if row[0].group is None else f' data-g="{row[0].group}"'
