"""One small interface for every tokenizer, which also gives the positions at which a text may be cut.

The encoder and each decoder have their own tokenizers. A sample is split in its *text*; `Encoding.ends` tells which
token boundaries are character boundaries, so that a cut can be transferred from one tokenizer to another.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from arc_ds.errors import TokenizerError
from arc_ds.system.user_files import refuse_pointer
from arc_ds.tokenizers.base import SUPPORTED, Encoding, Tokenizer, parse_json
from arc_ds.tokenizers.gguf_file import read_gguf_tokenizer
from arc_ds.tokenizers.json_file import JsonTokenizer
from arc_ds.tokenizers.sentencepiece_file import SentencePieceTokenizer
from arc_ds.tokenizers.tiktoken_file import is_tekken, read_tekken, read_tiktoken
from arc_ds.tokenizers.together import encode_together, read_together

_TIKTOKEN_LINE = re.compile(rb"^[A-Za-z0-9+/]+=* \d+\r?$")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load the tokenizer of a file or folder. The format is detected from the content.

    A folder is searched for tokenizer.json, then tekken.json, then a sentencepiece or tiktoken file, then a single
    .gguf file. The most recently used tokenizers are cached: an unchanged file is read once, and a forked process
    inherits them. Raises TokenizerError if there is no usable tokenizer, the file is damaged, or the library that reads
    it is missing.
    """
    path = Path(path)
    if path.is_dir():
        path = _find_in_folder(path)
    if not path.is_file():
        raise TokenizerError(f"tokenizer {path}: no such file or folder. Expected {SUPPORTED}. Check the path.")
    return _read(path, tuple(map(_state_of, (path, *sorted(path.parent.glob("*.json"))))))


def _state_of(path: Path) -> tuple[str, int, int, int, int] | None:
    """Name, inode, size and times of a file, which change if it does; None for a dangling link."""
    try:
        state = path.stat()
    except OSError:
        return None
    return path.name, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns


@lru_cache(maxsize=8)
def _read(path: Path, _states: tuple[object, ...]) -> Tokenizer:
    """Read the tokenizer of a file.

    _states: states of the file and of the JSON files next to it, which may define its special tokens. They are part of
        the cache key only.
    """
    with path.open("rb") as file:
        head = file.read(4096)
    refuse_pointer(head, str(path), TokenizerError)
    if head[:4] == b"GGUF":
        return read_gguf_tokenizer(path)
    if head.lstrip()[:1] == b"{":
        raw = path.read_bytes()
        spec = parse_json(raw, path)
        if is_tekken(spec):
            return read_tekken(path, raw, spec)
        return JsonTokenizer.from_spec(path, raw.decode("utf-8"), spec)
    if _TIKTOKEN_LINE.match(head.split(b"\n", 1)[0]):
        return read_tiktoken(path)
    return SentencePieceTokenizer.from_file(path)


def _find_in_folder(folder: Path) -> Path:
    """Find the tokenizer file in a folder of weights; TokenizerError if there is none, or several that differ."""
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
    """Raise TokenizerError if the tokenizer has ids without an embedding row in the weights of `what`.

    More rows than ids are allowed, because embeddings are often padded.
    """
    if tokenizer.vocab_size > vocab_size:
        raise TokenizerError(
            f"{what}: its tokenizer has {tokenizer.vocab_size} ids, but the embedding has only {vocab_size} rows, so "
            "they do not belong together. Give the tokenizer that came with these weights (key `tokenizer`)."
        )


__all__ = ["Encoding", "Tokenizer", "check_fits", "encode_together", "load_tokenizer", "read_together"]
