"""How large a sample will be, before it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

TEMPLATE_TOKENS = 8
"""The words around a question and its answer, in decoder tokens."""


class Estimate(NamedTuple):
    """What a sample will take. context_lengths: encoder tokens of each context. prefix_rows: decoder rows before the
    first compressed one, which no gradient passes through; suffix_rows: all others."""

    context_lengths: tuple[int, ...]
    prefix_rows: int
    suffix_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedMeans:
    """Means of a source's fine-tuning records, of each of which the index tells the tokens in all.

    other_tokens: those outside its passages. asked_rows: of them, those that a sample keeps. drawn_share: of the
    passages' tokens, the share that a few-shot sample reads. The defaults are guesses for shards that do not tell how
    many passages their records have: all of them are read.
    """

    other_tokens: int = 24
    asked_rows: int = 24
    drawn_share: float = 1.0
