"""A table and its forms: CSV, plain text, Markdown, HTML."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

ABSENT = "–"


class Cell(NamedTuple):
    """A cell.

    text: shown text.
    value: value for CSV files and for sorting: a number or the whole text; None if the cell is empty.
    note: a further text next to it, such as an interval.
    group: place of the system or group, which gives the cell its colour; None for cells of no group.
    """

    text: str
    value: float | str | None = None
    note: str = ""
    group: int | None = None


EMPTY = Cell(ABSENT)


@dataclass(frozen=True)
class Table:
    """A table. name: stem of its file. title: its heading. Every row has one cell for each column."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""


def text_cell(text: str, note: str = "", group: int | None = None) -> Cell:
    """A cell with a text, which is also its value."""
    return Cell(text, text, note, group) if text else EMPTY


def to_csv(table: Table) -> str:
    """The table with whole values."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.columns)
    writer.writerows([["" if cell.value is None else cell.value for cell in row] for row in table.rows])
    return text.getvalue()


def to_text(table: Table, max_rows: int | None = None) -> str:
    """The table in columns for a terminal, with its caption. max_rows: shown rows; a line counts the others."""
    shown = [[f"{cell.text} {cell.note}".strip() for cell in row] for row in table.rows[:max_rows]]
    widths = [max(map(len, column)) for column in zip(table.columns, *shown, strict=True)]
    lines = [
        "  ".join(
            text.ljust(width) if is_text else text.rjust(width)
            for text, width, is_text in zip(row, widths, _text_columns(table), strict=True)
        ).rstrip()
        for row in [list(table.columns), *shown]
    ]
    if len(shown) < len(table.rows):
        lines.append(f"… {len(table.rows) - len(shown)} more rows: see --out and --json")
    return "\n".join([table.title, *(f"  {line}" for line in filter(None, [*lines, table.caption]))])


def to_markdown(table: Table) -> str:
    """The table as Markdown. Numbers are aligned to the right."""
    marks = ["---" if is_text else "---:" for is_text in _text_columns(table)]
    rows = [[f"{cell.text} {cell.note}".strip() for cell in row] for row in table.rows]
    return "".join(f"| {' | '.join(map(markdown_text, row))} |\n" for row in (table.columns, marks, *rows))


def _text_columns(table: Table) -> list[bool]:
    """Whether a column has texts. They are aligned to the left, numbers to the right."""
    return [any(isinstance(row[place].value, str) for row in table.rows) for place in range(len(table.columns))]


def markdown_text(text: str) -> str:
    """A text on one line, without marks of Markdown and HTML."""
    text = re.sub(r"([\\|`*]|\](?=[(\[]))", r"\\\1", " ".join(text.split()))
    return text.replace("&", "&amp;").replace("<", "&lt;")


def to_html(table: Table) -> str:
    """The table as HTML. Cells of a group have its colour, and rows that begin with one have the attribute `data-g`."""
    kinds = [" class=t" if is_text else "" for is_text in _text_columns(table)]
    head = "".join(
        f'<th scope="col"{kind}>{_breakable(column)}</th>' for column, kind in zip(table.columns, kinds, strict=True)
    )
    body = "".join(f"<tr{_group_of(row)}>{''.join(map(_html_cell, row, kinds))}</tr>" for row in table.rows)
    content = f"<table class=sortable><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"{caption_html(table.caption)}<div class=scroll tabindex=0>{content}</div>"


def caption_html(text: str) -> str:
    """A paragraph above a table or a plot; nothing without a text."""
    return f"<p class=cap>{escape(text)}</p>" if text else ""


def _breakable(text: str) -> str:
    """A name as HTML, with places at which a new line may begin."""
    return re.sub(r"([./_])", r"\1<wbr>", escape(text))


def _group_of(row: Sequence[Cell]) -> str:
    return "" if row[0].group is None else f' data-g="{row[0].group}"'


def _html_cell(cell: Cell, kind: str) -> str:
    """A cell, with its value for sorting. kind: the class of its column."""
    if isinstance(cell.value, str):
        value = f' title="{escape(cell.value)}"' if cell.value != cell.text else ""
        text = _breakable(cell.text)
    else:
        value = "" if cell.value is None else f' data-v="{cell.value}"'.replace("inf", "Infinity")  # as in JavaScript
        text = escape(cell.text)
    swatch = "" if cell.group is None else f'<i class="sw g{cell.group}"></i>'
    note = f" <small>{escape(cell.note)}</small>" if cell.note else ""
    return f"<td{kind}{value}>{swatch}{text}{note}</td>"
