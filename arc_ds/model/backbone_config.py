"""The sizes of a backbone. Every weights reader returns them and the transformer is built from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


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

    family: "llama" | "mistral" | "olmo" | ...; the origin of the weights. Exports record it; nothing computes with it.
    norm: "rms" (weight, no mean) or "layer" (OLMo-1: mean and variance, no parameters).
    rope_scaling: None if positions are not scaled, or if the run ignores the checkpoint's scaling.

    Rotary pairs are always (i, i + head_dim / 2) inside ARC-DS. Readers permute weights that pair (2i, 2i + 1).
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

    @staticmethod
    def from_json(plain: Mapping[str, Any]) -> BackboneConfig:
        """The inverse of `dataclasses.asdict`. Raises KeyError or TypeError on a missing or unknown field.

        Missing fields are not filled with defaults, because that could change the meaning of the weights.
        """
        values = {field.name: plain[field.name] for field in dataclasses.fields(BackboneConfig)} | dict(plain)
        if values["rope_scaling"] is not None:
            values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
        return BackboneConfig(**values)
