"""Texts to compress: join passages, cut to a size, split into chunks. All cuts are between characters.

Shape letters: N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from arc_ds.batch.segments import Marker, TokenIds
from arc_ds.data.tasks.example import ExampleSpec
from arc_ds.data.tasks.limits import TaskLimits
from arc_ds.data.tasks.script import Document
from arc_ds.errors import DataError
from arc_ds.tokenizers import Encoding, read_together

_BETWEEN_PASSAGES = "\n"


@dataclass(frozen=True, slots=True)
class EncodedText:
    """A text with its encoder tokens. `marker` is that of its documents."""

    text: str
    encoding: Encoding
    marker: Marker | None

    def __len__(self) -> int:
        return len(self.encoding.ids)

    def document(self, first: int, last: int) -> Document:
        """The tokens from `first` to `last` as a document. Both must be boundaries of characters."""
        start, end = self.encoding.ends[first], self.encoding.ends[last]
        return Document(TokenIds(self.encoding.ids[first:last]), self.text[start:end], self.marker)


def read_passages(passages: Sequence[str], spec: ExampleSpec) -> EncodedText:
    """Join passages into one text, one per line. Each is tokenised separately, so its tokens can come from a cache.

    Raises DataError if they give no encoder token.
    """
    marker = spec.limits.marker("cont")
    encoded = [spec.encoder.encode_with_ends(passage) for passage in passages]
    if not any(len(one.ids) for one in encoded):
        raise DataError(
            f"the passage {passages[0][:40]!r} gives no encoder token. Correct the record, or leave it out."
        )
    if len(encoded) == 1:
        return EncodedText(passages[0], encoded[0], marker)
    (between,) = read_together(spec.encoder, [_BETWEEN_PASSAGES], inside=True)
    ids, ends, length = [encoded[0].ids], [encoded[0].ends], len(passages[0])
    for passage, one in zip(passages[1:], encoded[1:], strict=True):
        inner = np.full(len(between), length, dtype=np.int64)
        length += len(_BETWEEN_PASSAGES)
        inner[-1:] = length
        ids += [between, one.ids]
        ends += [inner, one.ends[1:] + length]
        length += len(passage)
    return EncodedText(_BETWEEN_PASSAGES.join(passages), Encoding(np.concatenate(ids), np.concatenate(ends)), marker)


def cut_document(encoded: EncodedText, max_tokens: int, key: str) -> Document:
    """The beginning of a text as one document.

    Raises DataError if not even one character fits. `key` is the config key of `max_tokens`, for this error.
    """
    last = encoded.encoding.boundary_before(max_tokens)
    if last == 0:
        raise DataError(
            f"the document {encoded.text[:20]!r} has no character that fits {max_tokens} tokens. Raise {key}."
        )
    return encoded.document(0, last)


def cut_chunks(encoded: EncodedText, first: int, last: int, limits: TaskLimits) -> tuple[tuple[Document, ...], int]:
    """Split the tokens from `first` to `last` into chunks. Also returns the token at which the last chunk ends.

    A chunk has `limits.chunk_tokens` tokens, or slightly fewer to avoid breaking a character. The last one has the
    rest. There are at most `limits.max_chunks`.

    encoded: the text.
    first, last: boundaries of characters.
    limits: sizes.

    Raises DataError if a character has more tokens than a chunk.
    """
    chunks: list[Document] = []
    while first < last and len(chunks) < limits.max_chunks:
        end = encoded.encoding.boundary_before(min(first + limits.chunk_tokens, last))
        if end <= first:
            raise DataError(
                f"a character at token {first} has more than chunk_tokens = {limits.chunk_tokens} tokens. Raise "
                "chunk_tokens."
            )
        chunks.append(encoded.document(first, end))
        first = end
    return tuple(chunks), first


def first_tokens(text: str, encoding: Encoding, max_tokens: int) -> str:
    """The beginning of a text: whole characters with at most `max_tokens` tokens."""
    return text if len(encoding.ids) <= max_tokens else text[: encoding.ends[encoding.boundary_before(max_tokens)]]


def last_tokens(text: str, encoding: Encoding, max_tokens: int) -> str:
    """The end of a text: whole characters with at most `max_tokens` tokens."""
    spare = len(encoding.ids) - max_tokens
    return text if spare <= 0 else text[encoding.ends[encoding.boundary_behind(spare)] :]
