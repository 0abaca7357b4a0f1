"""What a task makes of a record: the sample, what its contexts say, and what was cut or changed on the way."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass, field
from typing import Protocol

from arc_ds.batch.segments import Sample, Segment
from arc_ds.data.tasks.script import Document, Part, Written, render, with_spaces_in_targets
from arc_ds.errors import DataError
from arc_ds.tokenizers import Tokenizer


class TooShortError(DataError):
    """A sound record that is too short for its task."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskCounts:
    """What was cut or changed in making samples; counts of several samples add up.

    degraded: records too short for a continuation, which became reconstructions. cut_contexts: contexts, and
    cut_chunks: chunks of a long context that the limits left no room for. cut_examples: in-context examples left out.
    cut_questions, cut_answers: those cut at their limit.
    """

    degraded: int = 0
    cut_contexts: int = 0
    cut_chunks: int = 0
    cut_examples: int = 0
    cut_questions: int = 0
    cut_answers: int = 0

    def __add__(self, other: TaskCounts) -> TaskCounts:
        if self is NO_COUNTS or other is NO_COUNTS:
            return other if self is NO_COUNTS else self
        return TaskCounts(
            degraded=self.degraded + other.degraded,
            cut_contexts=self.cut_contexts + other.cut_contexts,
            cut_chunks=self.cut_chunks + other.cut_chunks,
            cut_examples=self.cut_examples + other.cut_examples,
            cut_questions=self.cut_questions + other.cut_questions,
            cut_answers=self.cut_answers + other.cut_answers,
        )

    def __bool__(self) -> bool:
        return any(astuple(self))


NO_COUNTS = TaskCounts()


class Variants(Protocol):
    """How a sample reads without its contexts, and with their text in their place."""

    def closed(self) -> tuple[Segment, ...]: ...

    def open(self) -> tuple[Segment, ...]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A sample, and what its contexts say, in their order.

    passages: all texts that the record asked about gives; none of them may stand in a context in their place.
    variants: makes the other segments that validation compares (see `tasks.variants`), when asked.
    """

    sample: Sample
    contexts: tuple[str, ...]
    passages: tuple[str, ...]
    counts: TaskCounts = NO_COUNTS
    variants: Variants = field(repr=False, compare=False)

    @property
    def degraded(self) -> bool:
        """Whether the record was too short for the continuation asked for and became a reconstruction."""
        return self.counts.degraded > 0


def written_example(
    task: str, parts: tuple[Part, ...], passages: Iterable[str], counts: TaskCounts, decoder: Tokenizer
) -> Example:
    """The example that a script makes; TooShortError where it has no target that a row predicts."""
    parts = with_spaces_in_targets(parts)
    rendered = render(parts, decoder)
    if not any(segment.in_loss for segment in rendered.target):
        raise TooShortError(
            f"a record gives the task {task} nothing to predict: fewer than two decoder tokens. Build the shards with "
            "a larger min_tokens, or set data.on_error: skip."
        )
    return Example(
        sample=Sample(task, rendered.segments),
        contexts=tuple(part.text for part in parts if isinstance(part, Document)),
        passages=tuple(passages),
        counts=counts,
        variants=Written(parts, decoder, rendered.target),
    )
