"""Cuts a long text into sequence-sized pieces, preferably at the end of a paragraph or sentence."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from arc_ds.errors import DataError
from arc_ds.tokenizers import Tokenizer

# Patterns of paragraph, sentence and word ends, in order of preference. The cutter uses a pattern if it matches in the
# last part of the longest possible piece; that part begins at the given share of the piece.
_BREAKS = (
    (re.compile(r"\n[ \t]*\n\s*"), 0.75),
    (re.compile(r"[.!?][\"'\u201d\u2019)\]]*\s+|\n+"), 0.5),
    (re.compile(r"\s+"), 0.9),
)
_BLOCK_CHARS = 100_000  # longest block of text that the cutter tokenises at once


@dataclass(frozen=True, slots=True, kw_only=True)
class TextCutter:
    """Cuts texts into pieces of at most `max_tokens` tokens of `tokenizer`.

    No piece has fewer than `min_tokens` tokens, unless the whole text has fewer or its characters leave no choice.
    """

    tokenizer: Tokenizer
    max_tokens: int
    min_tokens: int

    def cut(self, text: str) -> Iterator[tuple[str, int]]:
        """Yield (piece, its number of tokens). The concatenated pieces equal the text.

        Raises DataError if a single character has more than `max_tokens` tokens.
        """
        begin = 0
        while begin < len(text):
            block = text[begin : begin + _BLOCK_CHARS]
            start = 0
            for end, num_tokens in self._cut_block(block, is_last=begin + len(block) == len(text)):
                yield block[start:end], num_tokens
                start = end
            begin += start

    def _cut_block(self, text: str, is_last: bool) -> Iterator[tuple[int, int]]:
        """Yield the end and token count of each piece of a block; only the last block yields its tail."""
        ends = self.tokenizer.encode_with_ends(text).ends
        start = token = 0
        while start < len(text):
            is_tail = len(ends) - 1 - token <= self.max_tokens
            if is_tail and not is_last and start > 0:
                return
            end, num_tokens = self._next_end(text, start, ends[token:])
            yield end, num_tokens
            start, token = end, int(np.searchsorted(ends, end))

    def _next_end(self, text: str, start: int, ends: NDArray[np.int64]) -> tuple[int, int]:
        """The end of the piece that begins at `start`, and the number of its tokens when tokenised alone.

        Tokenised alone, a piece may have a token or two more than inside the text. The budget therefore shrinks until
        the count fits.

        start: character position in `text`; `ends` begins at the same position.
        """
        budget = self.max_tokens
        while budget > 0:
            end = self._best_end(text, start, ends, budget)
            is_whole = start == 0 and end == len(text)  # true for most documents; avoids tokenising them again
            num_tokens = len(ends) - 1 if is_whole else len(self.tokenizer.encode(text[start:end]))
            if num_tokens <= self.max_tokens:
                return end, num_tokens
            budget -= num_tokens - self.max_tokens
        raise DataError(
            f"the characters {text[start : start + 8]!r} take more than max_tokens = {self.max_tokens} tokens each. "
            "Raise max_tokens."
        )

    def _best_end(self, text: str, start: int, ends: NDArray[np.int64], budget: int) -> int:
        """The end of the text if the rest fits the budget, else the last good break within the budget."""
        remaining = len(ends) - 1
        if remaining <= budget:
            return len(text)
        limit = min(budget, max(remaining - self.min_tokens, 1))  # leaves at least min_tokens for the tail
        allowed = ends[1 : limit + 1]
        allowed = allowed[allowed > start]
        if len(allowed) == 0:  # the next character exceeds the budget: return it whole, the caller checks the count
            return int(ends[1:][ends[1:] > start][0])
        furthest = int(allowed[-1])
        for pattern, share in _BREAKS:
            breaks = _break_positions(text, pattern, start + int((furthest - start) * share), furthest)
            places = np.searchsorted(allowed, breaks)
            fitting = [
                end for end, place in zip(breaks, places, strict=True) if end <= furthest and allowed[place] == end
            ]
            if fitting:
                return max(fitting)
        return furthest


def _break_positions(text: str, pattern: re.Pattern[str], first: int, last: int) -> list[int]:
    """Character positions before and after the trailing white space of each match between `first` and about `last`."""
    positions = []
    for match in pattern.finditer(text, first, last + 2):
        positions += [match.end(), match.start() + len(match.group().rstrip())]
    return positions
