"""Tokenising consecutive texts as one joined text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from arc_ds.tokenizers.base import Encoding, Tokenizer

# Texts placed before the first text so that its start is a token boundary: "\n" works unless it begins with white
# space, and then "a" does.
_ANCHORS = ("\n", "a")


def read_together(tokenizer: Tokenizer, texts: Sequence[str], *, inside: bool) -> list[NDArray[np.integer]]:
    """Tokenise consecutive texts as one joined text. Returns the ids, one integer array per text.

    If a token spans two texts, each text is tokenised separately.

    inside: whether the texts continue an earlier text (sentencepiece adds a space before a text that starts one).
    """
    return [encoding.ids for encoding in encode_together(tokenizer, texts, inside=inside)]


def encode_together(tokenizer: Tokenizer, texts: Sequence[str], *, inside: bool) -> list[Encoding]:
    """As `read_together`, but returns encodings. Their `ends` count from the beginning of each text."""
    for anchor in _ANCHORS if inside else ("",):
        pieces = _slices(tokenizer.encode_with_ends("".join((anchor, *texts))), [anchor, *texts])
        if pieces is not None:
            return pieces[1:]
    if len(texts) == 1:
        return [tokenizer.encode_with_ends(texts[0])]
    return [
        encode_together(tokenizer, [text], inside=inside or any(texts[:place]))[0] for place, text in enumerate(texts)
    ]


def _slices(encoding: Encoding, texts: Sequence[str]) -> list[Encoding] | None:
    """Split an encoding into those of the joined texts; None if the end of a text is not a token boundary."""
    cuts = np.cumsum([0, *(len(text) for text in texts)])
    places = encoding.ends.searchsorted(cuts)
    places[-1] = len(encoding.ids)
    if not np.array_equal(encoding.ends[places], cuts):
        return None
    return [
        Encoding(encoding.ids[first:last], encoding.ends[first : last + 1] - cut)
        for (first, last), cut in zip(pairwise(places.tolist()), cuts[:-1].tolist(), strict=True)
    ]
