"""Samples converted back to text, for comparison with golden texts."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path

import tokenizers

from arc_ds.batch.segments import Sample, Segment
from arc_ds.tokenizers import Tokenizer
from tests.helpers.tiny_data import write_json_tokenizer

IM_TOKENS = ("<|im_start|>", "<|im_end|>")


def written(sample: Sample, encoder: Tokenizer, decoder: Tokenizer) -> str:
    """The sequence as text: ⟦context⟧ (followed by <rec> or <cont>), ‹target›, special tokens by name.

    Text between contexts is decoded as a whole, so the edge of a target must not split a character.
    """
    names = {idx: name for name, idx in decoder.special_ids.items()}
    pieces = []
    for segment in sample.segments:
        if segment.kind == "context":
            marker = "" if segment.marker is None else f"<{segment.marker}>"
            pieces.append(f"⟦{encoder.decode(list(segment.ids))}{marker}⟧")
        else:
            text = _text(segment, names, decoder)
            pieces.append(f"‹{text}›" if segment.in_loss else text)
    return "".join(pieces).replace("›‹", "")


def _text(segment: Segment, names: dict[int, str], decoder: Tokenizer) -> str:
    pieces = []
    for is_special, group in groupby(segment.ids, key=lambda token: token in names):
        ids = list(group)
        pieces.append("".join(names[token] for token in ids) if is_special else decoder.decode(ids))
    return "".join(pieces)


def write_chat_tokenizer(folder: Path, *, template: object = None) -> Path:
    """Write the folder of `write_json_tokenizer` with `IM_TOKENS` and a chat template."""
    write_json_tokenizer(folder)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens(list(IM_TOKENS))
    backend.save(str(folder / "tokenizer.json"))
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": template}))
    return folder
