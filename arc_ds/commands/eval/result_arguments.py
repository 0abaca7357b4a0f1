"""Result files as arguments of `arc-ds eval`, and tables as its output."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from arc_ds.evaluation.results import SystemResults, read_systems, select_tasks
from arc_ds.system.user_paths import user_path

SEEDS = "A,B,C names several training seeds of one system."


def add_results(parser: argparse.ArgumentParser, metavar: str) -> None:
    """Add the positional result files, `--tasks` and `--json`."""
    parser.add_argument(
        "results", type=user_path, nargs="+", metavar=metavar, help=f"result folders or JSONL files. {SEEDS}"
    )
    parser.add_argument("--tasks", metavar="A,B", help="names of the tasks to read (default: all)")
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")


def read_arguments(namespace: argparse.Namespace) -> list[SystemResults]:
    """Read the systems that `add_results` has parsed."""
    systems = read_systems(namespace.results)
    return systems if namespace.tasks is None else select_tasks(systems, namespace.tasks.split(","))


def number(value: float | None, digits: int = 2, *, sign: bool = False) -> str:
    """A number of a table; a dash for an unknown one."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:{'+' if sign else ''}.{digits}f}"


def p_value(value: float | None) -> str:
    """A p-value of a table."""
    return "<0.0001" if value is not None and value < 1e-4 else number(value, 4)


def json_number(value: float | None) -> float | None:
    """A number of JSON, which knows no NaN."""
    return None if value is None or math.isnan(value) else value


def table(rows: Sequence[Sequence[str]], num_text: int) -> str:
    """Rows as aligned columns. The first row is the header.

    num_text: number of first columns that are aligned to the left. The others hold numbers.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place < num_text else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
