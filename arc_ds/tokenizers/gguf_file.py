"""The tokenizer inside a GGUF file (`tokenizer.ggml.*`), built as a byte-level BPE of the `tokenizers` library."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from arc_ds.errors import TokenizerError
from arc_ds.tokenizers.base import require, sha256_of
from arc_ds.tokenizers.gguf_header import read_gguf_header
from arc_ds.tokenizers.json_file import JsonTokenizer, is_mark
from arc_ds.tokenizers.tiktoken_file import LLAMA3_PATTERN

_CONTROL, _USER_DEFINED = 3, 4
_INSTEAD = (
    "Set the `tokenizer` key to the {} of the original model, or put that file into the folder of the .gguf file and "
    "name the folder."
)
# How each `tokenizer.ggml.pre` splits text before merging (llama.cpp, llama-vocab.cpp): its pattern (None for GPT-2's),
# and whether digits are first split into single digits.
_PRE_TOKENIZERS: dict[str, tuple[str | None, bool]] = {
    "default": (None, False),
    "gpt-2": (None, False),
    "olmo": (None, False),
    "smollm": (None, True),
    "llama-bpe": (LLAMA3_PATTERN, False),
    "llama3": (LLAMA3_PATTERN, False),
    "qwen2": (LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}"), False),
}


def read_gguf_tokenizer(path: Path) -> JsonTokenizer:
    """Read the tokenizer of a GGUF file.

    Raises TokenizerError if the file has no tokenizer, or one other than byte-level BPE with a known pre-tokenizer.
    """
    library = require("tokenizers", path)
    fields = _fields(path)
    model, pre = fields.get("model"), fields.get("pre", "default")
    if model != "gpt2":
        raise TokenizerError(
            f"tokenizer in {path}: its kind is {model!r}; ARC-DS reads the kind 'gpt2' (byte-level BPE) from GGUF. "
            f"{_INSTEAD.format('tokenizer.json or tokenizer.model')}"
        )
    if pre not in _PRE_TOKENIZERS:
        raise TokenizerError(
            f"tokenizer in {path}: unknown pre-tokenizer {pre!r}; known are {sorted(_PRE_TOKENIZERS)}. "
            f"{_INSTEAD.format('tokenizer.json')}"
        )
    backend = _build(library, fields, pre)
    # `add_bos_token` is a default of llama.cpp and is ignored here: the run decides whether sequences start with bos.
    bos_id = fields.get("bos_token_id")
    eos_id = fields.get("eos_token_id")
    parts = [json.dumps(fields[key], ensure_ascii=False).encode() for key in ("tokens", "merges", "token_type")]
    marks = json.dumps([pre, bos_id, eos_id, *_marks(fields)]).encode()
    return JsonTokenizer(backend, bos_id=bos_id, eos_id=eos_id, fingerprint=sha256_of(b"gguf", *parts, marks))


def _fields(path: Path) -> dict[str, Any]:
    """The `tokenizer.ggml.*` metadata, with that prefix removed from the keys."""
    prefix = "tokenizer.ggml."
    try:
        metadata = read_gguf_header(path, lists_under=prefix).metadata
    except ValueError as error:
        raise TokenizerError(f"tokenizer in {path}: {error}. Copy the file again.") from error
    fields = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    for key in ("tokens", "merges", "token_type"):
        if fields.get("model") == "gpt2" and key not in fields:
            raise TokenizerError(
                f"tokenizer in {path}: expected the metadata {prefix}{key}, which is missing. "
                f"{_INSTEAD.format('tokenizer.json')}"
            )
    return fields


def _build(library: Any, fields: dict[str, Any], pre: str) -> Any:
    """Build a `tokenizers.Tokenizer` from the metadata."""
    pattern, digits_alone = _PRE_TOKENIZERS[pre]
    tokens: list[str] = fields["tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["merges"]]
    backend = library.Tokenizer(
        library.models.BPE(
            vocab={token: idx for idx, token in enumerate(tokens)},
            merges=merges,
            ignore_merges=pattern is LLAMA3_PATTERN,  # Llama 3 keeps a word that is a token whole
        )
    )
    splitters = []
    if digits_alone:
        splitters.append(library.pre_tokenizers.Digits(individual_digits=True))
    if pattern is not None:
        splitters.append(library.pre_tokenizers.Split(library.Regex(pattern), behavior="isolated"))
    splitters.append(library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None))
    backend.pre_tokenizer = library.pre_tokenizers.Sequence(splitters)
    backend.decoder = library.decoders.ByteLevel()
    special = {*_of_kind(fields, _CONTROL), *_marks(fields)}
    words = [token for token in _of_kind(fields, _USER_DEFINED) if token not in special]
    added = partial(library.AddedToken, normalized=False)
    backend.add_special_tokens([added(token, special=True) for token in tokens if token in special])
    backend.add_tokens([added(token, special=False) for token in words])
    return backend


def _marks(fields: dict[str, Any]) -> list[str]:
    """Marks that the file lists as user-defined tokens, like words, instead of control tokens."""
    return [token for token in _of_kind(fields, _USER_DEFINED) if is_mark(token)]


def _of_kind(fields: dict[str, Any], kind: int) -> list[str]:
    return [token for token, its in zip(fields["tokens"], fields["token_type"], strict=True) if its == kind]
