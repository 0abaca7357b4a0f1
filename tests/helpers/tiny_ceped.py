"""A tiny random CEPED model in a folder, with the names and the config of the published one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from arc_ds.model.ceped import Ceped
from arc_ds.model.weights.ceped_files import name_in_file, read_ceped_config

_ENCODER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "is_decoder": False,
}
_DECODER = {
    "model_type": "llama",
    "do_cross_attention": True,
    "num_cross_attn_layers": 1,
    "num_cross_attn_hidden_states": 1,
    "encoder_is_model": False,
    "encode_mode": "context_only",
    "encoder_hidden_size": 16,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}


def write_tiny_ceped(folder: Path, *, vocab_size: int, **changes: Any) -> Path:
    """Write config.json and model.safetensors with random values, and return the folder.

    vocab_size: number of ids of the decoder. The encoder has one more.
    changes: keys of config.json with other values.
    """
    folder.mkdir(parents=True, exist_ok=True)
    encoder = {**_ENCODER, "vocab_size": vocab_size + 1}
    (folder / "config.json").write_text(
        json.dumps({**_DECODER, "vocab_size": vocab_size, "encoder_config": encoder, **changes}), encoding="utf-8"
    )
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in Ceped(read_ceped_config(folder)).named_parameters()}
    generator = torch.Generator().manual_seed(3)
    tensors = {
        name_in_file(name): torch.randn(shape, generator=generator) * (0.4 if len(shape) > 1 else 0.2)
        + (len(shape) == 1)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors")
    return folder
