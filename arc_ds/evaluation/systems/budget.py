"""Documents shortened to a budget of decoder tokens: a part of the text, or sentences that BM25 chooses."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np

from arc_ds.batch.packing import num_outputs
from arc_ds.batch.segments import Marker, TokenIds
from arc_ds.data.tasks.contexts import EncodedText, cut_chunks
from arc_ds.data.tasks.limits import TaskLimits
from arc_ds.errors import DataError, TokenizerError
from arc_ds.inference.arc import with_factor
from arc_ds.inference.load import load_encoder_tokenizer, open_arc_folder
from arc_ds.tokenizers import Tokenizer

Part = Literal["head", "tail", "middle"]
# Decoder tokens that a document may take.
Budget = Callable[[str], int]

_MERGED_TOKENS = 4  # at the two ends of a sentence
_WORDS = re.compile(r"\w+")
_SENTENCE_ENDS = re.compile(r"(?<=[.!?])\s+|\n+")


def rows_of_arc(
    arc_dir: Path,
    encoder_backbone: Path | None = None,
    marker: Marker | None = "cont",
    *,
    pooling_factor: int | None = None,
    chunk_tokens: int | None = None,
) -> Budget:
    """The budget that gives each document as many rows as an ARC-Encoder makes of it, with its markers.

    arc_dir: an export or checkpoint. Its weights are not read.
    encoder_backbone, pooling_factor: see `ArcModel.from_checkpoint`.
    chunk_tokens: see `chunk_ids`.

    Raises WeightsError if the folder is neither, and TokenizerError if it has no tokenizer.
    """
    folder = open_arc_folder(arc_dir, encoder_backbone)
    tokenizer = load_encoder_tokenizer(folder, arc_dir)
    packing = (folder.spec if pooling_factor is None else with_factor(folder.spec, pooling_factor)).packing
    if tokenizer is None:
        raise TokenizerError(f"{arc_dir} has no tokenizer of its encoder. Give the encoder's backbone folder.")

    def rows(text: str) -> int:
        lengths = np.array([len(ids) for ids in chunk_ids(text, tokenizer, chunk_tokens)], dtype=np.int64)
        return int(num_outputs(lengths, packing).sum()) + len(lengths) * (marker is not None)

    return rows


def chunk_ids(text: str, encoder: Tokenizer, chunk_tokens: int | None) -> list[TokenIds]:
    """The encoder tokens of a document in chunks, which are cut as in training (`cut_chunks`).

    chunk_tokens: most tokens of a chunk; None: one chunk.

    Raises DataError if the document has no token.
    """
    encoding = encoder.encode_with_ends(text)
    total = len(encoding.ids)
    if not total:
        raise DataError(f"the document {text!r} has no token, so it cannot be compressed. Remove its sample.")
    limits = TaskLimits(chunk_tokens=chunk_tokens or total, max_chunks=total)
    return [chunk.ids for chunk in cut_chunks(EncodedText(text, encoding, None), 0, total, limits)[0]]


def cut_to(text: str, num_tokens: int, part: Part, tokenizer: Tokenizer) -> str:
    """At most `num_tokens` tokens of a text: the first, the last or the middle ones. A short text stays."""
    encoding = tokenizer.encode_with_ends(text)
    total = len(encoding.ids)
    for kept in range(min(num_tokens, total), 0, -1):  # a part may have more tokens alone than in the text
        start = {"head": 0, "tail": total - kept, "middle": (total - kept) // 2}[part]
        cut = text[int(encoding.ends[start]) : int(encoding.ends[start + kept])]
        if len(tokenizer.encode(cut)) <= num_tokens:
            return cut
    return ""


def choose_sentences(text: str, query: str, num_tokens: int, tokenizer: Tokenizer) -> str:
    """Sentences of a text with at most `num_tokens` tokens, in the order of the text.

    Sentences with high BM25 scores for the query come first, and those that no longer fit are left out. Equal scores go
    in the order of the text. If none fits, the best sentence is cut at its end.
    """
    sentences = split_sentences(text)
    if not sentences or len(tokenizer.encode(text)) <= num_tokens:
        return text
    order = np.argsort(-_scores(sentences, query), kind="stable").tolist()
    chosen: list[int] = []
    num_chosen = 0
    for place in order:
        # A sentence may have fewer tokens within the text than alone.
        if num_chosen + len(tokenizer.encode(sentences[place])) > num_tokens + _MERGED_TOKENS:
            continue
        longer = sorted([*chosen, place])
        num_longer = len(tokenizer.encode(_joined(sentences, longer)))
        if num_longer <= num_tokens:
            chosen, num_chosen = longer, num_longer
    return _joined(sentences, chosen) if chosen else cut_to(sentences[order[0]].strip(), num_tokens, "head", tokenizer)


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, each with the white space after it. They end at `.`, `!` or `?`, and at line ends."""
    cuts = [0, *(match.end() for match in _SENTENCE_ENDS.finditer(text)), len(text)]
    pieces = [text[start:end] for start, end in pairwise(cuts)]
    return [piece for piece in pieces if piece.strip()]


def _joined(sentences: list[str], places: list[int]) -> str:
    return "".join(sentences[place] for place in places).strip()


def _scores(sentences: list[str], query: str) -> np.ndarray:
    """BM25 scores of sentences; zeros if sentences or query have no word."""
    words = [_WORDS.findall(sentence.lower()) for sentence in sentences]
    asked = _WORDS.findall(query.lower())
    if not asked or not any(words):
        return np.zeros(len(sentences))
    import bm25s  # only this system needs the extra

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # its import sets DEBUG: two lines for each document
    index = bm25s.BM25()
    index.index(words, show_progress=False)
    return np.asarray(index.get_scores(asked))
