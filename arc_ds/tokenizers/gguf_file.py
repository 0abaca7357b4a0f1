"""The tokenizer inside a GGUF file (`tokenizer.ggml.*`): byte-level BPE or sentencepiece's BPE."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from arc_ds.errors import TokenizerError
from arc_ds.tokenizers.base import Tokenizer, require, sha256_of
from arc_ds.tokenizers.gguf_header import read_gguf_header
from arc_ds.tokenizers.json_file import JsonTokenizer, is_mark
from arc_ds.tokenizers.sentencepiece_file import SentencePieceTokenizer
from arc_ds.tokenizers.tiktoken_file import LLAMA3_PATTERN

_PREFIX = "tokenizer.ggml."
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6  # sentencepiece's numbers
_INSTEAD = (
    "Set the `tokenizer` key to the {} of the original model, or put that file into the folder of the .gguf file and "
    "name the folder."
)


class _Splitting(NamedTuple):
    """How a byte-level BPE splits texts into words before it merges bytes.

    pattern: regular expression of words; None for GPT-2's.
    single_digits: whether each digit is a word.
    keeps_tokens: whether a word that is a token stays whole even if the merges do not build it.
    """

    pattern: str | None = None
    single_digits: bool = False
    keeps_tokens: bool = False


_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORD = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
TEKKEN_PATTERN = _WORD % ("", "") + r"\p{N}" + _REST
GPT4O_PATTERN = _WORD % (_SHORT, _SHORT) + r"\p{N}{1,3}" + _REST

# The names of `tokenizer.ggml.pre` for each splitting (llama.cpp, llama-vocab.cpp).
_NAMES: Mapping[_Splitting, tuple[str, ...]] = {
    _Splitting(): (
        *("default", "gpt-2", "phi-2", "olmo", "mpt", "jais", "trillion", "granite-docling", "exaone4", "mellum"),
        *("gigachat", "a.x-4.0"),
    ),
    _Splitting(single_digits=True): (
        *("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    ),
    _Splitting(LLAMA3_PATTERN, keeps_tokens=True): (
        *("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    ),
    _Splitting(LLAMA3_PATTERN): ("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"),
    _Splitting(LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")): (
        *("qwen2", "deepseek-r1-qwen", "kormo", "megrez", "stablelm2", "hunyuan", "grok-2"),
    ),
    _Splitting(TEKKEN_PATTERN, keeps_tokens=True): ("tekken",),
    _Splitting(GPT4O_PATTERN): ("gpt-4o", "llama4"),
}
SPLITTINGS = {name: splitting for splitting, names in _NAMES.items() for name in names}


def read_gguf_tokenizer(path: Path) -> Tokenizer:
    """Read the tokenizer of a GGUF file.

    Raises TokenizerError if the file has no tokenizer, one of an unknown kind, or a byte-level BPE with an unknown
    pre-tokenizer.
    """
    metadata = _metadata(path)
    kind = str(metadata.get("model"))
    if kind not in _KINDS:
        found = f"its kind is {kind!r}" if "model" in metadata else "the file holds none"
        raise TokenizerError(
            f"tokenizer in {path}: {found}; ARC-DS reads the kinds {', '.join(_KINDS)} from GGUF. "
            f"{_INSTEAD.format('tokenizer.json or tokenizer.model')}"
        )
    keys, read = _KINDS[kind]
    missing = [_PREFIX + key for key in keys if not isinstance(metadata.get(key), list)]
    if missing:
        raise TokenizerError(
            f"tokenizer in {path}: expected the lists {', '.join(missing)} in the metadata, which are missing. "
            f"{_INSTEAD.format('tokenizer.json or tokenizer.model')}"
        )
    return read(path, metadata)


def _metadata(path: Path) -> dict[str, Any]:
    """The `tokenizer.ggml.*` metadata, with that prefix removed from the keys."""
    try:
        metadata = read_gguf_header(path, with_tokenizer=True).metadata
    except ValueError as error:
        raise TokenizerError(f"tokenizer in {path}: {error}. Copy the file again.") from error
    return {key.removeprefix(_PREFIX): value for key, value in metadata.items() if key.startswith(_PREFIX)}


def _read_sentencepiece(path: Path, metadata: dict[str, Any]) -> SentencePieceTokenizer:
    """The sentencepiece model (sentencepiece_model.proto) that has the tokens of the metadata.

    Marks that the metadata lists as user-defined tokens become control tokens: sentencepiece would find them in texts.
    """
    tokens, marks = metadata["tokens"], set(_marks(metadata))
    # The ids that llama.cpp assumes if the metadata omits them.
    bos_id, eos_id = metadata.get("bos_token_id", 1), metadata.get("eos_token_id", 2)
    kinds = [
        _CONTROL if token in marks or (idx in (bos_id, eos_id) and kind != _UNKNOWN) else kind
        for idx, (token, kind) in enumerate(zip(tokens, metadata["token_type"], strict=True))
    ]
    pieces = [
        _message({1: token.encode("utf-8"), 2: float(score), 3: kind})
        for token, score, kind in zip(tokens, metadata["scores"], kinds, strict=True)
    ]
    ids = {45: kinds.index(_UNKNOWN) if _UNKNOWN in kinds else -1, 46: bos_id, 47: eos_id}
    names = {field: tokens[idx].encode("utf-8") for field, idx in ids.items() if 0 <= idx < len(tokens)}
    trainer = _message({3: 2, 35: _BYTE in kinds, **names})  # 2 is BPE
    normalizer = _message(
        {
            1: b"identity",
            3: metadata.get("add_space_prefix", True),
            4: metadata.get("remove_extra_whitespaces", False),
            5: True,
        }
    )
    model = b"".join(_message({1: piece}) for piece in pieces) + _message({2: trainer, 3: normalizer})
    return SentencePieceTokenizer.from_bytes(path, model)


def _message(fields: Mapping[int, bytes | float | int]) -> bytes:
    """Fields of a protocol buffer by number: bytes, float32 for a float, and a varint for an integer or a boolean."""
    parts = []
    for number, value in fields.items():
        if isinstance(value, bytes):
            parts += [_varint(number << 3 | 2), _varint(len(value)), value]
        elif isinstance(value, float):
            parts += [_varint(number << 3 | 5), struct.pack("<f", value)]
        else:
            parts += [_varint(number << 3), _varint(int(value))]
    return b"".join(parts)


def _varint(value: int) -> bytes:
    groups = [value >> shift & 127 for shift in range(0, max(value.bit_length(), 1), 7)]
    return bytes([*(group | 128 for group in groups[:-1]), groups[-1]])


def _read_byte_level(path: Path, metadata: dict[str, Any]) -> JsonTokenizer:
    """The byte-level BPE of the metadata, built by the `tokenizers` library."""
    library = require("tokenizers", path)
    pre = metadata.get("pre", "default")
    if pre not in SPLITTINGS:
        raise TokenizerError(
            f"tokenizer in {path}: unknown pre-tokenizer {pre!r}; known are {', '.join(sorted(SPLITTINGS))}. "
            f"{_INSTEAD.format('tokenizer.json')}"
        )
    backend = _build(library, metadata, SPLITTINGS[pre])
    # `add_bos_token` is a default of llama.cpp and is ignored here: the run decides whether sequences start with bos.
    bos_id = metadata.get("bos_token_id")
    eos_id = metadata.get("eos_token_id")
    parts = [json.dumps(metadata[key], ensure_ascii=False).encode() for key in ("tokens", "merges", "token_type")]
    marks = json.dumps([pre, bos_id, eos_id, *_marks(metadata)]).encode()
    return JsonTokenizer(backend, bos_id=bos_id, eos_id=eos_id, fingerprint=sha256_of(b"gguf", *parts, marks))


def _build(library: Any, metadata: dict[str, Any], splitting: _Splitting) -> Any:
    """Build a `tokenizers.Tokenizer` from the metadata."""
    pattern = splitting.pattern
    tokens: list[str] = metadata["tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["merges"]]
    backend = library.Tokenizer(
        library.models.BPE(
            vocab={token: idx for idx, token in enumerate(tokens)},
            merges=merges,
            ignore_merges=splitting.keeps_tokens,
        )
    )
    splitters = []
    if splitting.single_digits:
        splitters.append(library.pre_tokenizers.Digits(individual_digits=True))
    if pattern is not None:
        splitters.append(library.pre_tokenizers.Split(library.Regex(pattern), behavior="isolated"))
    splitters.append(library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None))
    backend.pre_tokenizer = library.pre_tokenizers.Sequence(splitters)
    backend.decoder = library.decoders.ByteLevel()
    special = {*_of_kind(metadata, _CONTROL), *_marks(metadata)}
    words = [token for token in _of_kind(metadata, _USER_DEFINED) if token not in special]
    added = partial(library.AddedToken, normalized=False)
    backend.add_special_tokens([added(token, special=True) for token in tokens if token in special])
    backend.add_tokens([added(token, special=False) for token in words])
    return backend


def _marks(metadata: dict[str, Any]) -> list[str]:
    """Marks that the file lists as user-defined tokens, like words, instead of control tokens."""
    return [token for token in _of_kind(metadata, _USER_DEFINED) if is_mark(token)]


def _of_kind(metadata: dict[str, Any], kind: int) -> list[str]:
    return [token for token, its in zip(metadata["tokens"], metadata["token_type"], strict=True) if its == kind]


# For each `tokenizer.ggml.model`: the lists that it needs, and its reader.
_KINDS: Mapping[str, tuple[tuple[str, ...], Callable[[Path, dict[str, Any]], Tokenizer]]] = {
    "gpt2": (("tokens", "merges", "token_type"), _read_byte_level),
    "llama": (("tokens", "scores", "token_type"), _read_sentencepiece),
}
