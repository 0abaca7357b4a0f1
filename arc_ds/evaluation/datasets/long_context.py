"""Common parts of the tasks with one long document. The wording of their instructions is ours.

SCROLLS writes the question, an empty line and the document into one field, and has a row for each reference of a
question. Rows of the reference's own files have `passage`, `question`, `answer` and an `instruction`, which replaces
ours. The limits of new tokens are ours, too: 64 for answers, 256 (QMSum) or 1024 (GovReport) for summaries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from arc_ds.errors import DataError
from arc_ds.evaluation.datasets.reading import (
    QUESTIONS,
    Entry,
    Layout,
    first_of,
    make_samples,
    own_id,
    read_entries,
    row_entry,
)
from arc_ds.evaluation.protocol import Protocol
from arc_ds.evaluation.sample import EvalSample
from arc_ds.evaluation.task import EvalTask


def read_long(path: Path, protocol: Protocol, *, name: str, layouts: Sequence[Layout], asks: bool) -> list[EvalSample]:
    """The questions of the data set's own layouts, of SCROLLS, or of rows. See `EvalTask.read`.

    With `qasper_by_question`, rows that ask the same are one sample with the references of all; otherwise each row is a
    sample.

    name: name of the task.
    layouts: see `long_task`.
    asks: whether its documents have questions.
    """
    by_row = not protocol.qasper_by_question
    known = (*layouts, _scrolls(by_row, asks), _rows(asks))
    return make_samples(name, read_entries(known, path), merge=not by_row, by_passage=True)


def long_task(
    name: str,
    *,
    labels: tuple[str, str, str],
    instruction: str,
    layouts: Sequence[Layout] = (),
    max_new_tokens: int = 64,
    stop: tuple[str, ...] = ("\n\n",),
    read: Callable[..., list[EvalSample]] = read_long,
) -> EvalTask:
    """A task with one long document. The arguments that are not named here are those of `EvalTask`.

    layouts: the data set's own layouts. Those of SCROLLS and of rows follow.
    read: its reader, with the arguments of `read_long`.
    """
    return EvalTask(
        name=name,
        read=partial(read, name=name, layouts=layouts, asks=bool(labels[1])),
        layout="long",
        labels=labels,
        instruction=instruction,
        num_passages=None,
        max_new_tokens=max_new_tokens,
        stop=stop,
    )


def _scrolls(by_row: bool, asks: bool) -> Layout:
    return Layout(name="SCROLLS", fields=("input", "output"), read=partial(_scrolls_entry, by_row, asks))


def _rows(asks: bool) -> Layout:
    wanted = ("question|query",) if asks else ()
    fields = ("passage|passages|context", "answer|answers", *wanted)
    return Layout(name="rows", fields=fields, read=partial(_row_entry, asks))


def _scrolls_entry(by_row: bool, asks: bool, fields: Mapping[str, Any]) -> Iterator[Entry]:
    question, document = None, fields["input"]
    if asks:
        question, blank_line, document = fields["input"].partition("\n\n")
        if not blank_line:
            raise DataError("expected question, empty line and document in the field `input`, got no empty line")
    row_id = (fields.get("pid") if by_row else None) or own_id(fields)
    yield Entry(id=row_id, question=question, passages=(document,), answers=(fields["output"],))


def _row_entry(asks: bool, fields: Mapping[str, Any]) -> Iterator[Entry]:
    entry = row_entry(fields, question="")
    question = first_of(fields, QUESTIONS)
    if asks:
        yield replace(entry, question=question)
    else:  # a question about the whole document is an instruction
        yield replace(entry, question=None, instruction=entry.instruction or question or "")
