"""One small interface over every tokenizer, and where a text may be cut.

The encoder and each decoder have tokenizers of their own. A sample is split in its *text*; `Encoding.ends` says which
token boundaries are character boundaries, so that a cut can be carried from one tokenizer to another.

Shape letters: N tokens.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from arc_ds.errors import TokenizerError

SUPPORTED = (
    "tokenizer.json (Hugging Face tokenizers), tekken.json (Mistral), tokenizer.model (sentencepiece, or tiktoken's "
    "lines as Llama 3 ships them), or a .gguf file"
)
_TIKTOKEN_LINE = re.compile(rb"^[A-Za-z0-9+/]+=* \d+\r?$")


class Encoding(NamedTuple):
    """A tokenised text.

    ids: int64 [N], or uint32 [N] from a cache.
    ends: int64 [N + 1]; `ends[k]` rises where the boundary behind k tokens is one of characters too, to their number:
        there `ids[:k]` spells `text[:ends[k]]`. Inside a character, and behind a token without one, it repeats the
        number before. The first is 0, and only the last is the length of the text.
    """

    ids: NDArray[np.integer]
    ends: NDArray[np.int64]

    def boundary_before(self, token: int) -> int:
        """The last boundary of a character at or before the token boundary `token`, which may be beyond the end."""
        if token >= len(self.ids):
            return len(self.ids)
        return int(self.ends.searchsorted(self.ends[token]))

    def boundary_behind(self, token: int) -> int:
        """The first boundary of a character at or behind the token boundary `token`."""
        before = self.boundary_before(token)
        return before if before == token else int(self.ends.searchsorted(self.ends[token], side="right"))

    def first(self, max_tokens: int) -> NDArray[np.integer]:
        """The first ids, at most `max_tokens` of whole characters."""
        return self.ids[: self.boundary_before(max_tokens)]

    def last(self, max_tokens: int) -> NDArray[np.integer]:
        """The last ids, at most `max_tokens` of whole characters."""
        spare = len(self.ids) - max_tokens
        return self.ids[self.boundary_behind(spare) :] if spare > 0 else self.ids


@runtime_checkable
class Tokenizer(Protocol):
    """What ARC-DS asks of a tokenizer. Text that looks like a special token is ordinary text to `encode`.

    bos_id: the id that sequences of this model begin with, None where the model is used without one.
    eos_id: the id that ends a text, None where there is none.
    vocab_size: one more than the largest id.
    fingerprint: sha256 of what defines the tokenizer's ids, as hex digits, wherever its files lie. Shards, token caches
        and checkpoints are of one tokenizer, and are known by it: what was made with another is refused or left unused.
        The same vocabulary in another format has another fingerprint.
    special_ids: id of each special token by its text, such as `<|im_end|>`; what chat templates are made of.
    """

    bos_id: int | None
    eos_id: int | None
    vocab_size: int
    fingerprint: str
    special_ids: Mapping[str, int]

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without special tokens."""
        ...

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, without special tokens."""
        ...

    def encode_with_ends(self, text: str) -> Encoding:
        """Ids of the text and the character that each token boundary stands at."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of the ids; special tokens give no text, broken UTF-8 gives U+FFFD."""
        ...

    def save(self, folder: Path) -> None:
        """Write the files from which `load_tokenizer(folder)` makes an equal tokenizer. The folder must exist."""
        ...


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a file or folder, recognised by content.

    A folder is searched for tokenizer.json, then tekken.json, then a sentencepiece or tiktoken file, then a single
    .gguf file. Those used last are kept, so that a file that has not changed is read once, and a process that is forked
    has them at its start. TokenizerError where there is nothing usable, the file is damaged, or the library that reads
    it is missing.
    """
    path = Path(path)
    if path.is_dir():
        path = _find_in_folder(path)
    if not path.is_file():
        raise TokenizerError(f"tokenizer {path}: no such file or folder. Expected {SUPPORTED}. Check the path.")
    return _read(path, tuple(map(_state_of, (path, *sorted(path.parent.glob("*.json"))))))


def _state_of(path: Path) -> tuple[str, int, int, int, int] | None:
    """What changes with a file; None where a link leads nowhere."""
    try:
        state = path.stat()
    except OSError:
        return None
    return path.name, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns


@lru_cache(maxsize=8)
def _read(path: Path, _states: tuple[object, ...]) -> Tokenizer:
    """The tokenizer of a file; it, and the JSON files beside it, which may say what its special tokens are, are in
    these states."""
    with path.open("rb") as file:
        head = file.read(4096)
    if head[:4] == b"GGUF":
        from arc_ds.data.tokenizers.gguf_file import read_gguf_tokenizer

        return read_gguf_tokenizer(path)
    if head.lstrip()[:1] == b"{":
        return _read_json_kind(path)
    if _TIKTOKEN_LINE.match(head.split(b"\n", 1)[0]):
        from arc_ds.data.tokenizers.tiktoken_file import read_tiktoken

        return read_tiktoken(path)
    from arc_ds.data.tokenizers.sentencepiece_file import SentencePieceTokenizer

    return SentencePieceTokenizer.from_file(path)


def _read_json_kind(path: Path) -> Tokenizer:
    """The tokenizer of a JSON file: Tekken's format or that of Hugging Face."""
    from arc_ds.data.tokenizers.json_file import JsonTokenizer
    from arc_ds.data.tokenizers.tiktoken_file import is_tekken, read_tekken

    raw = path.read_bytes()
    spec = parse_json(raw, path)
    return read_tekken(path, raw, spec) if is_tekken(spec) else JsonTokenizer.from_spec(path, raw.decode("utf-8"), spec)


def parse_json(raw: bytes, path: Path) -> Any:
    """The content of a JSON file; TokenizerError naming the file where it is none."""
    try:
        return json.loads(raw.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise TokenizerError(f"tokenizer file {path} is not JSON ({error}). Copy the file again.") from error


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


def _find_in_folder(folder: Path) -> Path:
    """The tokenizer file of a folder of weights; TokenizerError where there is none, or several that differ."""
    if (folder / "tokenizer.json").is_file():
        return folder / "tokenizer.json"
    for pattern in ("tekken*.json", "tokenizer.model*", "*.tiktoken", "*.model", "*.gguf"):
        found = sorted(path for path in folder.glob(pattern) if path.is_file())
        # Mistral's folders hold the same file as tokenizer.model and as tokenizer.model.v3.
        if len(found) == 1 or (found and pattern != "*.gguf" and len({path.read_bytes() for path in found}) == 1):
            return found[0]
        if found:
            names = ", ".join(path.name for path in found)
            raise TokenizerError(f"tokenizer folder {folder} holds several candidates ({names}). Name the file itself.")
    names = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise TokenizerError(
        f"tokenizer folder {folder}: expected {SUPPORTED}; found {names}. Copy the model's tokenizer there or set the "
        "`tokenizer` key to its path."
    )


def check_fits(tokenizer: Tokenizer, vocab_size: int, what: str) -> None:
    """TokenizerError where the tokenizer has ids for which the weights of `what` have no embedding row.

    More rows than ids are fine: embeddings are often padded.
    """
    if tokenizer.vocab_size > vocab_size:
        raise TokenizerError(
            f"{what}: its tokenizer has {tokenizer.vocab_size} ids, the embedding only {vocab_size} rows, so they do "
            "not belong together. Give the tokenizer that came with these weights (key `tokenizer`)."
        )


def ends_of_bytes(
    text: str, ids: NDArray[np.int64], lengths: NDArray[np.int64], lead: int = 0, *, some_empty: bool = False
) -> Encoding | None:
    """The Encoding of ids [N] that spell the text's UTF-8 byte for byte.

    lengths: int64 [vocab_size], bytes of each id. lead: bytes in front of the text that the tokenizer added (the dummy
    space of sentencepiece). some_empty: whether ids of no bytes may be among them. None where the ids do not add up to
    the text.
    """
    spans = lengths[ids]
    ends = np.zeros(len(ids) + 1, dtype=np.int64)
    spans.cumsum(out=ends[1:])
    if lead and len(ids):
        ends[1:] -= lead
    raw = None if text.isascii() else np.frombuffer(text.encode("utf-8"), dtype=np.int8)
    if int(ends[-1]) != (len(text) if raw is None else len(raw)):
        return None
    if lead and len(ids) > 1 and ends[1] < 0:  # the added space is none of the text's characters
        np.maximum(ends, 0, out=ends)
    if raw is not None:
        ends = _characters_before(ends, raw)
    return Encoding(ids, settle_ends(ends, len(text)) if some_empty and not spans.all() else ends)


def _characters_before(offsets: NDArray[np.int64], raw: NDArray[np.int8]) -> NDArray[np.int64]:
    """How many characters of UTF-8 (as signed bytes) begin before each byte; before the last byte that begins one where
    this one does not."""
    continues = raw < -64  # 0b10xxxxxx
    inside = np.append(continues, False)[offsets]
    begun = offsets - continues.nonzero()[0].searchsorted(offsets)
    return np.maximum.accumulate(np.where(inside, -1, begun))


def settle_ends(ends: NDArray[np.int64], num_characters: int) -> NDArray[np.int64]:
    """Make raw boundaries int64 [N + 1], -1 where one is none, keep the promise of `Encoding.ends`."""
    ends = ends.copy()
    ends[0], ends[-1] = 0, num_characters
    ends[1:-1][ends[1:-1] >= num_characters] = -1
    return np.maximum.accumulate(ends)
