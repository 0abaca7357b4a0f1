"""Common parts of the tasks with long documents. The wording of their instructions is ours.

SCROLLS writes the question, an empty line and the document into one field, and has a row for each reference of a
question. Rows of the reference's own files have `passage`, `question`, `answer` and an `instruction`, which replaces
ours. The limits of new tokens are ours, too: 64 for answers, 256 (QMSum) or 1024 (GovReport) for summaries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from arc_ds.errors import DataError
from arc_ds.evaluation.datasets.reading import Entry, Layout, own_id, row_entry, text_id
from arc_ds.evaluation.task import Metric

ANSWER_METRICS: tuple[Metric, ...] = ("f1", "em", "substring", "rouge_l")


def scrolls(*, has_question: bool, by_row: bool = False) -> Layout:
    """The layout of SCROLLS.

    has_question: whether a question precedes the document.
    by_row: each row is a sample of its own (its id is `pid`); otherwise the rows of a question have one id.
    """
    return Layout(name="SCROLLS", fields=("input", "output"), read=partial(_scrolls, has_question, by_row))


def rows(question: str | None = None) -> Layout:
    """The layout of rows with `passage` or `passages`, `answer` and maybe `question` and `instruction`."""
    wanted = () if question is not None else ("question|query",)
    fields = ("passage|passages|context", "answer|answers", *wanted)
    return Layout(name="rows", fields=fields, read=partial(_row, question))


def _scrolls(has_question: bool, by_row: bool, fields: Mapping[str, Any]) -> Iterator[Entry]:
    question, document = None, fields["input"]
    if has_question:
        question, blank_line, document = fields["input"].partition("\n\n")
        if not blank_line:
            raise DataError("expected question, empty line and document in the field `input`, got no empty line")
    row_id = fields.get("pid") if by_row else None
    yield Entry(
        id=str(row_id) if row_id else own_id(fields),
        question=question,
        passages=(document,),
        answers=(fields["output"],) if fields["output"] else (),
        cluster=text_id(document),
    )


def _row(question: str | None, fields: Mapping[str, Any]) -> Iterator[Entry]:
    entry = row_entry(fields, question=question)
    asked = fields.get("question") or fields.get("query")
    yield Entry(
        id=entry.id,
        question=asked or question or None,
        passages=entry.passages,
        answers=entry.answers,
        cluster=entry.cluster or text_id(*entry.passages[:1]),
        instruction=entry.instruction,
    )
