"""The variants of an example that validation compares. All have the same targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from arc_ds.batch.segments import Sample, Segment
from arc_ds.data.tasks.example import Example
from arc_ds.data.tasks.registry import task_of_sample
from arc_ds.errors import DataError


def closed(example: Example) -> Sample:
    """The sample without its contexts. It shows the decoder's own knowledge."""
    return replace(example.sample, segments=example.closed())


def open_(example: Example) -> Sample:
    """The sample with the contexts' text in their place. It shows the value of the text itself."""
    return replace(example.sample, segments=example.open())


def mismatched(examples: Sequence[Example]) -> tuple[Sample, ...]:
    """The samples, each with the contexts of another sample: the next one of its task that shares no passage with it.

    Passages are compared by their whole texts, including those that the samples do not use. In a few-shot sample only
    the last document, the one of the question, is exchanged. Its in-context examples still show how to answer a
    question from its document. Raises DataError if a task has no such other sample.
    """
    return tuple(
        replace(example.sample, segments=_exchanged(example.sample, _asked(_other(examples, idx).sample)))
        for idx, example in enumerate(examples)
    )


def _other(examples: Sequence[Example], idx: int) -> Example:
    """The next example of the same task that shares no passage with this one."""
    example = examples[idx]
    for other in (*examples[idx + 1 :], *examples[:idx]):
        if other.sample.task == example.sample.task and set(example.passages).isdisjoint(other.passages):
            return other
    raise DataError(
        f"validation of {example.sample.task} needs another context for each of its samples, and every other one "
        f"shares a passage with sample {idx}. Hold out more records with other passages."
    )


def _asked(sample: Sample) -> list[Segment]:
    """The contexts that the target is about, without those of in-context examples."""
    contexts = [segment for segment in sample.segments if segment.kind == "context"]
    return contexts[-1:] if task_of_sample(sample.task).asks_about_last else contexts


def _exchanged(sample: Sample, given: Sequence[Segment]) -> tuple[Segment, ...]:
    """The segments with `given` in place of the contexts that the target is about. These contexts are adjacent."""
    segments, num_asked = sample.segments, len(_asked(sample))
    last = max(place for place, segment in enumerate(segments) if segment.kind == "context")
    return (*segments[: last + 1 - num_asked], *given, *segments[last + 1 :])
