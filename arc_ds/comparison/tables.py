"""Cells of numbers, and tables with rows and columns exchanged."""

from __future__ import annotations

from arc_ds.pages.axes import number
from arc_ds.pages.tables import EMPTY, Cell, Table


def number_cell(value: float | None, note: str = "") -> Cell:
    """A cell with a number; an empty cell for None."""
    return EMPTY if value is None else Cell(number(value), value, note)


def transposed(table: Table, corner: str) -> Table:
    """The table with rows and columns exchanged. corner: title of its first column."""
    heads = [row[0].text for row in table.rows]
    rows = tuple(
        (Cell(column, column), *(row[place] for row in table.rows))
        for place, column in enumerate(table.columns)
        if place
    )
    return Table(table.name, table.title, (corner, *heads), rows, table.caption)
