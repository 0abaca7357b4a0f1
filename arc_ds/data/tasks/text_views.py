"""One text as two tokenizers read it, and where both can cut it.

Shape letters: N tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from arc_ds.tokenizers import Encoding, Tokenizer, encode_together

_MAX_SNAP_TOKENS = 16


class Cut(NamedTuple):
    """A place in a text, between two characters: how many of them stand in front of it, how many of the encoder's
    tokens, and how many of the decoder's, None where one of these reaches over it."""

    character: int
    encoder_token: int
    decoder_token: int | None


BEGINNING = Cut(0, 0, 0)


class TextViews:
    """A text in the encoder's and the decoder's tokens; tokenised once by each, once in all where they are the same.

    Cuts fall where both tokenisations have a boundary, if there is one near; so pieces are slices of both, and the
    decoder's pieces joined are its own reading of the whole text.
    """

    def __init__(self, text: str, encoder: Tokenizer, decoder: Tokenizer) -> None:
        self.text = text
        self._decoder_tokenizer = decoder
        self._are_same = decoder.fingerprint == encoder.fingerprint
        self.encoder = encoder.encode_with_ends(text)
        self.decoder = self.encoder if self._are_same else decoder.encode_with_ends(text)
        self.num_encoder_tokens = len(self.encoder.ids)

    def cut(self, start: Cut, num_tokens: int) -> Cut:
        """Where a piece of at most `num_tokens` encoder tokens ends that begins at `start`.

        At `start` where not even one character fits. The end moves back to a shared boundary if there is one within a
        quarter of the piece, and at most 16 tokens.
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
        """The cut at a boundary of the encoder's tokens that is one of characters."""
        character = int(self.encoder.ends[token])
        if self._are_same:
            return Cut(character, token, token)
        place = int(self.decoder.ends.searchsorted(character))
        return Cut(character, token, place if self.decoder.ends[place] == character else None)

    def between(self, start: Cut, end: Cut) -> str:
        """The text between two cuts."""
        return self.text[start.character : end.character]

    def encoder_ids(self, start: Cut, end: Cut) -> NDArray[np.integer]:
        """The encoder's tokens between two cuts, integers [N]. Not to be written to: a slice of the whole text's."""
        return self.encoder.ids[start.encoder_token : end.encoder_token]

    def decoder_ids(self, start: Cut, end: Cut) -> NDArray[np.integer]:
        """The ids of `decoder_piece`."""
        first, last = start.decoder_token, end.decoder_token
        if first is None or last is None:
            return self.decoder_piece(start, end).ids
        return self.decoder.ids[first:last]

    def decoder_piece(self, start: Cut, end: Cut) -> Encoding:
        """The decoder's tokens between two cuts: a slice, or where a cut is not shared the piece read by itself, as the
        middle of a text unless it begins this one."""
        first, last = start.decoder_token, end.decoder_token
        if first is None or last is None:
            return encode_together(self._decoder_tokenizer, [self.between(start, end)], inside=start.character > 0)[0]
        return Encoding(self.decoder.ids[first:last], self.decoder.ends[first : last + 1] - start.character)
