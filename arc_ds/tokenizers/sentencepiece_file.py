"""Tokenizers of the sentencepiece library (Llama 2, Mistral v1 to v7)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from arc_ds.errors import TokenizerError
from arc_ds.tokenizers.base import SUPPORTED, Encoding, Tokenizer, checked, ends_of_bytes, require, sha256_of


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model that preserves every character. Its fingerprint covers the bytes of the model file."""

    def __init__(self, processor: Any, raw: bytes) -> None:
        self._processor = processor
        self._raw = raw
        self.vocab_size = int(processor.vocab_size())
        self.bos_id = _id_or_none(processor.bos_id())
        self.eos_id = _id_or_none(processor.eos_id())
        self.fingerprint = sha256_of(b"sentencepiece", raw)
        controls = [idx for idx in range(self.vocab_size) if processor.is_control(idx)]
        self.special_ids: Mapping[str, int] = {processor.id_to_piece(idx): idx for idx in controls}
        silent = {*controls, *(idx for idx in range(self.vocab_size) if processor.is_unused(idx))}
        self.text_vocab_size = 1 + max(set(range(self.vocab_size)) - silent, default=-1)
        self._lengths = np.array([self._num_bytes(idx) for idx in range(self.vocab_size)], dtype=np.int64)
        probe = processor.encode("a")
        self._lead = max(int(self._lengths[probe].sum()) - 1, 0)

    @classmethod
    def from_bytes(cls, path: Path, raw: bytes) -> SentencePieceTokenizer:
        """Read a model file's content. TokenizerError if it is not one, or if its normaliser rewrites text."""
        library = require("sentencepiece", path)
        processor = library.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(raw)
        except Exception as error:
            raise TokenizerError(
                f"tokenizer {path} has an unknown format: expected {SUPPORTED}. Give one of these, or copy the file "
                "again if it is one."
            ) from error
        probe = "two  spaces \n"
        if processor.decode(processor.encode(probe)) != probe:
            raise TokenizerError(
                f"tokenizer {path}: its normaliser rewrites text (two spaces or line ends are lost), so texts could "
                "not be cut and joined without loss. Use a model with identity normalisation, such as Llama 2's."
            )
        return cls(processor, raw)

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(checked(text))

    def encode_with_ends(self, text: str) -> Encoding:
        ids = np.array(self.encode(text), dtype=np.int64)
        # The length of an unknown piece is not known, so the lengths do not add up if there is one.
        return Encoding(ids, ends_of_bytes(text, self._lengths[ids], self._lead))

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode([int(idx) for idx in ids])

    def save(self, folder: Path) -> None:
        (folder / "tokenizer.model").write_bytes(self._raw)

    def _num_bytes(self, idx: int) -> int:
        if self._processor.is_byte(idx):
            return 1
        if self._processor.is_control(idx) or self._processor.is_unknown(idx):
            return 0
        return len(self._processor.id_to_piece(idx).replace("\u2581", " ").encode("utf-8"))


def _id_or_none(idx: int) -> int | None:
    return int(idx) if idx >= 0 else None
