"""Result folders of evaluations in a comparison: paired differences with intervals and p-values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from arc_ds.comparison.tables import number_cell
from arc_ds.errors import DataError
from arc_ds.evaluation.results import PREDICTIONS
from arc_ds.pages.tables import Cell, Table


def is_result_folder(path: Path) -> bool:
    """Whether a folder holds the results of an evaluation."""
    return (path / PREDICTIONS).is_file()


def paired_table(folders: Sequence[Path]) -> Table:
    """Differences of all systems in result folders from the first system, one row for each task and metric.

    Raises DataError if only one system is given, or if the systems answered different questions or used different
    protocols.
    """
    from arc_ds.evaluation.comparison import compare_systems
    from arc_ds.evaluation.results import read_systems  # type: ignore[attr-defined]

    systems = read_systems([str(folder) for folder in folders])
    if len(systems) < 2:
        raise DataError(
            f"{folders[0]} holds the results of one system, {systems[0].name}; a paired test needs two. Name a second "
            f"result folder, or see its scores with: arc-ds eval score {folders[0] / PREDICTIONS}"
        )
    first, *others = systems
    rows = []
    for comparison in compare_systems(first, *others):
        for task, metrics in comparison.by_task.items():
            for metric, found in metrics.items():
                rows.append(
                    (
                        Cell(comparison.second, comparison.second),
                        Cell(task, task),
                        Cell(metric, metric),
                        number_cell(found.first),
                        number_cell(found.second),
                        number_cell(found.value, f"[{found.low:.2f}, {found.high:.2f}]"),
                        number_cell(found.p, found.test),
                        number_cell(found.p_holm),
                        number_cell(found.detectable),
                        number_cell(float(found.n)),
                    )
                )
    columns = ("system", "task", "metric", first.name, "system's score", "difference [95%]", "p", "p (Holm)")
    caption = f"Paired differences from {first.name} on the same questions, in points of 100 (nll: nats per token)."
    title = "Evaluation, paired tests"
    return Table("paired", title, (*columns, "smallest detectable", "questions"), tuple(rows), caption)
