"""Texts that stand one after the other, read as the one text that they make."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from arc_ds.tokenizers.base import Encoding, Tokenizer

# Texts that a following text can be told from: by the second where it begins with white space, else by the first.
_ANCHORS = ("\n", "a")


def read_together(tokenizer: Tokenizer, texts: Sequence[str], *, inside: bool) -> list[NDArray[np.integer]]:
    """The ids of texts that stand one behind the other, as they read as one text: integers, one array a text.

    inside: they do not begin a text (sentencepiece would put a space in front of one that does). Where a token reaches
    from one text into the next, each is read by itself.
    """
    return [encoding.ids for encoding in encode_together(tokenizer, texts, inside=inside)]


def encode_together(tokenizer: Tokenizer, texts: Sequence[str], *, inside: bool) -> list[Encoding]:
    """As `read_together`, with the characters that the tokens end at, counted from the beginning of each text."""
    for anchor in _ANCHORS if inside else ("",):
        pieces = _slices(tokenizer.encode_with_ends("".join((anchor, *texts))), [anchor, *texts])
        if pieces is not None:
            return pieces[1:]
    if len(texts) == 1:
        return [tokenizer.encode_with_ends(texts[0])]
    return [encode_together(tokenizer, [text], inside=inside or place > 0)[0] for place, text in enumerate(texts)]


def _slices(encoding: Encoding, texts: Sequence[str]) -> list[Encoding] | None:
    """Each of the joined texts; None where one of them does not end with a token."""
    cuts = np.cumsum([0, *(len(text) for text in texts)])
    places = encoding.ends.searchsorted(cuts)
    places[-1] = len(encoding.ids)
    if not np.array_equal(encoding.ends[places], cuts):
        return None
    return [
        Encoding(encoding.ids[first:last], encoding.ends[first : last + 1] - cut)
        for (first, last), cut in zip(pairwise(places.tolist()), cuts[:-1].tolist(), strict=True)
    ]
