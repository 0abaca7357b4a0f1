"""The sizes of a backbone: what every reader of weights fills in and the transformer is built from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """The `llama3` scaling of rotary frequencies (Llama 3.1 model card; Hugging Face `rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Sizes and constants of a pre-norm decoder-only transformer of the Llama kind.

    family: "llama" | "mistral" | "olmo" | ...; the name of the mapping table that its weights are read with.
    norm: "rms" (weight, no mean) or "layer" (OLMo-1: mean and variance, no parameters).
    rope_scaling: None where positions are not scaled, or where the run asks to ignore the checkpoint's scaling.
    Rotary pairs are always (i, i + head_dim / 2) inside ARC-DS; readers permute weights that pair (2i, 2i + 1).
    """

    family: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    rope_theta: float
    norm_eps: float
    norm: Literal["rms", "layer"] = "rms"
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
