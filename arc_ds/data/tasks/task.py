"""The interface of a task: one object with everything that the rest of the program needs to know about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from arc_ds.data.tasks.example import Example, ExampleSpec
from arc_ds.data.tasks.limits import TaskLimits
from arc_ds.shards.format import RecordKind

TEMPLATE_TOKENS = 8
"""The words around a question and its answer, in decoder tokens."""


class SampleLengths(NamedTuple):
    """The estimated lengths of a sample's parts.

    contexts: encoder tokens of each context.
    before: decoder tokens before the first context, without begin-of-text.
    after: all other decoder tokens.
    """

    contexts: tuple[int, ...]
    before: int
    after: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordMeans:
    """Means of a source's fine-tuning records. The index has only the total number of tokens of each record.

    The defaults are guesses for shards that do not record the number of passages: a sample then reads all of them.

    other_tokens: tokens of a record outside its passages.
    question_rows: decoder rows of these that a sample keeps.
    drawn_share: share of the passages' tokens that a few-shot sample reads.
    """

    other_tokens: int = 24
    question_rows: int = 24
    drawn_share: float = 1.0


class ChatRows(NamedTuple):
    """Decoder rows that a chat template adds.

    first: around the first turn.
    further: around each further turn.
    text: the words around a text.
    """

    first: int
    further: int
    text: int


NO_CHAT = ChatRows(0, 0, 0)


class Largest(NamedTuple):
    """Bounds of one sample of a task.

    contexts: number of contexts.
    context_tokens: encoder tokens of all contexts together.
    longest_context: encoder tokens of one context.
    text_rows: all other decoder rows, except begin-of-text and a chat's first turn.
    """

    contexts: int
    context_tokens: int
    longest_context: int
    text_rows: int


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task of `data.sources`.

    name: its name in the config.
    record_kinds: the kinds of records that it can read.
    samples: one or two names of its samples in metrics. `data.reconstruction_share` is the share of the first of two.
    example: makes the example of some records. A pure function of its arguments; see `registry.make_example`.
    estimate: the estimated lengths of a sample, from its name, the encoder tokens of its records (its own first), the
        source's limits, and the means of the source's records (None unless they are fine-tuning records).
    largest: bounds of one sample, from the limits, the maximum number of in-context examples, and the chat template's
        rows.
    own_keys: keys of a source that no other task uses.
    size_keys: the keys that bound a sample, for messages.
    asks_about_last: whether the target is about the last context alone, and the others belong to examples.
    """

    name: str
    record_kinds: tuple[RecordKind, ...]
    samples: tuple[str, ...]
    example: Callable[[Sequence[dict[str, Any]], ExampleSpec], Example]
    estimate: Callable[[str, Sequence[int], TaskLimits, RecordMeans | None], SampleLengths]
    largest: Callable[[TaskLimits, int, ChatRows], Largest]
    size_keys: str
    own_keys: tuple[str, ...] = ()
    asks_about_last: bool = False


# Bytes of the words around a question and an answer. A byte has at most one token.
QUESTION_WORDS = 32


def question_rows(limits: TaskLimits) -> int:
    """Maximum decoder rows of a question, its answer and the words around them."""
    return limits.max_question + limits.max_answer + QUESTION_WORDS
