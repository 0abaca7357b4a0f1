"""Reconstruction and continuation: a record's text, cut at characters (paper, section 4; design 7).

Reconstruction:  [bos] ⟨context⟩ the same text.      Continuation:  [bos] prefix ⟨context⟩ continuation.

The first token of a target is input only: behind a context no row predicts it, and so that the validation variants
compare the same targets it is left out where a row could.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from arc_ds.data.segments import Marker, Sample, Segment
from arc_ds.data.tasks.example import Example, TaskCounts
from arc_ds.data.tasks.limits import TaskLimits
from arc_ds.data.text_views import TextViews, keep_first, keep_last
from arc_ds.data.tokenizers import Tokenizer
from arc_ds.errors import DataError

PretrainingTask = Literal["reconstruction", "continuation"]
_MARKER_OF: dict[PretrainingTask, Marker] = {"reconstruction": "rec", "continuation": "cont"}


def pretraining_example(
    text: str, *, task: PretrainingTask, seed: int, encoder: Tokenizer, decoder: Tokenizer, limits: TaskLimits
) -> Example:
    """The example of a text; `seed` (64 bits) chooses the window of a text longer than the task needs.

    A text too short for a continuation becomes a reconstruction, counted as degraded. DataError where it is too short
    for that as well: fewer than two decoder tokens.
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
    return replace(example, counts=TaskCounts(degraded=int(task == "continuation")))


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


@dataclass(frozen=True, slots=True)
class _Sliced:
    """The variants of a sample that is one stretch of a text: the context's own slice, or nothing, in its place."""

    segments: tuple[Segment, ...]
    views: TextViews
    span: tuple[int, int]

    def closed(self) -> tuple[Segment, ...]:
        return tuple(segment for segment in self.segments if segment.kind == "text")

    def open(self) -> tuple[Segment, ...]:
        text = Segment.text(self.views.decoder_piece(*self.span).ids.tolist())
        return tuple(text if segment.kind == "context" else segment for segment in self.segments)


def _example(
    task: PretrainingTask,
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
    segments = (*head, context, Segment.text(target[:1]), Segment.text(target[1:], in_loss=True))
    return Example(
        sample=Sample(task, segments),
        contexts=(views.text[slice(*span)],),
        variants=_Sliced(segments, views, span),
    )
