"""Tables of runs as text, and their numbers."""

from __future__ import annotations

from arc_ds.pages.axes import number
from arc_ds.pages.tables import EMPTY, Cell, Table


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
