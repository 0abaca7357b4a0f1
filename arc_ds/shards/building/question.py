"""A question of a data set, before it is a record."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question with its passages and its answers, the main one first.

    name: what the data set calls it. reason: why it gives no record, None where it does.
    """

    name: str
    text: str
    passages: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    reason: str | None = None


def distinct(answers: Iterable[str]) -> tuple[str, ...]:
    """The answers without blank ones and repetitions, white space around them removed, in their order."""
    return tuple(dict.fromkeys(stripped for answer in answers if (stripped := answer.strip())))
