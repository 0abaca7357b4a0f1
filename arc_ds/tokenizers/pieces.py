"""Sentencepiece's byte-pair merging by the fast engine, where it provably gives sentencepiece's ids.

Sentencepiece merges the neighbours whose joined text is the piece of the highest score, the leftmost of equals:
tiktoken's rule, over characters instead of bytes. What differs is met so:
- the bytes of each character that pieces hold are put together first, by ranks in front of all others;
- no piece continues behind a space, so words are merged apart, each with the space in front of it;
- runs of spaces, whose pieces share one score, are left to sentencepiece, as are texts with a character of no piece
  that begins like one, with a literal U+2581, or with a user-defined symbol.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from arc_ds.tokenizers.engine import BytePairEngine, engine_library, has_long_run

_SPACE = "\u2581"
_WORDS = r" *[^ ]+| +"
_SPACE_RUN = re.compile(r" {2,}[^ ]*")
# Numbers of sentencepiece_model.proto: kinds of pieces, and of models.
_NORMAL, _USER_DEFINED, _UNUSED = 1, 4, 5
_BPE = 2
_UNMERGED = "\ue000"  # of no piece, so it comes out as bytes, which are not merged with what follows


class _Piece(NamedTuple):
    idx: int
    text: str
    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceMerger:
    """Encodes as `processor` does. leads_with_space: the model puts a space in front of every text. symbols: the
    user-defined ones, None where there are none."""

    processor: Any
    engine: BytePairEngine
    leads_with_space: bool
    symbols: re.Pattern[str] | None

    def encode(self, text: str) -> NDArray[np.int64] | None:
        """Ids of the text, int64 [N]; None where sentencepiece itself has to be asked."""
        if not text or _SPACE in text or has_long_run(text) or (self.symbols and self.symbols.search(text)):
            return None
        whole = " " + text if self.leads_with_space else text
        ids = np.concatenate(list(self._around_space_runs(whole))) if "  " in whole else self.engine.encode(whole)
        return None if len(ids) and ids.min() < 0 else ids

    def _around_space_runs(self, whole: str) -> Iterator[NDArray[np.int64]]:
        """Ids of the stretches between runs of spaces, and of each run with its word, in turn."""
        done = 0
        for run in _SPACE_RUN.finditer(whole):
            yield self.engine.encode(whole[done : run.start()])
            word = run.group()[1:] if self.leads_with_space else run.group()
            yield np.array(self.processor.encode(word), dtype=np.int64)
            done = run.end()
        yield self.engine.encode(whole[done:])


def build_merger(processor: Any, raw: bytes) -> PieceMerger | None:
    """The merger of a loaded model and the bytes of its file; None where it is not sure to give the model's ids."""
    library, settings = engine_library(), _Settings.read(raw)
    if library is None or settings is None:
        return None
    count = range(processor.vocab_size())
    byte_ids = {int(processor.id_to_piece(idx)[3:5], 16): idx for idx in count if processor.is_byte(idx)}
    pieces = [_Piece(idx, processor.id_to_piece(idx), processor.get_score(idx)) for idx in settings.normal_ids]
    words = [piece for piece in pieces if piece.text.strip(_SPACE) and len(piece.text) > 1]
    starts_a_word = all(_SPACE not in piece.text[1:] for piece in words)
    scores_differ = len({piece.score for piece in words}) == len(words)
    if len(byte_ids) < 256 or not starts_a_word or not scores_differ:
        return None
    if not all(_comes_out_as_itself(processor, piece, settings.leads_with_space) for piece in words):
        return None
    characters = [piece for piece in pieces if len(piece.text) == 1]
    ranks, ids = _ranks(byte_ids, characters, sorted(words, key=lambda piece: -piece.score))
    engine = BytePairEngine(library, pattern=_WORDS, ranks=ranks, ids=ids)
    return PieceMerger(
        processor=processor,
        engine=engine,
        leads_with_space=settings.leads_with_space,
        symbols=settings.symbols,
    )


def _ranks(
    byte_ids: dict[int, int], characters: list[_Piece], words: list[_Piece]
) -> tuple[dict[bytes, int], NDArray[np.int64]]:
    """Ranks of byte sequences, and the id of each: bytes, parts of characters (-1), characters, words."""
    spelled = {_bytes_of(piece): piece.idx for piece in characters}
    entries = {bytes([byte]): spelled.get(bytes([byte]), idx) for byte, idx in byte_ids.items()}
    entries |= {raw[:end]: -1 for raw in spelled for end in range(2, len(raw))}
    entries |= {raw: idx for raw, idx in spelled.items() if len(raw) > 1}
    entries |= {_bytes_of(piece): piece.idx for piece in words}
    ranks = {raw: rank for rank, raw in enumerate(entries)}
    return ranks, np.fromiter(entries.values(), dtype=np.int64, count=len(entries))


def _bytes_of(piece: _Piece) -> bytes:
    return piece.text.replace(_SPACE, " ").encode("utf-8")


def _comes_out_as_itself(processor: Any, piece: _Piece, leads_with_space: bool) -> bool:
    """Whether the model gives a piece's text as that piece alone."""
    text = piece.text.replace(_SPACE, " ")
    if leads_with_space and text.startswith(" "):
        return processor.encode(text[1:]) == [piece.idx]
    return processor.encode(_UNMERGED + text) == [*processor.encode(_UNMERGED), piece.idx]


class _Settings(NamedTuple):
    """What the model file says of itself: its normal pieces, and how text is prepared."""

    normal_ids: list[int]
    leads_with_space: bool
    symbols: re.Pattern[str] | None

    @classmethod
    def read(cls, raw: bytes) -> _Settings | None:
        """From a serialised ModelProto (sentencepiece_model.proto); None where the model is of another kind than
        byte-pair merging with byte fallback of text as it is, or has unused pieces."""
        kinds: list[int] = []
        symbols: list[str] = []
        trainer: dict[int, Any] = {}
        normalizer: dict[int, Any] = {}
        for number, value in _fields(raw):
            if number == 1:
                piece = dict(_fields(value))
                kinds.append(piece.get(3, _NORMAL))
                if kinds[-1] == _USER_DEFINED:
                    symbols.append(piece[1].decode("utf-8"))
            elif number == 2:
                trainer = dict(_fields(value))
            elif number == 3:
                normalizer = dict(_fields(value))
        merges_bytes = trainer.get(3, 1) == _BPE and trainer.get(35, 0) and not trainer.get(24, 0)
        keeps_text = not normalizer.get(2) and not normalizer.get(4, 1) and normalizer.get(5, 1)
        if not merges_bytes or not keeps_text or _UNUSED in kinds:
            return None
        normal_ids = [idx for idx, kind in enumerate(kinds) if kind == _NORMAL]
        pattern = re.compile("|".join(map(re.escape, symbols))) if symbols else None
        return cls(normal_ids, bool(normalizer.get(3, 1)), pattern)


def _fields(raw: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of the fields of a protobuf message: int for varints, bytes for anything else."""
    place = 0
    while place < len(raw):
        key, place = _varint(raw, place)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, place = _varint(raw, place)
            yield number, value
            continue
        length = {1: 8, 5: 4}.get(wire)
        if length is None:
            length, place = _varint(raw, place)
        yield number, raw[place : place + length]
        place += length


def _varint(raw: bytes, place: int) -> tuple[int, int]:
    """An unsigned protobuf varint that begins at `place`, and where it ends."""
    value = shift = 0
    while True:
        byte = raw[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place
