"""SQuAD 1.1 and 2.0: questions on paragraphs of Wikipedia articles.

`squad` leaves out the unanswerable questions of 2.0, and counts them. `squad2` keeps them: the accepted answer is then
the word "unanswerable", which its in-context examples show.

The cluster is the article. Rows without its title have the paragraph as cluster.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from arc_ds.evaluation.datasets.reading import Entry, Layout, make_samples, read_entries, row_entry
from arc_ds.evaluation.protocol import Protocol
from arc_ds.evaluation.sample import EvalSample
from arc_ds.evaluation.task import EvalTask
from arc_ds.shards.building.question import distinct

UNANSWERABLE = "unanswerable"


def read_squad(path: Path, protocol: Protocol, *, name: str, no_answer: tuple[str, ...]) -> list[EvalSample]:
    """The questions of an original file or of rows. See `EvalTask.read`.

    name: name of the task.
    no_answer: references of an unanswerable question; it is left out if there are none.
    """
    layouts = (
        Layout(name="original", fields=("data",), read=_original),
        Layout(name="rows", fields=("question", "answers|answer"), read=_row),
    )
    entries = read_entries(layouts, path)
    answered = ((place, replace(entry, answers=distinct(entry.answers) or no_answer)) for place, entry in entries)
    return make_samples(name, answered, by_passage=True, only_first=protocol.references == "first")


def _original(fields: Mapping[str, Any]) -> Iterator[Entry]:
    for article in fields["data"]:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                answers = [] if question.get("is_impossible") else question["answers"]
                yield Entry(
                    id=question["id"],
                    question=question["question"],
                    passages=(paragraph["context"],),
                    answers=tuple(answer["text"] for answer in answers),
                    cluster=article.get("title"),
                )


def _row(fields: Mapping[str, Any]) -> Iterator[Entry]:
    entry = row_entry(fields, cluster="title")
    yield replace(entry, answers=()) if fields.get("is_impossible") else entry


TASKS = tuple(
    EvalTask(name=name, read=partial(read_squad, name=name, no_answer=no_answer))
    for name, no_answer in (("squad", ()), ("squad2", (UNANSWERABLE,)))
)
