"""Readers of SQuAD (1.1 and 2.0) and DROP: a single JSON file, with the questions nested under their passage.

Both also take rows, the Hub's form.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from arc_ds.shards.building.question import Question, distinct
from arc_ds.shards.building.question_rows import is_question_row, read_question


def read_squad(content: Any) -> Iterator[Question]:
    """The questions of a SQuAD file, or the one of a row. Those without an answer get the reason `unanswerable`."""
    for article in [content] if is_question_row(content) else content["data"]:
        if is_question_row(article):
            yield read_question(article)
            continue
        for paragraph in article["paragraphs"]:
            for entry in paragraph["qas"]:
                answers = distinct(answer["text"] for answer in entry["answers"])
                yield Question(
                    name=entry["id"],
                    text=entry["question"].strip(),
                    passages=(paragraph["context"],),
                    answers=answers,
                    reason=None if answers else "unanswerable",
                )


def read_drop(content: Any) -> Iterator[Question]:
    """The questions of a DROP file, or the one of a row. The other annotators' answers follow the main one."""
    if is_question_row(content):
        yield read_question(content)
        return
    for passage in content.values():
        for entry in passage["qa_pairs"]:
            given = [entry["answer"], *entry.get("validated_answers", [])]
            answers = distinct(_drop_answer(answer) for answer in given)
            yield Question(
                name=entry["query_id"],
                text=entry["question"].strip(),
                passages=(passage["passage"],),
                answers=answers,
                reason=None if answers else "unanswerable",
            )


def _drop_answer(answer: Any) -> str:
    """A number, a date (the given ones of day, month and year), or all spans joined into one answer."""
    if answer["number"]:
        return str(answer["number"])
    if answer["spans"]:
        return ", ".join(answer["spans"])
    date = answer.get("date") or {}
    return " ".join(date[part] for part in ("day", "month", "year") if date.get(part))


def read_rows(content: Any) -> Iterator[Question]:
    """The question of a row in any form that `question_rows` knows."""
    yield read_question(content)
