"""One text as two tokenizers read it, and where both can cut it.

Shape letters: N tokens.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from arc_ds.data.tasks.script import encode_together
from arc_ds.data.tokenizers import Encoding, Tokenizer

_MAX_SNAP_TOKENS = 16


class TextViews:
    """A text in the encoder's and the decoder's tokens; tokenised once by each, once in all where they are the same.

    A cut is a character position. Cuts fall where both tokenisations have a boundary, if there is one near; so pieces
    are slices of both, and the decoder's pieces joined are its own reading of the whole text.
    """

    def __init__(self, text: str, encoder: Tokenizer, decoder: Tokenizer) -> None:
        self.text = text
        self._decoder_tokenizer = decoder
        self._are_same = decoder.fingerprint == encoder.fingerprint
        self.encoder = encoder.encode_with_ends(text)
        self._encoder_reached = np.maximum.accumulate(self.encoder.ends)
        self.decoder, self._decoder_reached = self.encoder, self._encoder_reached
        if not self._are_same:
            self.decoder = decoder.encode_with_ends(text)
            self._decoder_reached = np.maximum.accumulate(self.decoder.ends)

    @property
    def num_encoder_tokens(self) -> int:
        return len(self.encoder.ids)

    def cut(self, start: int, num_tokens: int) -> int:
        """The character where a piece of at most `num_tokens` encoder tokens that begins at the cut `start` ends.

        Equal to `start` where not even one character fits. The end moves back to a shared boundary if there is one
        within a quarter of the piece, and at most 16 tokens.
        """
        last = self.token_at(start) + num_tokens
        if last >= self.num_encoder_tokens:
            return len(self.text)
        reached = max(int(self._encoder_reached[last]), start)
        if self._are_same or self._decoder_reached[self._decoder_reached.searchsorted(reached)] == reached:
            return reached
        first = last - min(_MAX_SNAP_TOKENS, num_tokens // 4)
        near = self._encoder_reached[first : last + 1]
        shared = near[self._decoder_reached[self._decoder_reached.searchsorted(near)] == near]
        return int(shared[-1]) if len(shared) and shared[-1] > start else reached

    def token_at(self, cut: int) -> int:
        """The number of encoder tokens in front of a cut."""
        return int(self._encoder_reached.searchsorted(cut))

    def encoder_ids(self, start: int, end: int) -> NDArray[np.int64]:
        """The encoder's tokens between two cuts, int64 [N]. Not to be written to: a slice of the whole text's."""
        return self.encoder.ids[self.token_at(start) : self.token_at(end)]

    def decoder_piece(self, start: int, end: int) -> Encoding:
        """The decoder's tokens between two cuts: a slice, or where a cut is not shared the piece read by itself, as the
        middle of a text unless it begins this one."""
        first, last = int(self._decoder_reached.searchsorted(start)), int(self._decoder_reached.searchsorted(end))
        if self._decoder_reached[first] != start or self._decoder_reached[last] != end:
            return encode_together(self._decoder_tokenizer, [self.text[start:end]], inside=start > 0)[0]
        ends = self.decoder.ends[first : last + 1]
        return Encoding(self.decoder.ids[first:last], np.maximum(ends - start, -1))


def keep_first(piece: Encoding, max_tokens: int) -> NDArray[np.int64]:
    """The first tokens of a piece, at most `max_tokens` and ending with a whole character."""
    end = min(max_tokens, len(piece.ids))
    while piece.ends[end] < 0:
        end -= 1
    return piece.ids[:end]


def keep_last(piece: Encoding, max_tokens: int) -> NDArray[np.int64]:
    """The last tokens of a piece, at most `max_tokens` and beginning with a whole character."""
    start = max(len(piece.ids) - max_tokens, 0)
    while piece.ends[start] < 0:
        start += 1
    return piece.ids[start:]
