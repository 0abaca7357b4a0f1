"""Result files as arguments of `arc-ds eval`, and numbers of its JSON."""

from __future__ import annotations

import argparse
import math

from arc_ds.evaluation.results import SystemResults, read_systems, select_tasks
from arc_ds.system.user_paths import user_path


def add_results(parser: argparse.ArgumentParser, metavar: str) -> None:
    """Add the positional result files and `--tasks`."""
    parser.add_argument(
        "results",
        type=user_path,
        nargs="+",
        metavar=metavar,
        help="result folders or JSONL files. A,B,C names several training seeds of one system.",
    )
    parser.add_argument("--tasks", metavar="A,B", help="names of the tasks to read (default: all)")


def read_arguments(namespace: argparse.Namespace) -> list[SystemResults]:
    """Read the systems that `add_results` has parsed."""
    systems = read_systems(namespace.results)
    return systems if namespace.tasks is None else select_tasks(systems, namespace.tasks.split(","))


def json_number(value: float | None) -> float | None:
    """A number of JSON, which knows no NaN."""
    return None if value is None or math.isnan(value) else value
