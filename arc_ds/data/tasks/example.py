"""The result of a task: the sample, the text of its contexts, and counts of cuts and changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from arc_ds.batch.segments import Sample, Segment
from arc_ds.data.tasks.chat import Layout
from arc_ds.data.tasks.limits import TaskLimits
from arc_ds.data.tasks.script import Document, Part, Words, render, with_spaces_in_targets
from arc_ds.errors import DataError
from arc_ds.tokenizers import Tokenizer


class TooShortError(DataError):
    """A valid record that is too short for its task."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskCounts:
    """Counts of cuts and changes in making samples. Counts of several samples add up.

    degraded: records too short for a continuation, which became reconstructions.
    cut_contexts: contexts cut to their limit.
    cut_chunks: chunks of long contexts beyond the limits.
    cut_examples: in-context examples left out.
    cut_questions: questions cut to their limit.
    cut_answers: answers cut to their limit.
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
        return TaskCounts(**{name: getattr(self, name) + getattr(other, name) for name in self.__slots__})

    def __bool__(self) -> bool:
        return self != NO_COUNTS


NO_COUNTS = TaskCounts()


def task_counts(**cuts: int) -> TaskCounts:
    """The counts of these fields. Most samples have none: NO_COUNTS itself, which costs nothing to add."""
    return TaskCounts(**cuts) if any(cuts.values()) else NO_COUNTS


class ExampleSpec(NamedTuple):
    """Everything that an example follows from, except its records.

    sample: name of the sample, such as "reconstruction".
    seed: 64 bits for the example's own choices (window, number of passages, which answer).
    encoder, decoder: their tokenizers.
    limits: sizes.
    layout: the turns of the decoder's chat.
    """

    sample: str
    seed: int
    encoder: Tokenizer
    decoder: Tokenizer
    limits: TaskLimits
    layout: Layout

    @property
    def bos_ids(self) -> tuple[int, ...]:
        """The ids at the beginning of a plain sequence: begin-of-text, or nothing."""
        return (self.decoder.bos_id,) if self.limits.bos and self.decoder.bos_id is not None else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A sample and the text of its contexts.

    sample: the sample.
    contexts: the text of each context, in order.
    passages: all texts of the sample's own record. A mismatched context must not contain any of them.
    counts: cuts and changes.
    closed: makes the segments of the sample without its contexts (see `tasks.variants`).
    open: makes the segments of the sample with the contexts' text in their place.
    """

    sample: Sample
    contexts: tuple[str, ...]
    passages: tuple[str, ...]
    counts: TaskCounts = NO_COUNTS
    closed: Callable[[], tuple[Segment, ...]] = field(repr=False, compare=False)
    open: Callable[[], tuple[Segment, ...]] = field(repr=False, compare=False)

    @property
    def degraded(self) -> bool:
        """Whether the record was too short for a continuation and became a reconstruction."""
        return self.counts.degraded > 0


def script_example(
    parts: tuple[Part, ...], passages: tuple[str, ...], spec: ExampleSpec, counts: TaskCounts = NO_COUNTS
) -> Example:
    """The example of a script. Raises TooShortError if no row predicts a target."""
    parts = with_spaces_in_targets(parts)
    rendered = render(parts, spec.decoder)
    if not any(segment.in_loss for segment in rendered.target):
        raise TooShortError(
            f"the task {spec.sample} has nothing to predict in a record: fewer than two decoder tokens. Build the "
            "shards with a larger min_tokens, or set data.on_error: skip."
        )

    def with_prompt(others: Sequence[Part]) -> tuple[Segment, ...]:
        """The same target after the prompt of other parts."""
        return render(others, spec.decoder).prompt + rendered.target

    return Example(
        sample=Sample(spec.sample, rendered.prompt + rendered.target),
        contexts=tuple(part.text for part in parts if isinstance(part, Document)),
        passages=passages,
        counts=counts,
        closed=lambda: with_prompt([part for part in parts if not _goes_with_context(part)]),
        open=lambda: with_prompt([Words(part.text) if isinstance(part, Document) else part for part in parts]),
    )


def _goes_with_context(part: Part) -> bool:
    return isinstance(part, Document) or (isinstance(part, Words) and part.with_context)
