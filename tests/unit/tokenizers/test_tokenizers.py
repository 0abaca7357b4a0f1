"""Tokenizers: special tokens, files of each format, fingerprints, and errors that name a bad file.

`test_libraries.py` compares ids and boundaries with the libraries' own.
"""

from __future__ import annotations

import base64
import codecs
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arc_ds.errors import TokenizerError
from arc_ds.tokenizers import Tokenizer, check_fits, find_tokenizer, load_tokenizer, tokenizer_file
from arc_ds.tokenizers.json_file import JsonTokenizer
from tests.helpers.tiny_data import TEXT, write_json_tokenizer, write_tiktoken
from tests.helpers.tokenizer_files import (
    KEEPS_TEXT,
    assert_boundaries,
    sentencepiece_model,
    smollm2,
    write_gguf_tokenizer,
)

GOLDEN_FILES = ["sp384.model", "sp512.model", "llama_tiny.tiktoken"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        "tiktoken": load_tokenizer(write_tiktoken(folder / "tokenizer.model")),
        "json": load_tokenizer(write_json_tokenizer(folder / "json")),
    }


@pytest.mark.parametrize("name", GOLDEN_FILES)
def test_golden_ids_texts_and_sizes_are_the_reference_s(golden: Path, name: str) -> None:
    spec = json.loads((golden / "data" / "tokenizers.json").read_text())[name]
    tokenizer = load_tokenizer(golden / "tokenizers" / name)
    sizes = (spec["n_words"], spec["bos_id"], spec["eos_id"])
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == sizes
    texts = [row["text"] for row in spec["rows"]]
    assert tokenizer.encode_batch(texts) == [row["ids"] for row in spec["rows"]]
    for row in spec["rows"]:
        assert tokenizer.encode(row["text"]) == row["ids"]
        # The reference's sentencepiece wrapper deletes the characters "<s>" and "</s>" from any text; we keep them.
        kept = ".model" in name and "s>" in row["text"]
        assert tokenizer.decode(row["ids_bos_eos"]) == row["text" if kept else "decoded"]
        if row["text"] == row["decoded"]:
            assert_boundaries(tokenizer, row["text"])


def test_json_bos_follows_the_model_s_own_use(tmp_path: Path) -> None:
    assert load_tokenizer(write_json_tokenizer(tmp_path / "with")).bos_id == 0
    without = load_tokenizer(write_json_tokenizer(tmp_path / "without", bos=False))
    assert (without.bos_id, without.eos_id) == (None, 1)


def test_fingerprint_tells_tokenizers_apart_and_ignores_where_they_lie(tmp_path: Path) -> None:
    first = load_tokenizer(write_tiktoken(tmp_path / "a.model")).fingerprint
    assert load_tokenizer(write_tiktoken(tmp_path / "b.tiktoken")).fingerprint == first
    assert load_tokenizer(write_json_tokenizer(tmp_path / "json")).fingerprint != first


def test_a_file_is_read_again_only_where_it_or_what_lies_beside_it_has_changed(tmp_path: Path) -> None:
    folder = write_json_tokenizer(tmp_path)
    before = load_tokenizer(folder)
    assert load_tokenizer(folder) is load_tokenizer(folder / "tokenizer.json") is before
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "add_bos_token": False}))
    without = load_tokenizer(folder)
    assert before.bos_id is not None and without.bos_id is None
    raw = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(raw.replace('"<s>"', '"<S>"'))
    assert load_tokenizer(folder).fingerprint != without.fingerprint


def test_llama3_specials_stand_behind_the_ranks(tiny: dict[str, Tokenizer]) -> None:
    tokenizer = tiny["tiktoken"]
    assert tokenizer.bos_id == tokenizer.vocab_size - 256
    assert tokenizer.eos_id == tokenizer.vocab_size - 255


SMOLLM2_TEXT = "The tower cost 12,345 men don't WE'LL  \n\n\tx=3.14 é北🚲"
# By transformers 5.x, which reads the same file but leaves out SmolLM's digit splitting; it was added.
SMOLLM2_IDS = [
    504, 11637, 1708, 216, 33, 34, 28, 35, 36, 37, 1800, 1326, 982, 26587, 23, 16421, 256, 1116, 197, 104, 45,
    35, 30, 33, 36, 26411, 30158, 241, 10813, 244, 127,
]  # fmt: skip


def test_smollm2_gguf_gives_the_recorded_ids() -> None:
    tokenizer = load_tokenizer(smollm2())
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (49152, 1, 2)
    assert tokenizer.encode(SMOLLM2_TEXT) == SMOLLM2_IDS
    assert tokenizer.decode(SMOLLM2_IDS) == SMOLLM2_TEXT
    assert_boundaries(tokenizer, SMOLLM2_TEXT)


def test_gguf_cut_short_is_named(tmp_path: Path) -> None:
    short = tmp_path / "short.gguf"
    with smollm2().open("rb") as file:
        short.write_bytes(file.read(4000))
    with pytest.raises(TokenizerError, match="damaged or cut short"):
        load_tokenizer(short)


def byte_level_spec(tmp_path: Path) -> dict[str, Any]:
    return json.loads((write_json_tokenizer(tmp_path / "byte-level") / "tokenizer.json").read_text())


def json_tokenizer(folder: Path, spec: dict[str, Any]) -> JsonTokenizer:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, JsonTokenizer)
    return tokenizer


MARKS = ["<|Assistant|>", "</think>", "<｜User｜>", "[INST]", "<start_of_turn>"]
WORDS = ["  ", "   ", "|||IP_ADDRESS|||", "<table>", "</h1>", "<=>", "[]", "New York"]


def with_added(spec: dict[str, Any]) -> dict[str, Any]:
    """Marks and words as files list them that call neither special."""
    first = max(spec["model"]["vocab"].values()) + 1
    for idx, token in enumerate([*MARKS, *WORDS], start=first):
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
        spec["added_tokens"].append({"id": idx, "content": token, **flags})
    return spec


def assert_marks_are_text(tokenizer: Tokenizer) -> None:
    for mark in MARKS:
        text = f"the {mark} sea"
        for ids in (tokenizer.encode(text), tokenizer.encode_batch([text])[0], tokenizer.encode_with_ends(text).ids):
            assert tokenizer.special_ids[mark] not in ids
            assert tokenizer.decode(list(ids)) == text
        assert_boundaries(tokenizer, text)
    assert not tokenizer.special_ids.keys() & set(WORDS)


def test_json_marks_that_are_not_listed_as_special_are_text_and_words_are_the_library_s(tmp_path: Path) -> None:
    import tokenizers

    spec = with_added(byte_level_spec(tmp_path))
    library = tokenizers.Tokenizer.from_str(json.dumps(spec))
    assert library.token_to_id(MARKS[0]) in library.encode(f"the {MARKS[0]} sea").ids, "what this is about"
    tokenizer = json_tokenizer(tmp_path / "added", spec)
    assert_marks_are_text(tokenizer)
    for word in WORDS:
        ids = library.encode(f"the{word}sea", add_special_tokens=False).ids
        assert library.token_to_id(word) in ids and tokenizer.encode(f"the{word}sea") == ids
    plain = json_tokenizer(tmp_path / "plain", byte_level_spec(tmp_path))
    assert tokenizer.fingerprint != plain.fingerprint
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert (again.fingerprint, again.special_ids) == (tokenizer.fingerprint, tokenizer.special_ids)


def test_gguf_marks_that_are_user_defined_are_text_and_words_are_tokens(tmp_path: Path) -> None:
    spec = byte_level_spec(tmp_path)
    tokens = [*sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].get), *MARKS, *WORDS]
    kinds = [3 if token in ("<s>", "</s>") else 4 if token in (*MARKS, *WORDS) else 1 for token in tokens]
    merges = [" ".join(merge) for merge in spec["model"]["merges"]]
    lists = {"tokens": tokens, "merges": merges, "token_type": kinds}
    tokenizer = load_tokenizer(write_gguf_tokenizer(tmp_path / "model.gguf", "gpt2", lists, pre="gpt-2"))
    assert_marks_are_text(tokenizer)
    for word in WORDS:
        assert tokens.index(word) in tokenizer.encode(f"the{word}sea")


def test_json_text_that_the_normaliser_changes_is_the_library_s(tmp_path: Path) -> None:
    tokenizer = json_tokenizer(tmp_path / "nfc", {**byte_level_spec(tmp_path), "normalizer": {"type": "NFC"}})
    assert tokenizer.encode("e\u0301 sea") == tokenizer.encode("é sea")
    assert tokenizer.encode_with_ends("e\u0301").ends[-1] == 2


@pytest.mark.parametrize(
    "options",
    [{"add_dummy_prefix": False}, {"model_type": "unigram"}, {"user_defined_symbols": ["the tower"]}],
    ids=str,
)
def test_sentencepiece_models_of_all_kinds_are_cut_at_characters(tmp_path: Path, options: dict[str, Any]) -> None:
    tokenizer = load_tokenizer(sentencepiece_model(tmp_path / "sp", **KEEPS_TEXT, **options))
    for text in (TEXT, "", " ", "a", " a", "a ", "  in the   tower ", "🚲 – the tower"):
        assert_boundaries(tokenizer, text)
        assert len(np.unique(tokenizer.encode_with_ends(text).ends)) > 0.8 * min(len(text.split()), 2)


def test_sentencepiece_text_with_an_unknown_piece_is_not_cut(tmp_path: Path) -> None:
    """An unknown piece does not say how many characters it covers."""
    tokenizer = load_tokenizer(sentencepiece_model(tmp_path / "sp", **{**KEEPS_TEXT, "byte_fallback": False}))
    encoding = tokenizer.encode_with_ends("in the tower 🚲 sea")
    assert encoding.ends.tolist() == [0] * len(encoding.ids) + [18]


def test_sentencepiece_normaliser_that_rewrites_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="normaliser rewrites text"):
        load_tokenizer(sentencepiece_model(tmp_path / "sp"))


def tekken_spec() -> dict[str, Any]:
    tokens = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" the", b"unused"]
    entries = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for rank, token in enumerate(tokens)
    ]
    config = {"pattern": r" ?\p{L}+|.|\s+", "default_vocab_size": 279, "default_num_special_tokens": 20}
    return {"config": config, "vocab": entries}


def test_tekken_ids_stand_behind_its_special_tokens(tmp_path: Path) -> None:
    (tmp_path / "tekken.json").write_text(json.dumps(tekken_spec()))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (279, 1, 2)
    assert tokenizer.encode("the the<s>") == [277, 278, *(20 + byte for byte in b"<s>")]
    assert tokenizer.decode([1, 277, 278, 2]) == "the the"
    assert tokenizer.special_ids["[INST]"] == 3
    assert_boundaries(tokenizer, "the 北 the")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda spec: spec["config"].pop("pattern"), "KeyError"),
        (lambda spec: spec["vocab"].pop(7), "ranks are not"),
        (lambda spec: spec["vocab"][3].update(token_bytes="?"), "Tekken format"),
        (lambda spec: spec["config"].update(default_vocab_size=900), "expected 880 ranks"),
    ],
)
def test_damaged_tekken_files_are_named(tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    spec = tekken_spec()
    change(spec)
    (tmp_path / "tekken.json").write_text(json.dumps(spec))
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(tmp_path)


def test_a_run_of_a_million_characters_does_not_end_the_process(tiny: dict[str, Tokenizer]) -> None:
    """tiktoken's regular expressions overflow their stack on it, which no `except Exception` catches."""
    for tokenizer in tiny.values():
        for text in (" " * 400_000, "=" * 400_000):
            assert tokenizer.decode(tokenizer.encode(text)) == text
    text = " " * 1_000_000  # tiktoken 0.14 still reads 800,000
    assert tiny["tiktoken"].decode(tiny["tiktoken"].encode(text)) == text


def test_missing_file_and_empty_folder_name_what_is_read(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="no such file"):
        load_tokenizer(tmp_path / "nothing")
    with pytest.raises(TokenizerError, match=r"expected tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_folder_with_two_candidates_asks_for_one_unless_they_are_the_same_file(tmp_path: Path) -> None:
    write_tiktoken(tmp_path / "tokenizer.model")
    other = write_tiktoken(tmp_path / "tokenizer.model.v3")
    assert load_tokenizer(tmp_path).vocab_size == load_tokenizer(other).vocab_size
    other.write_bytes(other.read_bytes() + b"\n")
    with pytest.raises(TokenizerError, match="several candidates"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b'{"model": ', "tokenizer.json:1: not valid JSON"),
        ("tokenizer.json", '{"model": 1}'.encode("utf-16"), "tokenizer.json is UTF-16"),
        ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("tokenizer.json", b'{"vocab": {}}', "`model`"),
        ("tokenizer.model", b"YQ== 0\nYg== 2\n", "ranks are not"),
        ("tokenizer.model", b"YQ== 0\nYg==\n", "line 2"),
        ("tokenizer.model", b"YQ== 0\nYg== 1\n", "byte 0 has no token"),
        ("tokenizer.model", b"\x00\x01nonsense", "has an unknown format"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "tekken.json", "tekken_240911.json", "tokenizer.model", "tokenizer.model.v3", "llama.tiktoken",
     "spiece.model", "model.gguf"],
)  # fmt: skip
def test_one_search_finds_the_tokenizer_of_a_folder_by_every_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert find_tokenizer(tmp_path) is None
    (tmp_path / name).write_text("the content does not matter")
    assert find_tokenizer(tmp_path) == tokenizer_file(tmp_path) == tokenizer_file(tmp_path / name) == tmp_path / name


def test_a_byte_order_mark_changes_no_tokenizer(tmp_path: Path) -> None:
    folder = write_json_tokenizer(tmp_path / "json")
    (tmp_path / "tekken").mkdir()
    (tmp_path / "tekken" / "tekken.json").write_text(json.dumps(tekken_spec()))
    (tmp_path / "tiktoken").mkdir()
    for path in (folder, tmp_path / "tekken", write_tiktoken(tmp_path / "tiktoken" / "tokenizer.model").parent):
        before = load_tokenizer(path)
        for file in path.iterdir():
            file.write_bytes(codecs.BOM_UTF8 + file.read_bytes())
        after = load_tokenizer(path)
        assert after is not before and after.fingerprint == before.fingerprint
        assert (after.bos_id, after.encode(TEXT)) == (before.bos_id, before.encode(TEXT))


def with_pad(spec: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Add the special token <pad> after all other ids."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    last = max(spec["model"]["vocab"].values())
    spec["added_tokens"].append({"id": last + 1, "content": "<pad>", **flags})
    return {**spec, **changes}


def test_tokenizer_larger_than_the_embedding_is_refused(tiny: dict[str, Tokenizer]) -> None:
    check_fits(tiny["json"], tiny["json"].vocab_size, "decoder tiny")
    with pytest.raises(TokenizerError, match="decoder tiny.*texts have ids up to 339.*only 339 rows.*came with these"):
        check_fits(tiny["json"], tiny["json"].vocab_size - 1, "decoder tiny")


def test_special_tokens_beyond_the_embedding_are_refused_only_if_samples_contain_them(
    tmp_path: Path, tiny: dict[str, Tokenizer]
) -> None:
    llama3 = tiny["tiktoken"]
    assert llama3.bos_id is not None
    padded = json_tokenizer(tmp_path / "pad", with_pad(byte_level_spec(tmp_path)))
    for tokenizer, rows, special in ((padded, 340, 340), (llama3, llama3.bos_id, llama3.bos_id)):
        assert max(tokenizer.encode(f"{TEXT} <pad> <|begin_of_text|>")) < rows < tokenizer.vocab_size
        check_fits(tokenizer, rows, "decoder tiny")
        with pytest.raises(
            TokenizerError, match=r"decoder tiny.*the special token <(pad|\|begin_of_text\|)> has the id"
        ):
            check_fits(tokenizer, rows, "decoder tiny", [0, special])
    with pytest.raises(TokenizerError, match="the special token of its settings has the id 4294967295"):
        check_fits(llama3, llama3.vocab_size, "decoder tiny", [2**32 - 1])


def test_a_special_token_of_the_model_s_own_vocabulary_counts_as_text(tmp_path: Path) -> None:
    """A WordLevel model gives its id for a text of the same characters."""
    vocab = {"<s>": 0, "</s>": 1, "[UNK]": 2, "<pad>": 3}
    spec = byte_level_spec(tmp_path) | {"model": {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"}}
    spec["pre_tokenizer"] = {"type": "WhitespaceSplit"}
    tokenizer = json_tokenizer(tmp_path / "words", with_pad(spec))
    assert tokenizer.encode("<pad>") == [3]
    with pytest.raises(TokenizerError, match="texts have ids up to 3"):
        check_fits(tokenizer, 3, "encoder")


CHARSMAP = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
UNKNOWN_TOKEN = {"single": [{"SpecialToken": {"id": "<zz>", "type_id": 0}}], "pair": [], "special_tokens": {}}


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"type": "BPE", "vocab": 3}},
        {"model": {"type": "BPE2", "vocab": {}, "merges": []}},
        {"normalizer": CHARSMAP},
        {"post_processor": {"type": "TemplateProcessing", **UNKNOWN_TOKEN}},
        {"added_tokens": [{"id": 1}]},
    ],
    ids=["model", "newer model", "panic of the library", "panic at encoding", "added token"],
)
def test_every_exception_of_the_library_names_the_file_and_what_to_do(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(
        TokenizerError, match=r"json/tokenizer.json cannot be read by tokenizers \d.*pip install -U tokenizers.*copy"
    ):
        json_tokenizer(tmp_path / "json", byte_level_spec(tmp_path) | change)


def test_a_pattern_that_tiktoken_cannot_read_names_the_file(tmp_path: Path) -> None:
    spec = tekken_spec()
    spec["config"]["pattern"] = "(["
    (tmp_path / "tekken.json").write_text(json.dumps(spec))
    with pytest.raises(TokenizerError, match=r"tekken.json cannot be read by tiktoken \d"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_fails_on_unknown_words_is_refused_before_the_first_text(tmp_path: Path) -> None:
    spec = byte_level_spec(tmp_path) | {"model": {"type": "WordLevel", "vocab": {"the": 0}, "unk_token": "[UNK]"}}
    with pytest.raises(TokenizerError, match=r"json/tokenizer.json cannot encode every text: .*UNK.*`unk_token`"):
        json_tokenizer(tmp_path / "json", {**spec, "added_tokens": []})


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer_config.json", '{"bos_token": 5}', "tokenizer_config.json: `bos_token` is 5, expected a text"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json: expected a JSON object, got a list"),
        ("config.json", '{"eos_token_id": "x"}', "config.json: `eos_token_id` is 'x', expected a whole number"),
    ],
)
def test_wrong_types_next_to_a_tokenizer_json_are_named(tmp_path: Path, name: str, content: str, words: str) -> None:
    folder = write_json_tokenizer(tmp_path)
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / name).write_text(content)
    with pytest.raises(TokenizerError, match=words):
        load_tokenizer(folder)
