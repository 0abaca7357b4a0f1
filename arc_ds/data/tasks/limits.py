"""The sizes that tasks keep to."""

from __future__ import annotations

from dataclasses import dataclass

from arc_ds.data.segments import MARKERS, Marker
from arc_ds.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskLimits:
    """Sizes of the tasks of one source, and what stands around a decoder's sequence.

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
