"""The sizes of a backbone. Every weights reader returns them and the transformer is built from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

RopeKind = Literal["llama3", "linear", "dynamic", "yarn", "longrope"]


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """A scaling of rotary frequencies. Fields that a kind does not use keep their defaults.

    kind: name of the scaling, as in Hugging Face's `rope_type`. See `rope.py`.
    factor: ratio of the extended context to the original one. Unused by longrope.
    original_max_positions: length of the original context. Unused by linear.
    low_freq_factor: llama3 only.
    high_freq_factor: llama3 only.
    beta_fast: yarn only.
    beta_slow: yarn only.
    truncate: yarn only; whether the bounds of the interpolated frequencies are rounded to whole dimensions.
    attention_factor: yarn and longrope; factor of cosines and sines. The reader computes it if the files omit it.
    short_factors: longrope only; divisor of each frequency for sequences of at most `original_max_positions`.
    long_factors: longrope only; divisor of each frequency for longer sequences.
    query_beta: yarn only; queries at position p are multiplied by 1 + query_beta * ln(1 + p // original_max_positions)
        (Ministral 3).
    """

    kind: RopeKind = "llama3"
    factor: float
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    query_beta: float = 0.0


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Sizes and constants of a decoder-only transformer. The defaults are Llama's.

    family: "llama" | "mistral" | "olmo" | ...; the origin of the weights. Exports record it; nothing computes with it.
    norm: "rms" (weight, no mean) or "layer" (OLMo-1: mean and variance, no parameters).
    norm_place: "input" normalizes the input of attention and feed-forward, "output" normalizes their output (OLMo 2).
    qk_norm: RMSNorm of queries and keys before rotation: None, "head" (over each head, weight [head_dim]; Qwen3) or
        "row" (over all heads of a row, weight [heads * head_dim]; OLMo 2).
    qkv_bias: whether the projections of queries, keys and values have a bias (Qwen2).
    output_bias: whether the output projection of attention has a bias.
    ffn_bias: whether the three projections of the feed-forward layer have a bias.
    clip_qkv: bound of the absolute values of queries, keys and values; None for no bound.
    rope_scaling: None if positions are not scaled, or if the run ignores the checkpoint's scaling.
    rotary_dim: number of rotated dimensions of each head, the first ones in the files; None for all.
    layers_without_rope: indices of layers that rotate nothing (SmolLM3).
    window: a query of `windowed_layers` sees at most this many keys, the last ones up to its own; None for all. A
        bidirectional encoder ignores it: each row sees its whole context.
    windowed_layers: indices of the layers with a window.
    windowed_rope_scaling: whether layers with a window apply `rope_scaling` (OLMo 3's do not).
    embedding_multiplier: factor of all rows that enter the first layer, compressed vectors and memory tokens included.
        So compressed vectors live in the space of `inputs_embeds` of transformers, whose Granite multiplies them, too.
    residual_multiplier: factor of the output of attention and feed-forward.
    attention_scale: factor of attention scores; None for head_dim ** -0.5.
    logits_multiplier: factor of logits.

    Rotary pairs are always (i, i + head_dim / 2) inside ARC-DS. Readers permute weights that pair other dimensions. If
    `rotary_dim` is set, the last pairs do not rotate.
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
    norm_place: Literal["input", "output"] = "input"
    qk_norm: Literal["head", "row"] | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    ffn_bias: bool = False
    clip_qkv: float | None = None
    rope_scaling: RopeScaling | None = None
    rotary_dim: int | None = None
    layers_without_rope: tuple[int, ...] = ()
    window: int | None = None
    windowed_layers: tuple[int, ...] = ()
    windowed_rope_scaling: bool = True
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    attention_scale: float | None = None
    logits_multiplier: float = 1.0
    tie_embeddings: bool = False

    def window_of(self, layer_idx: int) -> int | None:
        """The window of a layer; None if its queries see all keys."""
        return self.window if layer_idx in self.windowed_layers else None

    @staticmethod
    def from_json(plain: Mapping[str, Any]) -> BackboneConfig:
        """The inverse of `dataclasses.asdict`. Raises KeyError or TypeError on a missing or unknown field.

        Only fields that the first version of exports lacked take their defaults, which are what that version computed.
        A default for another missing field could change the meaning of the weights.
        """
        values = {name: plain[name] for name in FIRST_FIELDS} | dict(plain)
        if values["rope_scaling"] is not None:
            scaling = RopeScaling(**values["rope_scaling"])
            factors = tuple(scaling.short_factors), tuple(scaling.long_factors)
            values["rope_scaling"] = dataclasses.replace(scaling, short_factors=factors[0], long_factors=factors[1])
        for name in ("layers_without_rope", "windowed_layers"):
            values[name] = tuple(values.get(name, ()))
        return BackboneConfig(**values)


FIRST_FIELDS = (
    "family", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_size", "vocab_size",
    "rope_theta", "norm_eps", "norm", "rope_scaling", "tie_embeddings",
)  # fmt: skip
FIRST_SCALING_FIELDS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_positions")
