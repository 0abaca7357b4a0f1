"""One small interface for every tokenizer, which also gives the positions at which a text may be cut.

The encoder and each decoder have their own tokenizers. A sample is split in its *text*; `Encoding.ends` tells which
token boundaries are character boundaries, so that a cut can be transferred from one tokenizer to another.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from pathlib import Path

from arc_ds.errors import TokenizerError
from arc_ds.system.user_files import decode_user_text, library_reads, parse_user_json, read_user_bytes
from arc_ds.tokenizers.base import COPY_AGAIN, SUPPORTED, Encoding, Tokenizer, ids_digest
from arc_ds.tokenizers.gguf_file import read_gguf_tokenizer
from arc_ds.tokenizers.gguf_header import gguf_models, gguf_parts
from arc_ds.tokenizers.json_file import JsonTokenizer
from arc_ds.tokenizers.sentencepiece_file import SentencePieceTokenizer
from arc_ds.tokenizers.tiktoken_file import is_tekken, read_tekken, read_tiktoken
from arc_ds.tokenizers.together import encode_together, read_together

_TIKTOKEN_LINE = re.compile(rb"^[A-Za-z0-9+/]+=* \d+\r?$")
# Names of tokenizer files, the first that is found counts.
_NAMES = ("tokenizer.json", "tekken*.json", "tokenizer.model*", "*.tiktoken", "*.model", "*.gguf")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load the tokenizer of a file or folder (see `tokenizer_file`). The format is detected from the content.

    The most recently used tokenizers are cached: an unchanged file is read once, and a forked process inherits them.
    Raises TokenizerError if there is no usable tokenizer, the file is damaged, or the library that reads it is missing.
    """
    path = tokenizer_file(Path(path))
    return _read(path, tuple(map(_state_of, (path, *sorted(path.parent.glob("*.json"))))))


def tokenizer_file(path: Path) -> Path:
    """The tokenizer of a file or folder, as `find_tokenizer` finds it. Raises TokenizerError if there is none."""
    found = find_tokenizer(path)
    if found is not None:
        return found
    if not path.is_dir():
        raise TokenizerError(f"tokenizer {path}: no such file or folder. Expected {SUPPORTED}. Check the path.")
    names = ", ".join(sorted(file.name for file in path.iterdir())[:8]) or "nothing"
    raise TokenizerError(
        f"tokenizer folder {path}: expected {SUPPORTED}; found {names}. Copy the model's tokenizer there or set the "
        "`tokenizer` key to its path."
    )


def find_tokenizer(path: Path) -> Path | None:
    """The tokenizer of a folder of weights, or the file itself if `path` is a file. None if there is none.

    A folder is searched for tokenizer.json, then tekken.json, then a sentencepiece or tiktoken file, then a .gguf file.
    The first file of a split GGUF model holds the tokenizer. Raises TokenizerError if the folder holds several files of
    one kind that differ.
    """
    if path.is_file():
        return gguf_parts(path)[0]
    for pattern in _NAMES:
        if pattern == "*.gguf":
            found = [parts[0] for parts in gguf_models(path)]
        else:
            found = sorted(file for file in path.glob(pattern) if file.is_file())
        # Mistral's folders hold the same file as tokenizer.model and as tokenizer.model.v3.
        if len(found) == 1 or (found and pattern != "*.gguf" and len({file.read_bytes() for file in found}) == 1):
            return found[0]
        if found:
            names = ", ".join(file.name for file in found)
            raise TokenizerError(
                f"tokenizer folder {path} holds several candidates ({names}). Name the file itself (key or option "
                "`tokenizer`), or keep only the model's own file in the folder."
            )
    return None


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
    read: Callable[[], Tokenizer]
    head = read_user_bytes(path, TokenizerError, remedy=COPY_AGAIN, size=4096)
    if head[:4] == b"GGUF":
        package, read = "tokenizers", partial(read_gguf_tokenizer, path)
    else:
        raw = read_user_bytes(path, TokenizerError, remedy=COPY_AGAIN).removeprefix(codecs.BOM_UTF8)
        if raw[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or raw.lstrip()[:1] == b"{":
            package, read = _json_reader(path, raw)
        elif _TIKTOKEN_LINE.match(raw[:4096].split(b"\n", 1)[0]):
            package, read = "tiktoken", partial(read_tiktoken, path, raw)
        else:
            package, read = "sentencepiece", partial(SentencePieceTokenizer.from_bytes, path, raw)
    with library_reads(package, f"tokenizer {path}", TokenizerError):
        return read()


def _json_reader(path: Path, raw: bytes) -> tuple[str, Callable[[], Tokenizer]]:
    """The package that reads the content of a JSON file, and the call that reads it."""
    text = decode_user_text(raw, f"tokenizer {path}", TokenizerError, remedy=COPY_AGAIN)
    spec = parse_user_json(text, f"tokenizer {path}", TokenizerError, remedy=COPY_AGAIN)
    if is_tekken(spec):
        return "tiktoken", partial(read_tekken, path, raw, spec)
    return "tokenizers", partial(JsonTokenizer.from_spec, path, text, spec)


def check_fits(tokenizer: Tokenizer, num_rows: int, what: str, special_ids: Iterable[int] = ()) -> None:
    """Raise TokenizerError if an id that occurs in samples has no embedding row in the weights of `what`.

    More rows than ids are allowed, because embeddings are often padded. So are special tokens beyond the rows that no
    sample contains, such as a `<pad>` that was added after training.

    special_ids: the special tokens of samples: begin-of-text, and those of a chat template.
    """
    largest_of_texts = tokenizer.text_vocab_size - 1
    largest = max((largest_of_texts, *special_ids))
    if largest < num_rows:
        return
    name = next((name for name, idx in tokenizer.special_ids.items() if idx == largest), "of its settings")
    tokens = "texts have ids up to" if largest == largest_of_texts else f"the special token {name} has the id"
    raise TokenizerError(
        f"{what}: in its tokenizer, {tokens} {largest}, but the embedding has only {num_rows} rows, so they do "
        "not belong together. Give the tokenizer that came with these weights (key `tokenizer`)."
    )


__all__ = [
    "Encoding",
    "Tokenizer",
    "check_fits",
    "encode_together",
    "find_tokenizer",
    "ids_digest",
    "load_tokenizer",
    "read_together",
    "tokenizer_file",
]
