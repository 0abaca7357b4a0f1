"""The variants of an example that validation compares; all have the same targets (design 12)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from arc_ds.data.segments import Sample, Segment
from arc_ds.data.tasks.example import Example
from arc_ds.errors import DataError


def closed(example: Example) -> Sample:
    """The sample without its contexts: what the decoder knows by itself."""
    return replace(example.sample, segments=example.variants.closed())


def open_(example: Example) -> Sample:
    """The sample with the contexts' text in their place: what the text itself would give."""
    return replace(example.sample, segments=example.variants.open())


def mismatched(examples: Sequence[Example]) -> tuple[Sample, ...]:
    """The samples, each with the contexts of the next one of its task, taken in turn where it has more of them.

    DataError where a task has a single example, or the next one's contexts are the same.
    """
    places: dict[str, list[int]] = {}
    for idx, example in enumerate(examples):
        places.setdefault(example.sample.task, []).append(idx)
    samples: list[Sample] = [example.sample for example in examples]
    for task, members in places.items():
        for idx, other in zip(members, members[1:] + members[:1], strict=True):
            own, others = _contexts(examples[idx].sample), _contexts(examples[other].sample)
            given = [others[place % len(others)] for place in range(len(own))] if others else []
            if [context.ids for context in own] == [context.ids for context in given]:
                raise DataError(
                    f"validation of {task} needs another context for each of its {len(members)} samples, and sample "
                    f"{idx} has none. Give more held-out records, or leave out repeated ones."
                )
            segments = _with_contexts(samples[idx].segments, given)
            samples[idx] = replace(samples[idx], segments=segments)
    return tuple(samples)


def _contexts(sample: Sample) -> list[Segment]:
    return [segment for segment in sample.segments if segment.kind == "context"]


def _with_contexts(segments: Sequence[Segment], contexts: Sequence[Segment]) -> tuple[Segment, ...]:
    given = iter(contexts)
    return tuple(next(given) if segment.kind == "context" else segment for segment in segments)
