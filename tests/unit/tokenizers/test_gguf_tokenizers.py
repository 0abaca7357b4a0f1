"""Tokenizers inside GGUF files. `test_libraries.py` compares them with the libraries over many texts."""

from __future__ import annotations

from pathlib import Path

import pytest

from arc_ds.errors import TokenizerError
from arc_ds.tokenizers import Tokenizer, find_tokenizer, ids_digest, load_tokenizer
from arc_ds.tokenizers.gguf_file import SPLITTINGS
from tests.helpers.tiny_data import TEXT
from tests.helpers.tokenizer_files import (
    KEEPS_TEXT,
    byte_characters,
    sentencepiece_model,
    write_gguf_tokenizer,
    write_sentencepiece_gguf,
)

TEXTS = (TEXT, "", " ", "a", "  in the   tower ", "line\n\n\tline\r\n", "🚲 – 東京 e\u0301", "<s> [INST] <0x0A> </s>")


@pytest.mark.parametrize(
    ("options", "metadata"),
    [
        ({}, {}),
        ({"byte_fallback": False}, {}),  # most of the characters are unknown
        ({"add_dummy_prefix": False}, {"add_space_prefix": False}),
        ({"user_defined_symbols": ["the tower"]}, {"words": ("the tower",)}),
    ],
    ids=str,
)
def test_sentencepiece_vocabulary_gives_the_library_s_ids(tmp_path: Path, options: dict, metadata: dict) -> None:
    import sentencepiece

    model = sentencepiece_model(tmp_path / "sp", **KEEPS_TEXT, **options) / "tokenizer.model"
    library = sentencepiece.SentencePieceProcessor(model_file=str(model))
    tokenizer = load_tokenizer(write_sentencepiece_gguf(tmp_path / "a.gguf", model, **metadata))
    for text in TEXTS:
        ids = library.encode(text)
        assert tokenizer.encode(text) == tokenizer.encode_with_ends(text).ids.tolist() == ids
        assert tokenizer.decode(ids) == library.decode(ids)
    assert ids_digest(tokenizer) == ids_digest(load_tokenizer(model))
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").fingerprint == tokenizer.fingerprint
    other = {**metadata, "add_space_prefix": "add_space_prefix" in metadata}
    assert load_tokenizer(write_sentencepiece_gguf(tmp_path / "b.gguf", model, **other)).encode(TEXT) != library.encode(
        TEXT
    )


def test_sentencepiece_marks_that_are_user_defined_are_text(tmp_path: Path) -> None:
    model = sentencepiece_model(tmp_path / "sp", **KEEPS_TEXT, user_defined_symbols=["<|user|>"]) / "tokenizer.model"
    tokenizer = load_tokenizer(write_sentencepiece_gguf(tmp_path / "a.gguf", model, ("<|user|>",)))
    mark = tokenizer.special_ids["<|user|>"]
    assert mark not in tokenizer.encode("a <|user|> b")
    assert tokenizer.decode([*tokenizer.encode("a"), mark]) == "a"


def test_ends_of_the_metadata_are_special_even_if_they_are_listed_as_words(tmp_path: Path) -> None:
    model = sentencepiece_model(tmp_path / "sp", **KEEPS_TEXT, user_defined_symbols=["the end"]) / "tokenizer.model"
    file = write_sentencepiece_gguf(tmp_path / "a.gguf", model, ("the end",), eos_token_id=3)
    assert (load_tokenizer(file).bos_id, load_tokenizer(file).eos_id) == (1, 3)


TOKENS = [*byte_characters(), "12", "123", "1234", "aB", "xy"]
MERGES = ["1 2", "12 3", "123 4", "a B"]


def byte_level(file: Path, pre: str) -> Tokenizer:
    lists = {"tokens": TOKENS, "merges": MERGES, "token_type": [1] * len(TOKENS)}
    return load_tokenizer(write_gguf_tokenizer(file, "gpt2", lists, pre=pre))


# The tokens of "1234", of "aB", and of "xy", which no merge builds.
WORDS = {
    "gpt-2": [["1234"], ["aB"], ["x", "y"]],
    "olmo": [["1234"], ["aB"], ["x", "y"]],
    "smollm": [["1", "2", "3", "4"], ["aB"], ["x", "y"]],
    "refact": [["1", "2", "3", "4"], ["aB"], ["x", "y"]],
    "llama-bpe": [["123", "4"], ["aB"], ["xy"]],
    "dbrx": [["123", "4"], ["aB"], ["x", "y"]],
    "smaug-bpe": [["123", "4"], ["aB"], ["x", "y"]],
    "qwen2": [["1", "2", "3", "4"], ["aB"], ["x", "y"]],
    "tekken": [["1", "2", "3", "4"], ["a", "B"], ["xy"]],
    "gpt-4o": [["123", "4"], ["a", "B"], ["x", "y"]],
}


@pytest.mark.parametrize("pre", WORDS)
def test_pre_tokenizers_split_as_llama_cpp_does(tmp_path: Path, pre: str) -> None:
    tokenizer = byte_level(tmp_path / "a.gguf", pre)
    found = [[TOKENS[idx] for idx in tokenizer.encode(text)] for text in ("1234", "aB", "xy")]
    assert found == WORDS[pre]
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_every_pre_tokenizer_of_the_table_can_be_built(tmp_path: Path) -> None:
    for number, pre in enumerate(SPLITTINGS):
        tokenizer = byte_level(tmp_path / f"{number}.gguf", pre)
        assert tokenizer.decode(tokenizer.encode("It's 12/3 of the TOWER\n")) == "It's 12/3 of the TOWER\n"


@pytest.mark.parametrize(
    ("kind", "lists", "metadata", "message"),
    [
        ("gpt2", {"tokens": TOKENS, "merges": MERGES, "token_type": [1]}, {"pre": "nobody"}, "'nobody'; known are a.x"),
        ("gpt2", {"tokens": TOKENS, "merges": MERGES, "token_type": [1]}, {"pre": "olmo"}, "damaged"),
        ("gpt2", {"tokens": TOKENS}, {"pre": "olmo"}, r"tokenizer\.ggml\.merges, tokenizer\.ggml\.token_type"),
        ("llama", {"tokens": TOKENS, "token_type": [1]}, {}, r"lists tokenizer\.ggml\.scores"),
        ("llama", {"tokens": ["a"], "scores": [0.0], "token_type": [1]}, {}, "unknown format"),
        ("t5", {"tokens": TOKENS}, {}, "its kind is 't5'; ARC-DS reads the kinds gpt2, llama"),
    ],
    ids=str,
)
def test_tokenizers_that_cannot_be_built_are_named(
    tmp_path: Path, kind: str, lists: dict, metadata: dict, message: str
) -> None:
    file = write_gguf_tokenizer(tmp_path / "a.gguf", kind, lists, **metadata)
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(file)


def test_the_first_file_of_a_split_model_holds_the_tokenizer(tmp_path: Path) -> None:
    first, second = (tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2))
    byte_level(first, "olmo")
    second.write_bytes(b"GGUF")
    assert find_tokenizer(tmp_path) == find_tokenizer(second) == find_tokenizer(first) == first
