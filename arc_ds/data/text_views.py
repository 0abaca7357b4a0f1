"""One text as two tokenizers read it, and where both can cut it."""

from __future__ import annotations

import numpy as np

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
        self.encoder = encoder.encode_with_ends(text)
        same = decoder.fingerprint == encoder.fingerprint
        self.decoder = self.encoder if same else decoder.encode_with_ends(text)
        self._encoder_reached = np.maximum.accumulate(self.encoder.ends)
        self._decoder_reached = np.maximum.accumulate(self.decoder.ends)
        self._shared = np.intersect1d(self.encoder.ends, self.decoder.ends)

    @property
    def num_encoder_tokens(self) -> int:
        return len(self.encoder.ids)

    def cut(self, start: int, num_tokens: int) -> int:
        """The character where a piece of at most `num_tokens` encoder tokens that begins at the cut `start` ends.

        Equal to `start` where not even one character fits. The end moves back to a shared boundary if there is one
        within a quarter of the piece, and at most 16 tokens.
        """
        first = self.token_at(start)
        last = first + num_tokens
        if last >= self.num_encoder_tokens:
            return len(self.text)
        reached = int(self._encoder_reached[last])
        near = int(self._encoder_reached[last - min(_MAX_SNAP_TOKENS, num_tokens // 4)])
        shared = int(self._shared[np.searchsorted(self._shared, reached, side="right") - 1])
        return shared if shared >= near and shared > start else max(reached, start)

    def token_at(self, cut: int) -> int:
        """The number of encoder tokens in front of a cut."""
        return int(np.searchsorted(self._encoder_reached, cut))

    def encoder_ids(self, start: int, end: int) -> list[int]:
        """The encoder's tokens between two cuts."""
        return self.encoder.ids[self.token_at(start) : self.token_at(end)].tolist()

    def decoder_piece(self, start: int, end: int) -> Encoding:
        """The decoder's tokens between two cuts: a slice, or the piece tokenised alone where a cut is not shared."""
        first, last = np.searchsorted(self._decoder_reached, [start, end])
        if self._decoder_reached[first] != start or self._decoder_reached[last] != end:
            return self._decoder_tokenizer.encode_with_ends(self.text[start:end])
        ends = self.decoder.ends[first : last + 1]
        return Encoding(self.decoder.ids[first:last], np.where(ends >= 0, ends - start, -1))


def keep_first(piece: Encoding, max_tokens: int) -> list[int]:
    """The first tokens of a piece, at most `max_tokens` and ending with a whole character."""
    whole = np.flatnonzero(piece.ends[: max_tokens + 1] >= 0)
    return piece.ids[: whole[-1]].tolist()


def keep_last(piece: Encoding, max_tokens: int) -> list[int]:
    """The last tokens of a piece, at most `max_tokens` and beginning with a whole character."""
    skipped = max(len(piece.ids) - max_tokens, 0)
    whole = np.flatnonzero(piece.ends[skipped:] >= 0)
    return piece.ids[skipped + whole[0] :].tolist()
