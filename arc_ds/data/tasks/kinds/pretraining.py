"""Reconstruction and continuation: a record's text, cut between characters (paper, section 4).

Reconstruction:  [bos] ⟨context⟩ the same text.      Continuation:  [bos] prefix ⟨context⟩ continuation.

The first token of a target is input only, because no row after a context predicts it. In the validation variants a row
could predict it, but they must have the same targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from arc_ds.batch.segments import Marker, Sample, Segment, TokenIds
from arc_ds.data.tasks.chat import Layout
from arc_ds.data.tasks.contexts import first_tokens, last_tokens
from arc_ds.data.tasks.estimate import Estimate
from arc_ds.data.tasks.example import NO_COUNTS, Example, TaskCounts, TooShortError, written_example
from arc_ds.data.tasks.limits import TaskLimits
from arc_ds.data.tasks.script import Document
from arc_ds.data.tasks.task import ChatRows, Largest, Sizing, Task
from arc_ds.data.tasks.text_views import BEGINNING, Cut, TextViews
from arc_ds.data.tasks.texts import write_continuation, write_reconstruction
from arc_ds.shards.records import pretraining_text
from arc_ds.tokenizers import Tokenizer

PretrainingTask = Literal["reconstruction", "continuation"]
_MARKER_OF: dict[PretrainingTask, Marker] = {"reconstruction": "rec", "continuation": "cont"}


@dataclass(frozen=True, slots=True)
class _Spans:
    """The prefix, context and target of a sample in its text, as four ascending cuts.

    A reconstruction has no prefix, and its target is its context.

    task: reconstruction or continuation.
    start: start of the prefix.
    context: end of the prefix and start of the context.
    context_end: end of the context.
    target_end: end of the target.
    """

    task: PretrainingTask
    start: Cut
    context: Cut
    context_end: Cut
    target_end: Cut

    @property
    def target(self) -> Cut:
        return self.context if self.task == "reconstruction" else self.context_end


def pretraining_example(
    records: Sequence[dict[str, Any]],
    *,
    sample: str,
    seed: int,
    encoder: Tokenizer,
    decoder: Tokenizer,
    limits: TaskLimits,
    layout: Layout,
) -> Example:
    """The example of a record's text. If the text is longer than needed, `seed` (64 bits) chooses a window.

    A text that is too short for a continuation becomes a reconstruction, and counts as degraded. Raises TooShortError
    if it is too short for that as well: no encoder token, or fewer than two decoder tokens.
    """
    text = pretraining_text(records[0])
    views = TextViews(text, encoder, decoder)

    def lay_out(spans: _Spans) -> Example | None:
        return _chat(views, spans, decoder, limits, layout) if layout.is_chat else _plain(views, spans, decoder, limits)

    if sample == "continuation":
        example = lay_out(_continuation(views, seed, limits))
        if example is not None:
            return example
    example = lay_out(_reconstruction(views, seed, limits))
    if example is None:
        raise TooShortError(
            f"the text {text[:40]!r} gives no encoder token, or fewer than two decoder tokens to repeat. Build the "
            "shards with a larger min_tokens, or set data.on_error: skip."
        )
    return replace(example, counts=TaskCounts(degraded=1)) if sample == "continuation" else example


def _reconstruction(views: TextViews, seed: int, limits: TaskLimits) -> _Spans:
    """A window of the text to compress and repeat."""
    start = _window_start(views, seed, limits.max_context)
    end = views.cut(start, limits.max_context)
    return _Spans("reconstruction", start, start, end, end)


def _continuation(views: TextViews, seed: int, limits: TaskLimits) -> _Spans:
    """Plain prefix, compressed context, and the text after it to continue with.

    A text shorter than all three together is divided in proportion to their limits.
    """
    total = limits.max_prefix + limits.max_context + limits.max_continuation
    num_tokens = min(views.num_encoder_tokens, total)
    start = _window_start(views, seed, total)
    middle = views.cut(start, num_tokens * limits.max_prefix // total)
    end = views.cut(middle, max(num_tokens * limits.max_context // total, 1))
    target_end = views.cut(end, num_tokens - (end.encoder_token - start.encoder_token))
    return _Spans("continuation", start, middle, end, target_end)


def _window_start(views: TextViews, seed: int, num_tokens: int) -> Cut:
    """The start of a window of `num_tokens` encoder tokens: any place that leaves enough room."""
    spare = views.num_encoder_tokens - num_tokens
    return views.cut(BEGINNING, seed % (spare + 1)) if spare > 0 else BEGINNING


@dataclass(frozen=True, slots=True)
class _Sliced:
    """The variants of a sample that is one stretch of a text.

    segments: of the sample.
    views: the text.
    span: start and end of the context.
    """

    segments: tuple[Segment, ...]
    views: TextViews
    span: tuple[Cut, Cut]

    def closed(self) -> tuple[Segment, ...]:
        return tuple(segment for segment in self.segments if segment.kind == "text")

    def open(self) -> tuple[Segment, ...]:
        text = Segment.text(self.views.decoder_ids(*self.span))
        return tuple(text if segment.kind == "context" else segment for segment in self.segments)


def _plain(views: TextViews, spans: _Spans, decoder: Tokenizer, limits: TaskLimits) -> Example | None:
    """The pieces as slices of the text's tokens. None if there is no context or no target to predict."""
    context_ids = views.encoder_ids(spans.context, spans.context_end)
    target_ids = views.decoder_ids(spans.target, spans.target_end)
    if spans.task == "continuation" and len(target_ids) > limits.max_continuation:
        target_ids = views.decoder_piece(spans.target, spans.target_end).first(limits.max_continuation)
    if not len(context_ids) or len(target_ids) < 2:
        return None
    prefix_ids = views.decoder_ids(spans.start, spans.context)
    if len(prefix_ids) > limits.max_prefix:
        prefix_ids = views.decoder_piece(spans.start, spans.context).last(limits.max_prefix)
    bos_ids = limits.bos_ids(decoder)
    head = np.concatenate((bos_ids, prefix_ids), dtype=np.int64) if bos_ids else prefix_ids
    segments = (
        *((Segment.text(head),) if len(head) else ()),
        Segment.context(context_ids, limits.marker(_MARKER_OF[spans.task])),
        Segment.text(target_ids[:1]),
        Segment.text(target_ids[1:], in_loss=True),
    )
    return Example(
        sample=Sample(spans.task, segments),
        contexts=(views.between(spans.context, spans.context_end),),
        passages=(views.text,),
        variants=_Sliced(segments, views, (spans.context, spans.context_end)),
    )


def _chat(views: TextViews, spans: _Spans, decoder: Tokenizer, limits: TaskLimits, layout: Layout) -> Example | None:
    """The pieces as texts in the turns of a chat. None if there is no context or no target to predict."""
    document = Document(
        TokenIds(views.encoder_ids(spans.context, spans.context_end)),
        views.between(spans.context, spans.context_end),
        limits.marker(_MARKER_OF[spans.task]),
    )
    before = views.between(spans.start, spans.context)
    prefix = last_tokens(before, views.decoder_piece(spans.start, spans.context), limits.max_prefix)
    following = views.between(spans.target, spans.target_end)
    piece = views.decoder_piece(spans.target, spans.target_end)
    if not len(document.ids) or len(piece.ids) < 2:
        return None
    if spans.task == "reconstruction":
        parts = write_reconstruction(document, layout)
        return written_example(spans.task, parts, (views.text,), NO_COUNTS, decoder)
    target = first_tokens(following, piece, limits.max_continuation)
    parts = write_continuation(prefix, [document], target, layout, ())
    return written_example(spans.task, parts, (views.text,), NO_COUNTS, decoder)


def _estimate(sample: str, tokens: Sequence[int], sizing: Sizing) -> Estimate:
    limits = sizing.limits
    if sample == "reconstruction":
        length = max(min(tokens[0], limits.max_context), 1)
        return Estimate(
            context_lengths=(length,),
            prefix_rows=int(limits.bos),
            suffix_rows=sizing.compressed(length) + length,
        )
    total = limits.max_prefix + limits.max_context + limits.max_continuation
    num_tokens = min(tokens[0], total)
    prefix = num_tokens * limits.max_prefix // total
    length = max(num_tokens * limits.max_context // total, 1)
    return Estimate(
        context_lengths=(length,),
        prefix_rows=prefix + int(limits.bos),
        suffix_rows=sizing.compressed(length) + max(num_tokens - prefix - length, 0),
    )


def _largest(limits: TaskLimits, _: int, chat: ChatRows) -> Largest:
    # A reconstruction repeats the context, which can be longer than a prefix and a continuation.
    return Largest(
        contexts=1,
        context_tokens=limits.max_context,
        longest_context=limits.max_context,
        said_rows=max(limits.max_prefix + limits.max_continuation, limits.max_context) + chat.text,
    )


TASK = Task(
    name="pretraining",
    record_kinds=("pretraining",),
    samples=("reconstruction", "continuation"),
    example=pretraining_example,
    estimate=_estimate,
    largest=_largest,
    size_keys="data.max_context_tokens, data.max_prefix_tokens or data.max_continuation_tokens",
)
