"""Settings for generation in a decoder's files: the ids that end a continuation, and the longest sequence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arc_ds.data.tasks.chat import read_layout
from arc_ds.data.tasks.script import Special
from arc_ds.errors import TokenizerError, WeightsError
from arc_ds.model.weights.fields import Fields
from arc_ds.model.weights.locate import locate
from arc_ds.tokenizers import Tokenizer
from arc_ds.tokenizers.gguf_header import read_gguf_header

_JSON_FILES = ("generation_config.json", "config.json")
_GGUF_KEYS = tuple(f"tokenizer.ggml.{end}_token_id" for end in ("eos", "eot", "eom"))

_LLAMA3_TURN_ENDS = ("<|eot_id|>", "<|eom_id|>")  # no file of Meta's own folders names them


def find_stop_ids(path: Path, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """All ends of a text or of a turn that a decoder's files name, ascending.

    They are the tokenizer's end of text, `eos_token_id` of generation_config.json and config.json, the ends in the
    metadata of a GGUF file, the token that ends a turn of the chat template, and Llama 3's ends of a turn.

    path: the decoder's weights.
    tokenizer: the decoder's, None if it has none.

    Raises WeightsError if a file holds no ids there.
    """
    metadata = _gguf_metadata(path)
    found = {*_of_json(path), *(metadata[key] for key in _GGUF_KEYS if key in metadata)}
    if tokenizer is not None:
        found |= {tokenizer.special_ids[name] for name in _LLAMA3_TURN_ENDS if name in tokenizer.special_ids}
        found |= {*_of_template(path, tokenizer), -1 if tokenizer.eos_id is None else tokenizer.eos_id}
    return tuple(sorted(idx for idx in found if idx >= 0))  # files write -1 for none


def find_max_positions(path: Path) -> int | None:
    """Length of the longest sequence that a decoder's files state; None if they do not."""
    metadata, config = _gguf_metadata(path), path / "config.json"
    if metadata:
        return metadata.get(f"{metadata.get('general.architecture')}.context_length")
    fields = Fields.read(config) if config.is_file() else Fields({}, str(path))
    key = "max_position_embeddings"
    return None if fields.get(key) is None else fields.integer(key)


def _of_json(path: Path) -> list[int]:
    found: list[int] = []
    for file in (path / name for name in _JSON_FILES):
        if not file.is_file():
            continue
        fields = Fields.read(file)
        value = fields.get("eos_token_id", [])
        ids = value if isinstance(value, list) else [value]
        if any(isinstance(idx, bool) or not isinstance(idx, int) for idx in ids):
            raise fields.wrong("eos_token_id", "a token id or a list of token ids", value)
        found += ids
    return found


def _gguf_metadata(path: Path) -> Mapping[str, Any]:
    """The metadata of a GGUF decoder without its lists; empty for other kinds of weights."""
    found = locate(path)
    if found.kind != "gguf":
        return {}
    try:
        return read_gguf_header(found.files[0]).metadata
    except ValueError as error:
        raise WeightsError(f"{found.files[0]}: {error}. Copy the file again.") from error


def _of_template(path: Path, tokenizer: Tokenizer) -> list[int]:
    try:
        end = read_layout("tokenizer", tokenizer, path).end
    except TokenizerError:  # most base models have no template; one that cannot be used here has no turns to end
        return []
    return [idx for part in end if isinstance(part, Special) for idx in part.ids]
