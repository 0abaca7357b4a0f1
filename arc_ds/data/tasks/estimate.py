"""The estimated size of a sample, before it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

TEMPLATE_TOKENS = 8
"""The words around a question and its answer, in decoder tokens."""


class SampleLengths(NamedTuple):
    """The estimated lengths of a sample's parts.

    contexts: encoder tokens of each context.
    before: decoder tokens before the first context, without begin-of-text.
    after: all other decoder tokens.
    """

    contexts: tuple[int, ...]
    before: int
    after: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedMeans:
    """Means of a source's fine-tuning records. The index has only the total number of tokens of each record.

    The defaults are guesses for shards that do not record the number of passages: a sample then reads all of them.

    other_tokens: tokens of a record outside its passages.
    asked_rows: decoder rows of these that a sample keeps.
    drawn_share: share of the passages' tokens that a few-shot sample reads.
    """

    other_tokens: int = 24
    asked_rows: int = 24
    drawn_share: float = 1.0
