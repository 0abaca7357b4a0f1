"""A small trained compressor as input of an export, and decoders with tokenizers for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from arc_ds.batch.groups import GroupRule
from arc_ds.checkpoints.trained_for import TrainedFor
from arc_ds.data.tasks.chat import LayoutName
from arc_ds.export.consolidate import TrainedCompressor
from arc_ds.model.spec import CompressorSpec, build_compressor
from tests.helpers import tiny_models as tiny
from tests.helpers.tiny_data import write_json_tokenizer, write_tiktoken

ENCODER = tiny.tiny_config(vocab_size=600)
DECODER = tiny.tiny_config(hidden_size=48, head_dim=12, vocab_size=350)


def tiny_spec(**changes: Any) -> CompressorSpec:
    """A spec with two layers of width 32, factor 4 and one mlp bridge to width 48. `changes` replace fields."""
    values: dict[str, Any] = {
        "backbone": ENCODER,
        "num_layers": 1,
        "rules": (GroupRule("factor", 4),),
        "bridge_hidden_size": 24,
        "decoder_sizes": (48,),
    }
    return CompressorSpec(**{**values, **changes})


def tiny_trained(
    folder: Path, seed: int = 0, chat_templates: Sequence[LayoutName | None] = (), **changes: Any
) -> TrainedCompressor:
    """A compressor of `tiny_spec(**changes)` with random weights. Writes its tokenizer to `folder`.

    chat_templates: of the decoders in training; unknown if empty.
    """
    spec = tiny_spec(**changes)
    decoders = [
        TrainedFor(name=f"decoder{n}", rope_scaling="checkpoint", chat_template=template)
        for n, template in enumerate(chat_templates or [None] * len(spec.decoder_sizes))
    ]
    return random_trained(spec, write_tiktoken(folder / "tokenizer.model"), decoders, seed)


def random_trained(
    spec: CompressorSpec, tokenizer: Path, decoders: Sequence[TrainedFor], seed: int = 0, **records: Any
) -> TrainedCompressor:
    """A compressor of a spec with random weights, as of step 7. records: further fields."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: p.shape for name, p in build_compressor(spec).named_parameters()}
    return TrainedCompressor(
        spec=spec,
        tensors={name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()},
        step=7,
        encoder_tokenizer=str(tokenizer),
        decoders=tuple(decoders),
        **records,
    )


def write_decoder(folder: Path, seed: int = 1, *, bos: bool = True, **sizes: Any) -> Path:
    """Write a Hugging Face folder with a random decoder of width 48 and a tokenizer of 340 ids."""
    config = dataclasses.replace(DECODER, **sizes)
    tiny.write_hf(folder, config, tiny.random_tensors(config, seed))
    return write_json_tokenizer(folder, bos=bos)
