"""The variants of an example that validation compares; all have the same targets (design 12)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from arc_ds.data.segments import Sample, Segment, TokenIds
from arc_ds.data.tasks.example import Example
from arc_ds.errors import DataError


def closed(example: Example) -> Sample:
    """The sample without its contexts: what the decoder knows by itself."""
    return replace(example.sample, segments=example.variants.closed())


def open_(example: Example) -> Sample:
    """The sample with the contexts' text in their place: what the text itself would give."""
    return replace(example.sample, segments=example.variants.open())


def mismatched(examples: Sequence[Example]) -> tuple[Sample, ...]:
    """The samples, each with contexts of another one of its task: the next whose contexts differ.

    In few-shot samples the last document is exchanged, the one that is asked about: their in-context examples still
    show how a question is answered from its document. DataError where a task has no sample with other contexts.
    """
    samples: list[Sample] = []
    for idx, example in enumerate(examples):
        own = _asked(example.sample)
        following = (*examples[idx + 1 :], *examples[:idx])
        others = (_asked(other.sample) for other in following if other.sample.task == example.sample.task)
        given = next((other for other in others if _ids(other) != _ids(own)), None)
        if given is None:
            raise DataError(
                f"validation of {example.sample.task} needs another context for each of its samples, and sample {idx} "
                "has none. Give more held-out records, or leave out repeated ones."
            )
        samples.append(replace(example.sample, segments=_exchanged(example.sample.segments, len(own), given)))
    return tuple(samples)


def _asked(sample: Sample) -> list[Segment]:
    """The contexts that the target is about, not those of in-context examples."""
    contexts = [segment for segment in sample.segments if segment.kind == "context"]
    return contexts[-1:] if sample.task == "few_shot" else contexts


def _ids(contexts: Sequence[Segment]) -> list[TokenIds]:
    return [context.ids for context in contexts]


def _exchanged(segments: Sequence[Segment], num_asked: int, given: Sequence[Segment]) -> tuple[Segment, ...]:
    """The segments, with those given in place of the last `num_asked` contexts, which stand side by side."""
    last = max(place for place, segment in enumerate(segments) if segment.kind == "context")
    return (*segments[: last + 1 - num_asked], *given, *segments[last + 1 :])
