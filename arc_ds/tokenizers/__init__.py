"""One small interface over every tokenizer, and where a text may be cut.

The encoder and each decoder have tokenizers of their own. A sample is split in its *text*; `Encoding.ends` says which
token boundaries are character boundaries, so that a cut can be carried from one tokenizer to another.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from arc_ds.errors import TokenizerError
from arc_ds.tokenizers.base import SUPPORTED, Encoding, Tokenizer, parse_json
from arc_ds.tokenizers.together import encode_together, read_together

_TIKTOKEN_LINE = re.compile(rb"^[A-Za-z0-9+/]+=* \d+\r?$")


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
        from arc_ds.tokenizers.gguf_file import read_gguf_tokenizer

        return read_gguf_tokenizer(path)
    if head.lstrip()[:1] == b"{":
        return _read_json_kind(path)
    if _TIKTOKEN_LINE.match(head.split(b"\n", 1)[0]):
        from arc_ds.tokenizers.tiktoken_file import read_tiktoken

        return read_tiktoken(path)
    from arc_ds.tokenizers.sentencepiece_file import SentencePieceTokenizer

    return SentencePieceTokenizer.from_file(path)


def _read_json_kind(path: Path) -> Tokenizer:
    """The tokenizer of a JSON file: Tekken's format or that of Hugging Face."""
    from arc_ds.tokenizers.json_file import JsonTokenizer
    from arc_ds.tokenizers.tiktoken_file import is_tekken, read_tekken

    raw = path.read_bytes()
    spec = parse_json(raw, path)
    return read_tekken(path, raw, spec) if is_tekken(spec) else JsonTokenizer.from_spec(path, raw.decode("utf-8"), spec)


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


__all__ = ["Encoding", "Tokenizer", "check_fits", "encode_together", "load_tokenizer", "read_together"]
