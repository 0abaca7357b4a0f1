"""The parts of a prompt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from arc_ds.batch.segments import Marker, Segment


@dataclass(frozen=True, slots=True)
class Context:
    """A part of a prompt that the decoder reads in compressed form.

    text: the text to compress.
    marker: marker appended to the compressed vectors, or None.
    """

    text: str
    marker: Marker | None = "cont"


@dataclass(frozen=True, slots=True, eq=False)
class Vectors:
    """A part of a prompt that is compressed already: what `ArcModel.compress` gave for a text and this decoder.

    vectors: [m, D_decoder]; the marker, if any, is the last one.
    """

    vectors: Tensor


Prompt = str | Context | Vectors | Sequence[str | Context | Vectors]
# A prompt whose texts are tokens.
Parts = Sequence[Segment | Vectors]


def with_vectors(parts: Parts, vectors: Iterable[Tensor]) -> list[Segment | Vectors]:
    """The parts with the next vectors, [m, D_decoder], in place of each context."""
    remaining = iter(vectors)
    return [
        Vectors(next(remaining)) if isinstance(part, Segment) and part.kind == "context" else part for part in parts
    ]
