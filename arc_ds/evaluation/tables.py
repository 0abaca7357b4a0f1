"""Tables of scores and of paired differences, and their cells. Tasks and metrics have the names of the result files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from arc_ds.evaluation.comparison import Comparison, Difference
from arc_ds.evaluation.scoring import Score, SystemScores
from arc_ds.evaluation.task import Metric
from arc_ds.pages.tables import EMPTY, Cell, Table, text_cell

DIFFERENCE_COLUMNS = ("score", "difference", "p", "p (Holm)", "test", "detectable", "n", "clusters")
T = TypeVar("T", Score, Difference)


def metric_table(systems: Sequence[SystemScores]) -> Table:
    """All metrics of all systems and tasks, and the averages of headlines."""
    rows = []
    for group, system in enumerate(systems):
        num_seeds = len(system.results.seeds)
        for task, metric, score in _with_average(system.by_task, system.average):
            digits = digits_of(metric) + 1
            values = (score.value, score.low, score.high, score.stderr, score.seed_sd)
            numbers = (plain_cell(value, digits) for value in values)
            counts = map(count_cell, (score.n, score.num_clusters, num_seeds))
            rows.append((text_cell(system.name, group=group), text_cell(task), text_cell(metric), *numbers, *counts))
    names = ("score", "low", "high", "std. error", "sd of seeds", "n", "clusters", "seeds")
    caption = (
        "Points of 100; nll in nats per token of the first reference, where lower is better. low, high: 95% interval."
    )
    return Table("metrics", "All metrics", ("system", "task", "metric", *names), tuple(rows), caption)


def comparison_table(comparisons: Sequence[Comparison]) -> Table:
    """Paired differences from the first system in all metrics and in the averages of headlines."""
    rows = [
        (*map(text_cell, (each.second, task, metric)), *difference_cells(found, digits_of(metric) + 1))
        for each in comparisons
        for task, metric, found in _with_average(each.by_task, each.average)
    ]
    first = comparisons[0].first
    caption = (
        f"Each system minus {first} on the same questions, in points of 100 (nll: nats per token), with 95% intervals. "
        "p (Holm) is adjusted for the number of tasks. “Detectable” is the difference that 80% of experiments find."
    )
    columns = ("system", "task", "metric", first, *DIFFERENCE_COLUMNS)
    return Table("paired", f"Paired differences from {first}", columns, tuple(rows), caption)


def _with_average(by_task: Mapping[str, Mapping[Metric, T]], average: T | None) -> Iterable[tuple[str, str, T]]:
    yield from ((task, metric, each) for task, metrics in by_task.items() for metric, each in metrics.items())
    if average is not None:
        yield "average", "headlines", average


def difference_cells(difference: Difference, digits: int) -> list[Cell]:
    """The score of the first system, and the cells of `DIFFERENCE_COLUMNS`."""
    low, high = (plain_cell(value, digits, sign=True) for value in (difference.low, difference.high))
    interval = "" if math.isnan(difference.low) else f"[{low.text}, {high.text}]"
    return [
        *(plain_cell(value, digits) for value in (difference.first, difference.second)),
        plain_cell(difference.value, digits, sign=True)._replace(note=interval),
        *(_p_cell(value) for value in (difference.p, difference.p_holm)),
        text_cell(difference.test),
        plain_cell(difference.detectable, digits),
        *(count_cell(count) for count in (difference.n, difference.num_clusters)),
    ]


def digits_of(metric: str) -> int:
    """Decimals of a score."""
    return 3 if metric == "nll" else 1


def plain_cell(value: float | None, digits: int = 2, *, sign: bool = False) -> Cell:
    """A number; an empty cell for None and NaN."""
    if value is None or math.isnan(value):
        return EMPTY
    return Cell("∞" if math.isinf(value) else f"{value:{'+' if sign else ''}.{digits}f}", value)


def count_cell(value: int | None) -> Cell:
    """A whole number; an empty cell for None."""
    return EMPTY if value is None else Cell(f"{value:,}", value)


def _p_cell(value: float | None) -> Cell:
    return EMPTY if value is None else Cell("<0.0001" if value < 1e-4 else f"{value:.4f}", value)
