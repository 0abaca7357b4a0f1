"""Tokenizers defined by byte sequences in rank order: Llama 3's (tiktoken lines) and Mistral's Tekken."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arc_ds.errors import TokenizerError
from arc_ds.tokenizers.base import Encoding, Tokenizer, checked, ends_of_bytes, require, sha256_of

# How Llama 3 splits a text before merging.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# tiktoken's regular expressions overflow their stack on runs of several hundred thousand characters without a break.
# As in the reference code of Llama 3, longer runs are split.
_MAX_RUN = 25_000
_RUNS = re.compile(rf"\s{{1,{_MAX_RUN}}}|\S{{1,{_MAX_RUN}}}")
# Llama 3.1's 256 special tokens, in the order of their ids.
_LLAMA3_SPECIALS = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>",
    "<|python_tag|>", *(f"<|reserved_special_token_{idx}|>" for idx in range(2, 247)),
]  # fmt: skip
# Model families with files of the same format but another split pattern: their ids would be silently wrong.
_OTHER_FAMILIES = {50256: "GPT-2", 100256: "GPT-4", 151643: "Qwen", 199998: "GPT-4o", 200000: "Llama 4"}
# Tekken files up to version 7 may omit their special tokens; the first ones are then these (mistral-common).
_TEKKEN_NAMED = [
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]",
    "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
]  # fmt: skip


class RankTokenizer(Tokenizer):
    """A tokenizer of byte sequences in rank order, with special tokens before the ranks or after them.

    library: tiktoken.
    pattern: the regular expression that splits a text into words; merges do not cross words.
    tokens: the bytes of each rank, including all single bytes.
    first_id: the id of rank 0.
    specials: id of each special token.
    bos, eos: names of the special tokens that begin and end texts.
    file_name, raw: name and content of the file that `save` writes.
    """

    def __init__(
        self,
        library: ModuleType,
        *,
        pattern: str,
        tokens: list[bytes],
        first_id: int,
        specials: Mapping[str, int],
        bos: str,
        eos: str,
        fingerprint: str,
        file_name: str,
        raw: bytes,
    ) -> None:
        ids = {token: first_id + rank for rank, token in enumerate(tokens)}
        self._encoding = library.Encoding(name="arc-ds", pat_str=pattern, mergeable_ranks=ids, special_tokens={})
        self._first_id = first_id
        self._end_id = first_id + len(tokens)
        self._file_name = file_name
        self._raw = raw
        self.vocab_size = len(tokens) + len(specials)
        self.text_vocab_size = self._end_id
        self.bos_id: int | None = specials.get(bos)
        self.eos_id: int | None = specials.get(eos)
        self.special_ids = specials
        self.fingerprint = fingerprint
        self._lengths = np.zeros(self.vocab_size, dtype=np.int64)
        self._lengths[first_id : self._end_id] = [len(token) for token in tokens]

    def encode(self, text: str) -> list[int]:
        return self._ids(text).tolist()

    def encode_with_ends(self, text: str) -> Encoding:
        ids = self._ids(text)
        return Encoding(ids, ends_of_bytes(text, self._lengths[ids]))

    def decode(self, ids: list[int]) -> str:
        return self._encoding.decode([int(idx) for idx in ids if self._first_id <= idx < self._end_id])

    def save(self, folder: Path) -> None:
        (folder / self._file_name).write_bytes(self._raw)

    def _ids(self, text: str) -> NDArray[np.int64]:
        bounds = [0, *_break_points(checked(text)), len(text)]
        parts = (self._encoding.encode_to_numpy(text[a:b], disallowed_special=()) for a, b in pairwise(bounds))
        return np.concatenate(list(parts), dtype=np.int64)


def _break_points(text: str) -> list[int]:
    """Positions that split runs (of white space, or of anything else) longer than `_MAX_RUN` characters."""
    if len(text) <= _MAX_RUN:
        return []
    ends = (match.end() for match in _RUNS.finditer(text) if len(match.group()) == _MAX_RUN)
    return [end for end in ends if end < len(text) and text[end].isspace() == text[end - 1].isspace()]


def read_tiktoken(path: Path, raw: bytes) -> RankTokenizer:
    """Read the content of Llama 3's tokenizer: lines of base64 token and rank. Its 256 special tokens follow the ranks.

    Raises TokenizerError with the number of an invalid line, or with the model family if the file is not Llama 3's.
    """
    library = require("tiktoken", path)
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(raw.splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise TokenizerError(
                f"tokenizer {path}, line {number}: expected `BASE64 RANK`, got {line[:60]!r}. Copy the file again."
            ) from error
    if len(ranks) in _OTHER_FAMILIES:
        raise TokenizerError(
            f"tokenizer {path}: its {len(ranks)} ranks are those of {_OTHER_FAMILIES[len(ranks)]}, which splits text "
            "differently. ARC-DS reads only Llama 3's files of this format. Give the model's tokenizer.json instead."
        )
    tokens = _in_rank_order(ranks, path)
    specials = {name: len(tokens) + idx for idx, name in enumerate(_LLAMA3_SPECIALS)}
    return RankTokenizer(
        library,
        pattern=LLAMA3_PATTERN,
        tokens=tokens,
        first_id=0,
        specials=specials,
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
        fingerprint=sha256_of(b"tiktoken", LLAMA3_PATTERN.encode(), raw),
        file_name="tokenizer.model",
        raw=raw,
    )


def _in_rank_order(ranks: dict[bytes, int], path: Path) -> list[bytes]:
    """The tokens by rank; TokenizerError if a rank or a single byte is missing."""
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise TokenizerError(f"tokenizer {path}: its ranks are not exactly 0 … {len(ranks) - 1}. Copy it again.")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise TokenizerError(f"tokenizer {path}: byte {missing[0]} has no token, so not every text can be encoded.")
    return sorted(ranks, key=ranks.__getitem__)


def is_tekken(spec: Any) -> bool:
    """Whether the JSON of a file is a Tekken tokenizer's."""
    return isinstance(spec, dict) and isinstance(spec.get("vocab"), list) and isinstance(spec.get("config"), dict)


def read_tekken(path: Path, raw: bytes, spec: dict[str, Any]) -> RankTokenizer:
    """Read Mistral's Tekken (tekken.json): special tokens first, then the first ranks of its vocabulary.

    The fingerprint covers everything that determines ids (pattern, used ranks, special tokens), but not the image and
    audio settings. Raises TokenizerError if the file is damaged.
    """
    library = require("tiktoken", path)
    try:
        pattern, num_specials = str(spec["config"]["pattern"]), int(spec["config"]["default_num_special_tokens"])
        num_ranks = int(spec["config"]["default_vocab_size"]) - num_specials
        entries = spec["vocab"][:num_ranks]
        ranks = {base64.b64decode(entry["token_bytes"], validate=True): int(entry["rank"]) for entry in entries}
        listed = spec.get("special_tokens") or [{"rank": i, "token_str": name} for i, name in enumerate(_TEKKEN_NAMED)]
        named = {int(token["rank"]): str(token["token_str"]) for token in listed}
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise TokenizerError(
            f"tokenizer {path}: expected Mistral's Tekken format, but {type(error).__name__}: {error}. Copy it again."
        ) from error
    if len(ranks) != num_ranks:
        raise TokenizerError(f"tokenizer {path}: expected {num_ranks} ranks, got {len(ranks)}. Copy the file again.")
    tokens = _in_rank_order(ranks, path)
    specials = {named.get(idx, f"<SPECIAL_{idx}>"): idx for idx in range(num_specials)}
    return RankTokenizer(
        library,
        pattern=pattern,
        tokens=tokens,
        first_id=num_specials,
        specials=specials,
        bos="<s>",
        eos="</s>",
        fingerprint=sha256_of(b"tekken", pattern.encode(), json.dumps(list(specials)).encode(), *tokens),
        file_name="tekken.json",
        raw=raw,
    )
