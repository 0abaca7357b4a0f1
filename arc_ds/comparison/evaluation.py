"""Result folders of evaluations in a comparison: paired differences with intervals and p-values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from arc_ds.errors import DataError
from arc_ds.evaluation.comparison import compare_systems
from arc_ds.evaluation.results import PREDICTIONS, read_systems
from arc_ds.evaluation.tables import comparison_table
from arc_ds.pages.tables import Table


def is_result_folder(path: Path) -> bool:
    """Whether a folder holds the results of an evaluation."""
    return (path / PREDICTIONS).is_file()


def paired_table(folders: Sequence[Path]) -> Table:
    """`comparison_table` of all systems in result folders.

    Raises DataError if only one system is given, or if the systems answered different questions or used different
    protocols.
    """
    systems = read_systems([str(folder) for folder in folders])
    if len(systems) < 2:
        raise DataError(
            f"{folders[0]} holds the results of one system, {systems[0].name}; a paired test needs two. Name a second "
            f"result folder, or see its scores with: arc-ds eval score {folders[0] / PREDICTIONS}"
        )
    return comparison_table(compare_systems(*systems))
