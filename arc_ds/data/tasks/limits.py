"""The sizes that tasks obey."""

from __future__ import annotations

from dataclasses import dataclass, fields

from arc_ds.batch.segments import MARKERS, Marker
from arc_ds.errors import DataError

_LEAST = {"max_prefix": 0, "max_continuation": 2, "bos": 0}  # of all other sizes: 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskLimits:
    """Sizes of the samples of one source. Raises DataError on a size out of range.

    max_context: encoder tokens of a context (pretraining, question answering); at least 1.
    max_prefix: decoder tokens before a continuation's context; at least 0.
    max_continuation: decoder tokens of a continuation (pretraining, long context); at least 2.
    max_documents: encoder tokens of all documents of a few-shot sample; at least 1.
    max_passages: passages joined into one document of a few-shot sample; at least 1.
    max_question: decoder tokens of a question; at least 1.
    max_answer: decoder tokens of an answer; at least 1.
    chunk_tokens: encoder tokens of a chunk of a long context; at least 1.
    max_chunks: chunks of a long context; at least 1.
    bos: whether a plain sequence begins with the tokenizer's begin-of-text, if it has one. A chat's template decides
        this itself.
    markers: the markers in use. Contexts of other tasks have none.
    """

    max_context: int = 256
    max_prefix: int = 256
    max_continuation: int = 256
    max_documents: int = 2048
    max_passages: int = 1
    max_question: int = 256
    max_answer: int = 256
    chunk_tokens: int = 1024
    max_chunks: int = 32
    bos: bool = True
    markers: frozenset[Marker] = frozenset(MARKERS)

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), _LEAST.get(field.name, 1)
            if isinstance(value, int) and value < least:
                raise DataError(f"{field.name} is {value}; expected at least {least}. Change the data section.")

    def marker(self, name: Marker) -> Marker | None:
        """The marker if it is in use, else None."""
        return name if name in self.markers else None
