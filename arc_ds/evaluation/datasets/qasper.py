"""Qasper: questions on papers, answered by several annotators.

An answer is "unanswerable", the spans joined by commas, a free text, or "yes" or "no", tried in this order, which is
that of the official scorer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from arc_ds.evaluation.datasets.long_context import long_task, read_long
from arc_ds.evaluation.datasets.reading import Entry, Layout
from arc_ds.evaluation.protocol import Protocol
from arc_ds.evaluation.sample import EvalSample
from arc_ds.shards.building.question_rows import rows_of


def read_qasper(path: Path, protocol: Protocol, **options: Any) -> list[EvalSample]:
    """The questions of the original file, of the Hub's rows, or of what `read_long` reads.

    Without `qasper_by_question`, each answer of a question is a sample.

    options: arguments of `read_long`.
    """
    by_row = not protocol.qasper_by_question
    papers = ("PAPER_ID: {title, full_text, qas}",)
    layouts = (
        Layout(name="paper", fields=("title", "full_text", "qas"), read=partial(_paper, by_row)),
        _PapersById(name="original", fields=papers, read=partial(_original, by_row)),
    )
    return read_long(path, protocol, **options | {"layouts": layouts})


class _PapersById(Layout):
    """The layout of the original file: one object, with the ids of papers as fields."""

    def fits(self, fields: Mapping[str, Any]) -> bool:
        """Whether all values are papers."""
        return bool(fields) and all(isinstance(paper, dict) and "qas" in paper for paper in fields.values())


def _original(by_row: bool, fields: Mapping[str, Any]) -> Iterator[Entry]:
    for paper in fields.values():
        yield from _paper(by_row, paper)


def _paper(by_row: bool, fields: Mapping[str, Any]) -> Iterator[Entry]:
    document = _document(fields)
    for question in rows_of(fields["qas"]):
        answers = [_answer(answer.get("answer", answer)) for answer in rows_of(question["answers"])]
        entry = Entry(
            id=question["question_id"],
            question=question["question"],
            passages=(document,),
            answers=tuple(answers),
        )
        if not by_row:
            yield entry
            continue
        for idx, answer in enumerate(answers):
            yield replace(entry, id=f"{entry.id}_{idx}", answers=(answer,))


def _document(fields: Mapping[str, Any]) -> str:
    """Title, abstract, and the sections with their names."""
    sections = [
        "\n".join([section["section_name"] or "", *section["paragraphs"]]).strip()
        for section in rows_of(fields["full_text"])
    ]
    return "\n\n".join(filter(None, (fields["title"], fields.get("abstract") or "", *sections)))


def _answer(answer: Mapping[str, Any]) -> str:
    if answer["unanswerable"]:
        return "unanswerable"
    if answer["extractive_spans"]:
        return ", ".join(answer["extractive_spans"])
    if answer["free_form_answer"]:
        return answer["free_form_answer"]
    return {True: "yes", False: "no", None: ""}[answer["yes_no"]]


TASKS = (
    long_task(
        "qasper",
        labels=("Article", "Question", "Answer"),
        instruction="Answer the question about the article with a few words, without an explanation. "
        'Answer "unanswerable" if the article does not hold the answer, and "yes" or "no" if the question asks for it.',
        read=read_qasper,
    ),
)
