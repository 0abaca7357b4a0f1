"""A sample as a person reads it."""

from __future__ import annotations

from collections.abc import Sequence

from arc_ds.data.segments import Segment
from arc_ds.data.tasks import Example
from arc_ds.data.tokenizers import Tokenizer

_CONTEXT, _TARGET, _DIM, _END = "\x1b[36m", "\x1b[4m", "\x1b[2m", "\x1b[0m"


def render(example: Example, encoder: Tokenizer, decoder: Tokenizer, *, title: str, colour: bool) -> str:
    """A sample as a person reads it: the context coloured (⟦…⟧ without colour), the targets underlined (__…__)."""
    sample = example.sample
    lengths = f"{sample.num_context_tokens} encoder tokens, {sample.num_text_tokens} decoder tokens"
    head = f"── {title}: {sample.task}{' (too short to continue)' if example.degraded else ''}, {lengths} ──"
    pieces = [_piece(piece, encoder, decoder, colour) for piece in _joined(sample.segments)]
    return "\n".join([f"{_DIM}{head}{_END}" if colour else head, "".join(pieces), ""])


def _joined(segments: Sequence[Segment]) -> list[Segment]:
    """The segments, a target's input-only first token joined to it, so that it decodes with what follows."""
    joined: list[Segment] = []
    for segment in segments:
        last = joined[-1] if joined else None
        if segment.in_loss and last is not None and last.kind == "text":
            joined[-1] = Segment.text((*last.ids, *segment.ids), in_loss=True)
        else:
            joined.append(segment)
    return joined


def _piece(segment: Segment, encoder: Tokenizer, decoder: Tokenizer, colour: bool) -> str:
    text = (encoder if segment.kind == "context" else decoder).decode(list(segment.ids))
    if segment.kind == "context":
        marker = f"<{segment.marker}>" if segment.marker else ""
        return f"{_CONTEXT}{text}{marker}{_END}" if colour else f"⟦{text}{marker}⟧"
    if segment.in_loss:
        return f"{_TARGET}{text}{_END}" if colour else f"__{text}__"
    return text
