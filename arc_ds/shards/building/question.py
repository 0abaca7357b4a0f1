"""A question of a data set, before its conversion to a record."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question with its passages and answers.

    name: its id in the data set.
    answers: the main answer first.
    reason: why the question yields no record; None if it yields one.
    """

    name: str
    text: str
    passages: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    reason: str | None = None

    def to_record(self, *, first_answer: bool = False) -> dict[str, Any]:
        """The fine-tuning record. first_answer: keep the main answer alone."""
        answers = self.answers[:1] if first_answer else self.answers
        return {"passages": list(self.passages), "question": self.text, "answer": list(answers)}


def distinct(answers: Iterable[str]) -> tuple[str, ...]:
    """The answers in their order, stripped of surrounding white space, without blanks and duplicates."""
    return tuple(dict.fromkeys(stripped for answer in answers if (stripped := answer.strip())))
