"""Settings for generation in a decoder's files: the ids that end a continuation, and the longest sequence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from arc_ds.data.tasks.chat import read_layout
from arc_ds.data.tasks.script import Special
from arc_ds.errors import TokenizerError, WeightsError
from arc_ds.model.weights.fields import Fields
from arc_ds.model.weights.locate import locate
from arc_ds.tokenizers import Tokenizer
from arc_ds.tokenizers.gguf_header import read_gguf_header

_SIZES = ("config.json", "params.json")
_JSON_FILES = ("generation_config.json", *_SIZES)
_LENGTHS = ("max_position_embeddings", "max_sequence_length", "max_seq_len")  # Hugging Face and Mistral; OLMo; Mistral
_WINDOWS = ("sliding_window", "_sliding_window")
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
    metadata = _gguf_metadata(path)
    if metadata:
        return metadata.get(f"{metadata.get('general.architecture')}.context_length")
    for fields in _objects(path, _SIZES):
        for key in _LENGTHS:
            if fields.get(key) is not None:
                return fields.integer(key)
        # Ministral's layers without a window attend to the longest sequence, which its list holds.
        windows = next((fields.get(key) for key in _WINDOWS if isinstance(fields.get(key), list)), [None])
        if None not in windows:
            sizes = {Fields({"sliding_window": size}, fields.where).integer("sliding_window") for size in windows}
            if len(sizes) > 1:
                return max(sizes)
    return None


def _objects(path: Path, names: tuple[str, ...]) -> Iterator[Fields]:
    """The JSON objects in the files of a decoder, and those of the language model in a model of images and text."""
    for file in (path / name for name in names):
        if file.is_file():
            fields = Fields.read(file)
            yield fields
            if isinstance(fields.get("text_config"), Mapping):
                yield fields.object("text_config")


def _of_json(path: Path) -> list[int]:
    found: list[int] = []
    for fields in _objects(path, _JSON_FILES):
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
