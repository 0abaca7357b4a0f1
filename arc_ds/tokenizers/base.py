"""The interface of every tokenizer, and helpers shared by the implementations.

Shape letters: N tokens.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from arc_ds.errors import TokenizerError
from arc_ds.system.user_files import check_encodable, read_user_json

_PROBE = (
    'The quick brown fox jumps over the lazy dog, while 1234567890 students read 56 books: "WHY?" (yes/no) '
    "x_i = a*b + {c[0]} % 3; #tag @user $5 & ~/home ^up |or| <b>`code`</b> \\n – Où est l'été? Größe, niño, "
    "Москва, Ελλάδα, 北京, 東京, 서울, नमस्ते, שלום, مرحبا 🙂! Jack's big zebra quietly mixed very foggy pink views."
)
COPY_AGAIN = "Copy the file again."
SUPPORTED = (
    "tokenizer.json (Hugging Face tokenizers), tekken.json (Mistral), tokenizer.model (sentencepiece, or tiktoken's "
    "lines as Llama 3 ships them), or a .gguf file"
)


class Encoding(NamedTuple):
    """A tokenised text.

    ids: int64 [N], or uint32 [N] from a cache.
    ends: int64 [N + 1], never decreasing. If the boundary after k tokens is a character boundary, `ends[k]` is its
        position in characters and `ids[:k]` spells `text[:ends[k]]`. Inside a character, and after a token without
        characters, `ends[k]` repeats `ends[k - 1]`. `ends[0]` is 0, and only `ends[N]` is the length of the text.
    """

    ids: NDArray[np.integer]
    ends: NDArray[np.int64]

    def boundary_before(self, token: int) -> int:
        """The last character boundary at or before the token boundary `token`, which may be beyond the end."""
        if token >= len(self.ids):
            return len(self.ids)
        return int(self.ends.searchsorted(self.ends[token]))

    def boundary_behind(self, token: int) -> int:
        """The first character boundary at or after the token boundary `token`."""
        before = self.boundary_before(token)
        return before if before == token else int(self.ends.searchsorted(self.ends[token], side="right"))

    def first(self, max_tokens: int) -> NDArray[np.integer]:
        """The first ids: at most `max_tokens`, without a partial character."""
        return self.ids[: self.boundary_before(max_tokens)]

    def last(self, max_tokens: int) -> NDArray[np.integer]:
        """The last ids: at most `max_tokens`, without a partial character."""
        spare = len(self.ids) - max_tokens
        return self.ids[self.boundary_behind(spare) :] if spare > 0 else self.ids


@runtime_checkable
class Tokenizer(Protocol):
    """The interface that ARC-DS needs. `encode` treats text that looks like a special token as ordinary text.

    bos_id: the id that starts the sequences of this model, None if the model uses none.
    eos_id: the id that ends a text, None if there is none.
    vocab_size: one more than the largest id.
    text_vocab_size: one more than the largest id that a text can give. Special tokens may have larger ids.
    fingerprint: sha256 of everything that determines the ids, as hex digits; independent of the path. It ties shards,
        token caches and checkpoints to one tokenizer: those of another tokenizer are refused or ignored. The same
        vocabulary in another format has another fingerprint.
    special_ids: id of each special token by its text, such as `<|im_end|>`. Chat templates are built from them.
    """

    bos_id: int | None
    eos_id: int | None
    vocab_size: int
    text_vocab_size: int
    fingerprint: str
    special_ids: Mapping[str, int]

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without special tokens."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, without special tokens."""
        return [self.encode(text) for text in texts]

    def encode_with_ends(self, text: str) -> Encoding:
        """Ids of the text, with the character position of each token boundary."""

    def decode(self, ids: list[int]) -> str:
        """The text of the ids. Special tokens yield no text, invalid UTF-8 yields U+FFFD."""

    def save(self, folder: Path) -> None:
        """Write the files from which `load_tokenizer(folder)` loads an equal tokenizer. The folder must exist."""


def read_settings(path: Path) -> dict[str, Any]:
    """Read a JSON file next to a tokenizer. Empty if there is none. TokenizerError if it is not a JSON object."""
    content = read_user_json(path, TokenizerError, remedy=COPY_AGAIN) if path.is_file() else {}
    if not isinstance(content, dict):
        raise TokenizerError(f"{path}: expected a JSON object, got a {type(content).__name__}. {COPY_AGAIN}")
    return content


def require(module: str, path: Path) -> ModuleType:
    """Import the library that reads `path`; TokenizerError with the pip command if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise TokenizerError(f"tokenizer {path} requires the package {module}: pip install {module}") from error


def checked(text: str) -> str:
    """The text itself. DataError on a lone surrogate, for which the libraries raise errors of other types or none."""
    return check_encodable(text, "the text")


def sha256_of(*parts: bytes) -> str:
    """sha256 of the parts, each prefixed with its length, as hex digits."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def ids_digest(tokenizer: Tokenizer) -> str:
    """Digest of the ids of a fixed text, in hex digits. It is the same for the same vocabulary in any file format."""
    return sha256_of(str(tokenizer.encode(_PROBE)).encode())


def ends_of_bytes(text: str, lengths: NDArray[np.int64], lead: int = 0) -> NDArray[np.int64]:
    """`Encoding.ends` of tokens that spell the text's UTF-8 byte for byte.

    text: the tokenised text.
    lengths: int64 [N], bytes of each token. If they do not add up to the text, only its two ends are boundaries.
    lead: bytes that the tokenizer added before the text (sentencepiece's dummy space).
    """
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    lengths.cumsum(out=offsets[1:])
    offsets -= lead
    raw = np.frombuffer(text.encode("utf-8"), dtype=np.int8)
    if offsets[-1] != len(raw):
        offsets[:] = -1
    elif len(raw) > len(text):
        offsets = _characters_before(offsets, raw)
    return settle_ends(offsets, len(text))


def _characters_before(offsets: NDArray[np.int64], raw: NDArray[np.int8]) -> NDArray[np.int64]:
    """Number of characters of UTF-8 (as signed bytes) before each byte offset; negative if it is inside a character."""
    continues = np.append(raw < -64, False)  # 0b10xxxxxx
    begun = offsets - continues.nonzero()[0].searchsorted(offsets)
    return np.where(continues[offsets], -1, begun)


def settle_ends(ends: NDArray[np.int64], num_characters: int) -> NDArray[np.int64]:
    """Convert raw boundaries, int64 [N + 1] and negative inside a character, to `Encoding.ends`."""
    ends = ends.copy()
    ends[0], ends[-1] = 0, num_characters
    ends[1:-1][ends[1:-1] >= num_characters] = -1
    return np.maximum.accumulate(ends)


def spell(tokenizer: Tokenizer, pieces: Sequence[Sequence[int]]) -> list[str]:
    """Decode consecutive pieces of ids to text, so that the texts join to the text of all ids.

    If several pieces share the bytes of a character, the character belongs to the last of them.
    """
    texts: list[str] = []
    ids: list[int] = []
    done = ""
    for place, piece in enumerate(pieces):
        ids += piece
        text = tokenizer.decode(ids)
        if place < len(pieces) - 1:
            text = text.rstrip("\ufffd")
        texts.append(text[len(done) :])
        done = text if len(text) > len(done) else done
    return texts
