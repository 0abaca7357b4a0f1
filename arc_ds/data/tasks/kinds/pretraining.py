"""Reconstruction and continuation: a record's text, cut between characters (paper, section 4).

Reconstruction:  [bos] ⟨context⟩ the same text.      Continuation:  [bos] prefix ⟨context⟩ continuation.

The first token of a target is input only, because no row after a context predicts it. In the validation variants a row
could predict it, but they must have the same targets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from arc_ds.batch.segments import Marker, Sample, Segment, TokenIds
from arc_ds.data.tasks.contexts import first_tokens, last_tokens
from arc_ds.data.tasks.example import Example, ExampleSpec, TaskCounts, TooShortError, script_example
from arc_ds.data.tasks.limits import TaskLimits
from arc_ds.data.tasks.script import Document
from arc_ds.data.tasks.task import ChatRows, Largest, RecordMeans, SampleLengths, Task
from arc_ds.data.tasks.text_views import BEGINNING, Cut, TextViews
from arc_ds.data.tasks.texts import write_continuation, write_reconstruction
from arc_ds.shards.records import pretraining_text

_MARKER_OF: Mapping[str, Marker] = MappingProxyType({"reconstruction": "rec", "continuation": "cont"})


class _Window(NamedTuple):
    """The prefix, context and target of a sample, as cuts of its text.

    A reconstruction has no prefix, and its target is its context.

    start: start of the prefix.
    context: end of the prefix and start of the context.
    context_end: end of the context.
    target: start of the target.
    target_end: end of the target.
    """

    start: Cut
    context: Cut
    context_end: Cut
    target: Cut
    target_end: Cut


def pretraining_example(records: Sequence[dict[str, Any]], spec: ExampleSpec) -> Example:
    """The example of a record's text. If the text is longer than needed, the seed chooses a window.

    A text that is too short for a continuation becomes a reconstruction, and counts as degraded. Raises TooShortError
    if it is too short for that as well: no encoder token, or fewer than two decoder tokens.
    """
    text = pretraining_text(records[0])
    views = TextViews(text, spec.encoder, spec.decoder)
    lay_out = _chat if spec.layout.is_chat else _plain
    if spec.sample == "continuation":
        example = lay_out(views, _continuation(views, spec), spec)
        if example is not None:
            return example
    example = lay_out(views, _reconstruction(views, spec), spec._replace(sample="reconstruction"))
    if example is None:
        raise TooShortError(
            f"the text {text[:40]!r} gives no encoder token, or fewer than two decoder tokens to repeat. Build the "
            "shards with a larger min_tokens, or set data.on_error: skip."
        )
    return replace(example, counts=TaskCounts(degraded=1)) if spec.sample == "continuation" else example


def _reconstruction(views: TextViews, spec: ExampleSpec) -> _Window:
    """A window of the text to compress and repeat."""
    start = _window_start(views, spec.seed, spec.limits.max_context)
    end = views.cut(start, spec.limits.max_context)
    return _Window(start, start, end, start, end)


def _continuation(views: TextViews, spec: ExampleSpec) -> _Window:
    """Plain prefix, compressed context, and the text after it to continue with.

    A text shorter than all three together is divided in proportion to their limits.
    """
    limits = spec.limits
    total = limits.max_prefix + limits.max_context + limits.max_continuation
    num_tokens = min(views.num_encoder_tokens, total)
    start = _window_start(views, spec.seed, total)
    middle = views.cut(start, num_tokens * limits.max_prefix // total)
    end = views.cut(middle, max(num_tokens * limits.max_context // total, 1))
    target_end = views.cut(end, num_tokens - (end.encoder_token - start.encoder_token))
    return _Window(start, middle, end, end, target_end)


def _window_start(views: TextViews, seed: int, num_tokens: int) -> Cut:
    """The start of a window of `num_tokens` encoder tokens: any place that leaves enough room."""
    spare = views.num_encoder_tokens - num_tokens
    return views.cut(BEGINNING, seed % (spare + 1)) if spare > 0 else BEGINNING


def _plain(views: TextViews, window: _Window, spec: ExampleSpec) -> Example | None:
    """The pieces as slices of the text's tokens. None if there is no context or no target to predict."""
    limits, context = spec.limits, (window.context, window.context_end)
    context_ids = views.encoder_ids(*context)
    target_ids = views.decoder_ids(window.target, window.target_end)
    if spec.sample == "continuation" and len(target_ids) > limits.max_continuation:
        target_ids = views.decoder_piece(window.target, window.target_end).first(limits.max_continuation)
    if not len(context_ids) or len(target_ids) < 2:
        return None
    prefix_ids = views.decoder_ids(window.start, window.context)
    if len(prefix_ids) > limits.max_prefix:
        prefix_ids = views.decoder_piece(window.start, window.context).last(limits.max_prefix)
    head = np.concatenate((spec.bos_ids, prefix_ids), dtype=np.int64) if spec.bos_ids else prefix_ids
    segments = (
        *((Segment.text(head),) if len(head) else ()),
        Segment.context(context_ids, limits.marker(_MARKER_OF[spec.sample])),
        Segment.text(target_ids[:1]),
        Segment.text(target_ids[1:], in_loss=True),
    )
    return Example(
        sample=Sample(spec.sample, segments),
        contexts=(views.between(*context),),
        passages=(views.text,),
        closed=lambda: tuple(s for s in segments if s.kind == "text"),
        open=lambda: tuple(Segment.text(views.decoder_ids(*context)) if s.kind == "context" else s for s in segments),
    )


def _chat(views: TextViews, window: _Window, spec: ExampleSpec) -> Example | None:
    """The pieces as texts in the turns of a chat. None if there is no context or no target to predict."""
    limits, context = spec.limits, (window.context, window.context_end)
    document = Document(
        TokenIds(views.encoder_ids(*context)), views.between(*context), limits.marker(_MARKER_OF[spec.sample])
    )
    piece = views.decoder_piece(window.target, window.target_end)
    if not len(document.ids) or len(piece.ids) < 2:
        return None
    if spec.sample == "reconstruction":
        return script_example(write_reconstruction(document, spec.layout), (views.text,), spec)
    prefix_piece = views.decoder_piece(window.start, window.context)
    prefix = last_tokens(views.between(window.start, window.context), prefix_piece, limits.max_prefix)
    target = first_tokens(views.between(window.target, window.target_end), piece, limits.max_continuation)
    return script_example(write_continuation(prefix, [document], target, spec), (views.text,), spec)


def _estimate(sample: str, tokens: Sequence[int], limits: TaskLimits, _: RecordMeans | None) -> SampleLengths:
    if sample == "reconstruction":
        length = max(min(tokens[0], limits.max_context), 1)
        return SampleLengths((length,), 0, length)
    total = limits.max_prefix + limits.max_context + limits.max_continuation
    num_tokens = min(tokens[0], total)
    prefix = num_tokens * limits.max_prefix // total
    length = max(num_tokens * limits.max_context // total, 1)
    return SampleLengths((length,), prefix, max(num_tokens - prefix - length, 0))


def _largest(limits: TaskLimits, _: int, chat: ChatRows) -> Largest:
    # A reconstruction repeats the context, which can be longer than a prefix and a continuation.
    return Largest(
        contexts=1,
        context_tokens=limits.max_context,
        longest_context=limits.max_context,
        text_rows=max(limits.max_prefix + limits.max_continuation, limits.max_context) + chat.text,
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
