"""Scores of the paper (arXiv 2510.20535), for comparison. It gives no intervals."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

TABLE_1 = ("nq", "triviaqa", "hotpotqa", "squad", "flores", "cnn")
TABLE_3 = ("narrativeqa", "qasper", "govreport", "qmsum")
TASKS = (*TABLE_1, *TABLE_3)


class PaperRow(NamedTuple):
    """A row of a table of the paper.

    system, decoder: names.
    ratio: the pooling factor; 1 for full text. None for CEPED: it has no compressed rows.
    scores: by task, in points of 100.
    average: its column Avg.; None if the table has none.
    """

    system: str
    decoder: str
    ratio: float | None
    scores: Mapping[str, float]
    average: float | None = None


def _row(system: str, decoder: str, ratio: float | None, *scores: float, average: float | None = None) -> PaperRow:
    tasks = TABLE_1 if len(scores) == len(TABLE_1) else TABLE_3
    return PaperRow(system, decoder, ratio, dict(zip(tasks, scores, strict=False)), average)


ROWS = (
    _row("open book", "Llama 3.1 8B", 1, 38.6, 67.1, 47.1, 72.2, 32.8, 26.5, average=47.4),
    _row("ARC4", "Llama 3.1 8B", 4, 39.7, 70.1, 46.9, 74.0, 33.7, 23.7, average=48.0),
    _row("ARC8", "Llama 3.1 8B", 8, average=45.0),
    _row("open book", "Mistral 7B", 1, average=49.2),
    _row("ARC4", "Mistral 7B", 4, average=46.5),
    _row("ARC8", "Mistral 7B", 8, average=43.4),
    _row("text, 4k window", "Llama 2 7B Chat", 1, 16.1, 17.2, 15.7, 19.8),
    _row("CEPED", "Llama 2 7B Chat", None, 20.5, 19.7, 12.7, 19.7),
    _row("text, 32k window", "Llama 2 7B 32k Instruct", 1, 14.2, 16.4, 17.8, 17.6),
    _row("ARC8", "Llama 2 7B Chat", 8, 27.5, 28.3, 14.1, 19.1),
)


def paper_rows(tasks: Collection[str], *, with_average: bool) -> list[PaperRow]:
    """The rows with something to show, and what they show.

    tasks: tasks whose scores are shown.
    with_average: whether the averages are shown too. They count only if the tasks are those of Table 1.
    """
    with_average = with_average and set(tasks) == set(TABLE_1)
    rows = [
        row._replace(
            scores={task: score for task, score in row.scores.items() if task in tasks},
            average=row.average if with_average else None,
        )
        for row in ROWS
    ]
    return [row for row in rows if row.average is not None or row.scores]


def in_paper_order(tasks: Collection[str]) -> list[str]:
    """The paper's tasks in the order of its tables, then all others by name."""
    return sorted(tasks, key=lambda task: (TASKS.index(task) if task in TASKS else len(TASKS), task))
