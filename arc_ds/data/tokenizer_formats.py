"""Readers of tokenizer files: Hugging Face JSON, sentencepiece and tiktoken, behind `data.tokenizers.Tokenizer`."""

from __future__ import annotations

import base64
import binascii
import hashlib
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arc_ds.data.tokenizers import SUPPORTED, Encoding, ends_from_byte_lengths, settle_ends
from arc_ds.errors import TokenizerError

# The pattern that Llama 3 splits text with before byte-pair merging (Llama 3 model card, tokenizer.py).
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
NUM_LLAMA3_SPECIALS = 256
_LLAMA3_NAMED = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    5: "<|step_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}


def require(module: str, path: Path) -> ModuleType:
    """Import the library that reads `path`; TokenizerError with the pip command where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise TokenizerError(f"tokenizer {path} is read by the package {module}: pip install {module}") from error


def sha256_of(*parts: bytes) -> str:
    """sha256 of the parts, each with its length in front, as hex digits."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


class JsonTokenizer:
    """A tokenizer of the `tokenizers` library (tokenizer.json).

    definition: the text of that file, which `save` writes again; None where the backend was not read from one.
    """

    def __init__(
        self,
        backend: Any,
        *,
        bos_id: int | None,
        eos_id: int | None,
        fingerprint: str,
        definition: str | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # "<|im_end|>" in somebody's text is text
        self._backend = backend
        self.bos_id = bos_id
        self.eos_id = eos_id
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(vocabulary.values(), default=-1)
        self.fingerprint = fingerprint
        self._definition = definition
        added_tokens = backend.get_added_tokens_decoder()
        self.special_ids: Mapping[str, int] = {
            added.content: idx for idx, added in added_tokens.items() if added.special
        }
        self._lengths = np.zeros(self.vocab_size, dtype=np.int64) if _is_byte_level(backend) else None
        if self._lengths is not None:
            for token, idx in vocabulary.items():  # each character of a byte-level token stands for one byte
                self._lengths[idx] = len(token)
            for idx, added in added_tokens.items():
                self._lengths[idx] = len(added.content.encode("utf-8"))

    @classmethod
    def from_file(cls, path: Path) -> JsonTokenizer:
        """Read tokenizer.json; bos and eos come from the files beside it. TokenizerError where it is damaged."""
        library = require("tokenizers", path)
        try:
            definition = path.read_text(encoding="utf-8")
            spec = json.loads(definition)
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise TokenizerError(f"tokenizer {path} is not JSON ({error}). Copy the file again.") from error
        if "model" not in spec:
            raise TokenizerError(
                f"tokenizer {path}: expected the key `model` of a Hugging Face tokenizer.json, got the keys "
                f"{sorted(spec)[:6]}. Give the folder's tokenizer.json or tokenizer.model."
            )
        bos_id, eos_id = _special_ids(path.parent, library.Tokenizer.from_str(json.dumps(spec)))
        spec["post_processor"] = None  # it adds specials and trims the offsets of leading spaces
        canonical = json.dumps(spec, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")
        backend = library.Tokenizer.from_str(json.dumps(spec))
        marks = json.dumps([bos_id, eos_id]).encode()
        fingerprint = sha256_of(b"json", canonical, marks)
        return cls(backend, bos_id=bos_id, eos_id=eos_id, fingerprint=fingerprint, definition=definition)

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_with_ends(self, text: str) -> Encoding:
        encoding = self._backend.encode(text, add_special_tokens=False)
        if self._lengths is not None:
            ids = np.array(encoding.ids, dtype=np.int64)
            ends = ends_from_byte_lengths(text, self._lengths[ids])
            if ends is not None:
                return Encoding(ids, ends)
        spans = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        return Encoding(np.array(encoding.ids, dtype=np.int64), _ends_from_spans(spans, len(text)))

    def decode(self, ids: list[int]) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text(self._definition or self._backend.to_str(), encoding="utf-8")
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id}
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{name: None if idx is None else self._backend.id_to_token(idx) for name, idx in ids.items()},
            "add_bos_token": self.bos_id is not None,
        }
        text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _is_byte_level(backend: Any) -> bool:
    """Whether tokens spell the text's bytes one for one, so that lengths give the boundaries at once."""
    spec = json.loads(backend.to_str())
    splitter = spec.get("pre_tokenizer") or {}
    steps = splitter.get("pretokenizers", [splitter])
    return spec.get("normalizer") is None and any(
        step.get("type") == "ByteLevel" and not step.get("add_prefix_space") for step in steps
    )


def _ends_from_spans(spans: NDArray[np.int64], num_characters: int) -> NDArray[np.int64]:
    """Boundaries [N + 1] from character spans [N, 2]; several tokens of one character share its span."""
    ends = np.zeros(len(spans) + 1, dtype=np.int64)
    if len(spans):
        reached = np.maximum.accumulate(spans[:, 1])
        ahead = np.minimum.accumulate(spans[::-1, 0])[::-1]
        ends[1:-1] = np.where(reached[:-1] <= ahead[1:], reached[:-1], -1)
    return settle_ends(ends, num_characters)


def _special_ids(folder: Path, backend: Any) -> tuple[int | None, int | None]:
    """(bos, eos) of a Hugging Face folder. bos is None where the model's own texts do not begin with it."""
    settings = _read_json(folder / "tokenizer_config.json")
    config = _read_json(folder / "config.json")

    def id_of(name: str) -> int | None:
        token = settings.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None:
            return backend.token_to_id(token)
        value = config.get(f"{name}_token_id")
        return value[0] if isinstance(value, list) else value

    bos_id, eos_id = id_of("bos"), id_of("eos")
    added = backend.encode("", add_special_tokens=True).ids
    begins_with_bos = settings.get("add_bos_token")
    if begins_with_bos is None:
        begins_with_bos = bos_id in added[:1]
    return (bos_id if begins_with_bos else None), eos_id


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise TokenizerError(f"{path} beside the tokenizer is not JSON ({error}). Copy the file again.") from error


class SentencePieceTokenizer:
    """A sentencepiece model (Llama 2, Mistral) that keeps every character."""

    def __init__(self, processor: Any, raw: bytes, *, fingerprint: str) -> None:
        self._processor = processor
        self._raw = raw
        self.vocab_size = int(processor.vocab_size())
        self.bos_id = _id_or_none(processor.bos_id())
        self.eos_id = _id_or_none(processor.eos_id())
        self.fingerprint = fingerprint
        controls = (idx for idx in range(self.vocab_size) if processor.is_control(idx))
        self.special_ids: Mapping[str, int] = {processor.id_to_piece(idx): idx for idx in controls}
        self._lengths = np.array([self._num_bytes(idx) for idx in range(self.vocab_size)], dtype=np.int64)
        probe = processor.encode("a")
        self._lead = max(int(self._lengths[probe].sum()) - 1, 0)

    @classmethod
    def from_file(cls, path: Path) -> SentencePieceTokenizer:
        """Read a model file. TokenizerError where it is none, or where its normaliser rewrites text."""
        library = require("sentencepiece", path)
        raw = path.read_bytes()
        processor = library.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(raw)
        except (RuntimeError, OSError, ValueError) as error:
            raise TokenizerError(f"tokenizer {path} is of no kind that ARC-DS knows: expected {SUPPORTED}.") from error
        probe = "two  spaces \n"
        if processor.decode(processor.encode(probe)) != probe:
            raise TokenizerError(
                f"tokenizer {path}: its normaliser rewrites text (two spaces or line ends are lost), so texts could "
                "not be cut and joined without loss. Use a model with identity normalisation, such as Llama 2's."
            )
        return cls(processor, raw, fingerprint=sha256_of(b"sentencepiece", raw))

    def _num_bytes(self, idx: int) -> int:
        if self._processor.is_byte(idx):
            return 1
        if self._processor.is_control(idx) or self._processor.is_unknown(idx):
            return 0
        return len(self._processor.id_to_piece(idx).replace("\u2581", " ").encode("utf-8"))

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self._processor.encode(texts)

    def encode_with_ends(self, text: str) -> Encoding:
        ids = np.array(self._processor.encode(text), dtype=np.int64)
        ends = ends_from_byte_lengths(text, self._lengths[ids], self._lead)
        if ends is None:  # an unknown piece hides how much it covers: nothing but the two ends is sure
            ends = settle_ends(np.full(len(ids) + 1, -1, dtype=np.int64), len(text))
        return Encoding(ids, ends)

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode([int(idx) for idx in ids])

    def save(self, folder: Path) -> None:
        (folder / "tokenizer.model").write_bytes(self._raw)


def _id_or_none(idx: int) -> int | None:
    return int(idx) if idx >= 0 else None


class TiktokenTokenizer:
    """A tiktoken-format file with Llama 3's pattern and its 256 special tokens behind the ranks."""

    def __init__(self, library: ModuleType, ranks: dict[bytes, int], raw: bytes, *, fingerprint: str) -> None:
        specials = {_llama3_special(idx): len(ranks) + idx for idx in range(NUM_LLAMA3_SPECIALS)}
        self._backend = library.Encoding(
            name="llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=specials
        )
        self._raw = raw
        self._num_ranks = len(ranks)
        self.vocab_size = len(ranks) + NUM_LLAMA3_SPECIALS
        self.bos_id: int | None = specials["<|begin_of_text|>"]
        self.eos_id: int | None = specials["<|end_of_text|>"]
        self.fingerprint = fingerprint
        self.special_ids: Mapping[str, int] = specials
        self._lengths = np.zeros(len(ranks), dtype=np.int64)
        for token, rank in ranks.items():
            self._lengths[rank] = len(token)

    @classmethod
    def from_file(cls, path: Path) -> TiktokenTokenizer:
        """Read lines of base64 token and rank. TokenizerError naming the line that cannot be read."""
        library = require("tiktoken", path)
        raw = path.read_bytes()
        ranks: dict[bytes, int] = {}
        for number, line in enumerate(raw.splitlines(), start=1):
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except (ValueError, binascii.Error) as error:
                raise TokenizerError(
                    f"tokenizer {path}, line {number}: expected `BASE64 RANK`, got {line[:60]!r}. Copy the file again."
                ) from error
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise TokenizerError(f"tokenizer {path}: its ranks are not 0 … {len(ranks) - 1}, each once. Copy it again.")
        missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
        if missing:
            raise TokenizerError(f"tokenizer {path}: byte {missing[0]} has no token, so not every text can be encoded.")
        return cls(library, ranks, raw, fingerprint=sha256_of(b"tiktoken", LLAMA3_PATTERN.encode(), raw))

    def encode(self, text: str) -> list[int]:
        return self._backend.encode_ordinary(text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self._backend.encode_ordinary(text) for text in texts]

    def encode_with_ends(self, text: str) -> Encoding:
        ids = np.array(self._backend.encode_ordinary(text), dtype=np.int64)
        ends = ends_from_byte_lengths(text, self._lengths[ids])
        assert ends is not None, "every byte has a token, so the tokens spell the text"
        return Encoding(ids, ends)

    def decode(self, ids: list[int]) -> str:
        return self._backend.decode([int(idx) for idx in ids if idx < self._num_ranks])

    def save(self, folder: Path) -> None:
        (folder / "tokenizer.model").write_bytes(self._raw)


def _llama3_special(idx: int) -> str:
    """Name of the special token that stands `idx` places behind the last rank (Llama 3.1's names)."""
    if idx in _LLAMA3_NAMED:
        return _LLAMA3_NAMED[idx]
    unnamed = idx - sum(1 for named in _LLAMA3_NAMED if named < idx)
    return f"<|reserved_special_token_{unnamed}|>"
