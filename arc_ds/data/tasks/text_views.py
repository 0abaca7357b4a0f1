"""One text in the tokens of two tokenizers, and the places at which both can cut it.

Shape letters: N tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from arc_ds.tokenizers import Encoding, Tokenizer, encode_together

_MAX_SNAP_TOKENS = 16


class Cut(NamedTuple):
    """A place in a text, between two characters.

    character: number of characters before it.
    encoder_token: number of encoder tokens before it.
    decoder_token: number of decoder tokens before it. None if a decoder token spans the place.
    """

    character: int
    encoder_token: int
    decoder_token: int | None


BEGINNING = Cut(0, 0, 0)


class TextViews:
    """A text in the encoder's and the decoder's tokens. If both tokenizers are the same, it is tokenised only once.

    A cut is a boundary of both tokenisations if there is one nearby. Pieces are then slices of both, and the decoder's
    pieces together are its tokens of the whole text.
    """

    def __init__(self, text: str, encoder: Tokenizer, decoder: Tokenizer) -> None:
        self.text = text
        self._decoder_tokenizer = decoder
        self._are_same = decoder.fingerprint == encoder.fingerprint
        self.encoder = encoder.encode_with_ends(text)
        self.decoder = self.encoder if self._are_same else decoder.encode_with_ends(text)
        self.num_encoder_tokens = len(self.encoder.ids)

    def cut(self, start: Cut, num_tokens: int) -> Cut:
        """The end of a piece that begins at `start` and has at most `num_tokens` encoder tokens.

        The end moves back to a shared boundary if there is one within a quarter of the piece, and at most 16 tokens.
        If not even one character fits, the end is `start`.
        """
        last = start.encoder_token + num_tokens
        if last >= self.num_encoder_tokens:
            return Cut(len(self.text), self.num_encoder_tokens, len(self.decoder.ids))
        end = self.encoder.boundary_before(last)
        if end <= start.encoder_token:
            return start
        found = self._cut_at(end)
        if found.decoder_token is not None:
            return found
        near = self.encoder.ends[last - min(_MAX_SNAP_TOKENS, num_tokens // 4) : end]
        shared = near[self.decoder.ends[self.decoder.ends.searchsorted(near)] == near]
        if len(shared) and shared[-1] > start.character:
            return self._cut_at(int(self.encoder.ends.searchsorted(shared[-1])))
        return found

    def _cut_at(self, token: int) -> Cut:
        """The cut at a boundary of encoder tokens that is also a boundary of characters."""
        character = int(self.encoder.ends[token])
        if self._are_same:
            return Cut(character, token, token)
        place = int(self.decoder.ends.searchsorted(character))
        return Cut(character, token, place if self.decoder.ends[place] == character else None)

    def between(self, start: Cut, end: Cut) -> str:
        """The text between two cuts."""
        return self.text[start.character : end.character]

    def encoder_ids(self, start: Cut, end: Cut) -> NDArray[np.integer]:
        """The encoder's tokens between two cuts, integers [N]: a slice of the whole text's. Do not write to it."""
        return self.encoder.ids[start.encoder_token : end.encoder_token]

    def decoder_ids(self, start: Cut, end: Cut) -> NDArray[np.integer]:
        """The ids of `decoder_piece`."""
        return self.decoder_piece(start, end).ids

    def decoder_piece(self, start: Cut, end: Cut) -> Encoding:
        """The decoder's tokens between two cuts, as a slice of the whole text's.

        If a cut is inside a decoder token, the piece is tokenised by itself, as the middle of a text unless it begins
        this text.
        """
        first, last = start.decoder_token, end.decoder_token
        if first is None or last is None:
            return encode_together(self._decoder_tokenizer, [self.between(start, end)], inside=start.character > 0)[0]
        return Encoding(self.decoder.ids[first:last], self.decoder.ends[first : last + 1] - start.character)
