"""Segment and Sample: what the decoder reads, before it is packed.

A sample is one decoder sequence, written as a list of segments in reading order. A *text* segment is decoder
tokens; a *context* segment is encoder tokens, which the decoder reads as compressed vectors. There are no parallel
lists: what belongs to a piece of the sequence stands in the piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, overload

import numpy as np
from numpy.typing import DTypeLike, NDArray

Kind = Literal["text", "context"]
Marker = Literal["cont", "rec"]
MARKERS: tuple[Marker, ...] = ("cont", "rec")


class TokenIds(Sequence[int]):
    """Token ids that never change, kept as an array and read as a tuple: equal to any sequence of the same numbers.

    Tokenizers give arrays and `pack` joins arrays, and between them a sample's thousands of ids need not become
    thousands of objects.
    """

    __slots__ = ("array",)

    def __init__(self, ids: Sequence[int] | NDArray[np.integer]) -> None:
        """An array of integers is kept as it is, without a copy; it must not be written to later."""
        # A tuple of no number would become an array of floats.
        self.array: NDArray[np.integer] = ids if isinstance(ids, np.ndarray) else np.array(ids, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.array)

    @overload
    def __getitem__(self, place: int) -> int: ...
    @overload
    def __getitem__(self, place: slice) -> TokenIds: ...
    def __getitem__(self, place: int | slice) -> int | TokenIds:
        return TokenIds(self.array[place]) if isinstance(place, slice) else int(self.array[place])

    def __iter__(self) -> Iterator[int]:
        return iter(self.array.tolist())

    def __add__(self, other: Sequence[int]) -> TokenIds:
        return TokenIds(np.concatenate((self.array, TokenIds(other).array)))

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        return self.array.astype(dtype or self.array.dtype, copy=bool(copy))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, TokenIds):
            return np.array_equal(self.array, other.array)
        return tuple(self) == tuple(other) if isinstance(other, tuple | list) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self))


class Segment(NamedTuple):
    """One piece of a decoder sequence.

    kind: "text" (ids of the decoder's tokenizer) or "context" (ids of the encoder's tokenizer).
    in_loss: text only; whether the tokens of this segment are targets. Each such token is predicted from the row
        before it, provided that row is a text row (rows of compressed tokens predict nothing).
    marker: context only; the learned vector appended after the context's groups, None for no marker.
    """

    kind: Kind
    ids: TokenIds
    in_loss: bool = False
    marker: Marker | None = None

    @staticmethod
    def text(ids: Sequence[int] | NDArray[np.integer], in_loss: bool = False) -> Segment:
        """A piece of plain text; `ids` are decoder token ids and may be empty."""
        return Segment("text", _token_ids(ids), in_loss=in_loss)

    @staticmethod
    def context(ids: Sequence[int] | NDArray[np.integer], marker: Marker | None = "cont") -> Segment:
        """A context to compress; `ids` are encoder token ids, at least one. ValueError on none or an unknown marker."""
        if len(ids) == 0:
            raise ValueError("a context segment needs at least one token: an empty context has no groups to pool")
        if marker is not None and marker not in MARKERS:
            raise ValueError(f"marker is {marker!r}; expected one of {MARKERS} or None")
        return Segment("context", _token_ids(ids), marker=marker)


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


def _token_ids(ids: Sequence[int] | NDArray[np.integer]) -> TokenIds:
    return ids if isinstance(ids, TokenIds) else TokenIds(ids)
