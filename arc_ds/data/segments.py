"""Segment and Sample: what the decoder reads, before it is packed.

A sample is one decoder sequence, written as a list of segments in reading order. A *text* segment is decoder
tokens; a *context* segment is encoder tokens, which the decoder reads as compressed vectors. There are no parallel
lists: what belongs to a piece of the sequence stands in the piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["text", "context"]
Marker = Literal["cont", "rec"]
MARKERS: tuple[Marker, ...] = ("cont", "rec")


@dataclass(frozen=True, slots=True)
class Segment:
    """One piece of a decoder sequence.

    kind: "text" (ids of the decoder's tokenizer) or "context" (ids of the encoder's tokenizer).
    in_loss: text only; whether the tokens of this segment are targets. Each such token is predicted from the row
        before it, provided that row is a text row (rows of compressed tokens predict nothing).
    marker: context only; the learned vector appended after the context's groups, None for no marker.
    """

    kind: Kind
    ids: tuple[int, ...]
    in_loss: bool = False
    marker: Marker | None = None

    @staticmethod
    def text(ids: Sequence[int], in_loss: bool = False) -> Segment:
        """A piece of plain text; `ids` are decoder token ids and may be empty."""
        return Segment("text", tuple(ids), in_loss=in_loss)

    @staticmethod
    def context(ids: Sequence[int], marker: Marker | None = "cont") -> Segment:
        """A context to compress; `ids` are encoder token ids, at least one. ValueError on none or an unknown marker."""
        if len(ids) == 0:
            raise ValueError("a context segment needs at least one token: an empty context has no groups to pool")
        if marker is not None and marker not in MARKERS:
            raise ValueError(f"marker is {marker!r}; expected one of {MARKERS} or None")
        return Segment("context", tuple(ids), marker=marker)


@dataclass(frozen=True, slots=True)
class Sample:
    """One decoder sequence and the task it came from ("reconstruction", "continuation", ...)."""

    task: str
    segments: tuple[Segment, ...]

    @property
    def num_text_tokens(self) -> int:
        return sum(len(s.ids) for s in self.segments if s.kind == "text")

    @property
    def num_context_tokens(self) -> int:
        return sum(len(s.ids) for s in self.segments if s.kind == "context")
