"""Tiny random backbones and compressors, for tests of modules that do not need trained weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from arc_ds.batch.groups import GroupRule
from arc_ds.batch.segments import Sample, Segment
from arc_ds.model.backbone import Recompute
from arc_ds.model.backbone_config import RopeScaling
from arc_ds.model.compressor import Compressor
from arc_ds.model.decoder import Decoder
from arc_ds.model.spec import CompressorSpec, LoraSpec, build_compressor
from tests.helpers.tiny_models import tiny_config

TINY = tiny_config(hidden_size=16, num_layers=3, head_dim=4, ffn_size=24, vocab_size=50)
OUTPUT_NORMED: dict[str, Any] = {"norm_place": "output", "qk_norm": "row"}
# Parts of several families at once. Sequences are on both sides of the original length.
MANY_PARTS: dict[str, Any] = {
    "qk_norm": "head",
    "qkv_bias": True,
    "output_bias": True,
    "ffn_bias": True,
    "clip_qkv": 2.0,
    "layers_without_rope": (0,),
    "window": 3,
    "windowed_layers": (1, 2),
    "rotary_dim": 2,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.7,
    "attention_scale": 0.4,
    "logits_multiplier": 0.8,
    "rope_scaling": RopeScaling(
        kind="longrope",
        factor=2.0,
        original_max_positions=5,
        attention_factor=1.2,
        short_factors=(1.0,),
        long_factors=(0.5,),
    ),
}


def tiny_compressor(
    seed: int = 0, *, activation_checkpointing: Recompute = "none", lora: LoraSpec | None = None, **changes: Any
) -> Compressor:
    """Three layers of width 16 with bridges to width 12 (float64, random). `changes` replace fields of the spec."""
    values: dict[str, Any] = {
        "backbone": TINY,
        "num_layers": 3,
        "rules": (GroupRule("factor", 4),),
        "bridge_hidden_size": 20,
        "decoder_sizes": (12,),
    }
    spec = CompressorSpec(**{**values, **changes})
    return fill(build_compressor(spec, activation_checkpointing=activation_checkpointing, lora=lora), seed)


def tiny_decoder(seed: int = 1, *, activation_checkpointing: Recompute = "none", **changes: Any) -> Decoder:
    """Three layers of width 12 (float64, random, frozen). `changes` replace sizes."""
    config = dataclasses.replace(TINY, **{"hidden_size": 12, "vocab_size": 30, **changes})
    return fill(Decoder(config, activation_checkpointing=activation_checkpointing), seed)


def fill(module: nn.Module, seed: int) -> Any:
    """Give `module` random float64 weights: norms and markers around one, others of order 1 / sqrt(fan-in)."""
    module.double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        around_one = parameter.dim() == 1 or parameter.shape[0] == 1
        parameter.data = 1.0 + 0.1 * noise if around_one else noise * (1.5 / parameter.shape[-1] ** 0.5)
    return module


def sample(*pieces: int, seed: int = 0, marker: Any = "cont", in_loss: bool = True) -> Sample:
    """A sample with random segments: n > 0 gives n text tokens, n < 0 a context of -n tokens."""
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int, vocab_size: int) -> list[int]:
        return torch.randint(vocab_size, (count,), generator=generator).tolist()

    segments = tuple(
        Segment.text(ids(n, 30), in_loss) if n >= 0 else Segment.context(ids(-n, 50), marker) for n in pieces
    )
    return Sample("test", segments)
