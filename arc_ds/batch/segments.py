"""Segment and Sample: a decoder sequence before packing.

A sample is one decoder sequence: a list of segments in reading order. A *text* segment holds decoder tokens. A
*context* segment holds encoder tokens, which the decoder reads as compressed vectors. There are no parallel lists: a
segment holds everything that belongs to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, overload

import numpy as np
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from arc_ds.errors import DataError

Kind = Literal["text", "context"]
Marker = Literal["cont", "rec"]
MARKERS: tuple[Marker, ...] = ("cont", "rec")


class TokenIds(Sequence[int]):
    """Immutable token ids, stored as an array. They behave like a tuple and equal any sequence of the same numbers.

    Tokenizers return arrays and `pack` joins arrays. Between the two, a sample's thousands of ids need not become
    thousands of objects.
    """

    __slots__ = ("array",)

    def __init__(self, ids: Sequence[int] | NDArray[np.integer] | Tensor) -> None:
        """Keeps an array of integers without a copy. The array must not be written to later.

        Raises DataError on anything but a flat sequence of whole numbers: numpy would read floats, truth values and
        bytes as numbers.
        """
        array = ids if isinstance(ids, np.ndarray) else _as_array(ids)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise DataError(
                f"token ids are a {type(ids).__name__} ({array.dtype}, shape {array.shape}); expected a flat sequence "
                "of whole numbers. Pass the ids of a tokenizer."
            )
        self.array: NDArray[np.integer] = array

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
    ids: token ids.
    in_loss: text only; whether the tokens of this segment are targets. The row before a target predicts it if that row
        is a text row (rows of compressed tokens predict nothing).
    marker: context only; the learned vector appended after the context's groups. None: no marker.
    """

    kind: Kind
    ids: TokenIds
    in_loss: bool = False
    marker: Marker | None = None

    @staticmethod
    def text(ids: Sequence[int] | NDArray[np.integer], in_loss: bool = False) -> Segment:
        """A text segment. `ids`: decoder token ids, possibly none."""
        return Segment("text", _token_ids(ids), in_loss=in_loss)

    @staticmethod
    def context(ids: Sequence[int] | NDArray[np.integer], marker: Marker | None = "cont") -> Segment:
        """A context to compress, of at least one encoder token id. Raises ValueError on none or an unknown marker."""
        ids = _token_ids(ids)
        if marker not in (None, *MARKERS):
            raise ValueError(f"marker is {marker!r}; expected one of {MARKERS} or None")
        if len(ids) == 0:
            raise ValueError("a context segment needs at least one token: an empty context has no groups to pool")
        return Segment("context", ids, marker=marker)


@dataclass(frozen=True, slots=True)
class Sample:
    """One decoder sequence, and its task ("reconstruction", "continuation", ...)."""

    task: str
    segments: tuple[Segment, ...]

    @property
    def num_text_tokens(self) -> int:
        return sum(len(s.ids) for s in self.segments if s.kind == "text")

    @property
    def num_context_tokens(self) -> int:
        return sum(len(s.ids) for s in self.segments if s.kind == "context")


def _as_array(ids: object) -> NDArray[Any]:
    if isinstance(ids, bytes | bytearray | memoryview):
        return np.array(None)  # numpy would read most of them as numbers
    try:
        array = np.array(ids.tolist() if isinstance(ids, Tensor) else ids)
    except ValueError:  # nested lists of different lengths
        return np.array(None)
    return array if array.shape != (0,) else array.astype(np.int64)  # numpy makes floats of an empty sequence


def _token_ids(ids: Sequence[int] | NDArray[np.integer]) -> TokenIds:
    return ids if isinstance(ids, TokenIds) else TokenIds(ids)
