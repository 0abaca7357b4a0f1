"""Training tasks as pure functions: the text of a record becomes a Sample for one decoder (paper, section 4; design 7).

Reconstruction:  [bos] ⟨context⟩ the same text.      Continuation:  [bos] prefix ⟨context⟩ continuation.

The first token of a target is input only: behind a context no row predicts it, and so that the validation variants
compare the same targets it is left out where a row could.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from arc_ds.data.order import Task
from arc_ds.data.segments import MARKERS, Marker, Sample, Segment
from arc_ds.data.text_views import TextViews, keep_first, keep_last
from arc_ds.data.tokenizers import Tokenizer
from arc_ds.errors import DataError

_MARKER_OF: dict[Task, Marker] = {"reconstruction": "rec", "continuation": "cont"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskLimits:
    """Sizes and layout of the pretraining tasks.

    max_context: encoder tokens, at least 1. max_prefix, max_continuation: decoder tokens, at least 0 and 2.
    bos: whether a decoder sequence begins with the tokenizer's begin-of-text where it has one.
    markers: those in use; the contexts of another task get none. DataError on a size out of range.
    """

    max_context: int = 256
    max_prefix: int = 256
    max_continuation: int = 256
    bos: bool = True
    markers: frozenset[Marker] = frozenset(MARKERS)

    def __post_init__(self) -> None:
        if self.max_context < 1 or self.max_prefix < 0 or self.max_continuation < 2:
            raise DataError(
                f"context, prefix and continuation of {self.max_context}, {self.max_prefix} and "
                f"{self.max_continuation} tokens were asked for; expected at least 1, 0 and 2. Change the data section."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A sample with one context, and what that context says.

    context_decoder_ids: the context's text in the decoder's tokens. degraded: the record was too short for the
    continuation asked for and became a reconstruction.
    """

    sample: Sample
    context_text: str
    context_decoder_ids: tuple[int, ...]
    degraded: bool = False


def make_example(
    text: str, *, task: Task, seed: int, encoder: Tokenizer, decoder: Tokenizer, limits: TaskLimits
) -> Example:
    """The example that a record's text gives; `seed` (64 bits) chooses the window of a text longer than the task needs.

    A text too short for a continuation becomes a reconstruction, marked `degraded`. DataError where it is too short for
    that as well: fewer than two decoder tokens.
    """
    views = TextViews(text, encoder, decoder)
    bos = (decoder.bos_id,) if limits.bos and decoder.bos_id is not None else ()
    if task == "continuation":
        example = _continuation(views, seed, bos, limits)
        if example is not None:
            return example
    example = _reconstruction(views, seed, bos, limits)
    if example is None:
        raise DataError(
            f"the text {text[:40]!r} gives fewer than two decoder tokens to repeat. Build the shards with a larger "
            "min_tokens, or set data.on_error: skip."
        )
    return replace(example, degraded=task == "continuation")


def _reconstruction(views: TextViews, seed: int, bos: tuple[int, ...], limits: TaskLimits) -> Example | None:
    """Compress a window of the text and repeat it."""
    start = _window_start(views, seed, limits.max_context)
    end = views.cut(start, limits.max_context)
    target = views.decoder_piece(start, end).ids.tolist()
    return _example("reconstruction", views, (start, end), bos, target, limits)


def _continuation(views: TextViews, seed: int, bos: tuple[int, ...], limits: TaskLimits) -> Example | None:
    """Plain prefix, compressed context, and the text behind it to continue with.

    A text shorter than all three together is shared out in their proportion.
    """
    total = limits.max_prefix + limits.max_context + limits.max_continuation
    num_tokens = min(views.num_encoder_tokens, total)
    start = _window_start(views, seed, total)
    middle = views.cut(start, num_tokens * limits.max_prefix // total)
    end = views.cut(middle, max(num_tokens * limits.max_context // total, 1))
    target_end = views.cut(end, num_tokens - (views.token_at(end) - views.token_at(start)))
    prefix = keep_last(views.decoder_piece(start, middle), limits.max_prefix)
    target = keep_first(views.decoder_piece(end, target_end), limits.max_continuation)
    return _example("continuation", views, (middle, end), (*bos, *prefix), target, limits)


def _window_start(views: TextViews, seed: int, num_tokens: int) -> int:
    """Where a window of `num_tokens` encoder tokens begins: anywhere that leaves room for it."""
    spare = views.num_encoder_tokens - num_tokens
    return views.cut(0, seed % (spare + 1)) if spare > 0 else 0


def _example(
    task: Task,
    views: TextViews,
    span: tuple[int, int],
    before: tuple[int, ...],
    target: list[int],
    limits: TaskLimits,
) -> Example | None:
    """Lay the pieces out; None where there is no context or no target to predict."""
    if span[0] == span[1] or len(target) < 2:
        return None
    marker = _MARKER_OF[task]
    context = Segment.context(views.encoder_ids(*span), marker if marker in limits.markers else None)
    head = (Segment.text(before),) if before else ()
    tail = (Segment.text(target[:1]), Segment.text(target[1:], in_loss=True))
    return Example(
        sample=Sample(task, (*head, context, *tail)),
        context_text=views.text[slice(*span)],
        context_decoder_ids=tuple(views.decoder_piece(*span).ids.tolist()),
    )


def closed(example: Example) -> Sample:
    """The sample without its context: what the decoder knows by itself. Same targets."""
    segments = tuple(segment for segment in example.sample.segments if segment.kind == "text")
    return replace(example.sample, segments=segments)


def open_(example: Example) -> Sample:
    """The sample with the context's text in place of the context: what the text itself would give. Same targets."""
    text = Segment.text(example.context_decoder_ids)
    segments = tuple(text if segment.kind == "context" else segment for segment in example.sample.segments)
    return replace(example.sample, segments=segments)


def mismatched(examples: Sequence[Example]) -> tuple[Sample, ...]:
    """The samples, each with the context of the next one of its task. Same targets.

    DataError where a task has a single example, or the next one's context is the same.
    """
    places: dict[str, list[int]] = {}
    for idx, example in enumerate(examples):
        places.setdefault(example.sample.task, []).append(idx)
    samples: list[Sample] = [example.sample for example in examples]
    for task, members in places.items():
        for idx, other in zip(members, members[1:] + members[:1], strict=True):
            own, others = _context(examples[idx].sample), _context(examples[other].sample)
            if own.ids == others.ids:
                raise DataError(
                    f"validation of {task} needs another context for each of its {len(members)} samples, and sample "
                    f"{idx} has none. Give more held-out records, or leave out repeated ones."
                )
            segments = tuple(others if s.kind == "context" else s for s in samples[idx].segments)
            samples[idx] = replace(samples[idx], segments=segments)
    return tuple(samples)


def _context(sample: Sample) -> Segment:
    return next(segment for segment in sample.segments if segment.kind == "context")
