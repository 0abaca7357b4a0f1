"""Sizes and tensor names of GGUF files: the architectures that differ from llama by data alone.

Facts about architectures are from llama.cpp: its converter and its models.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from arc_ds.errors import WeightsError
from arc_ds.model.backbone_config import BackboneConfig, RopeScaling
from arc_ds.model.rope import rope_frequencies
from arc_ds.model.weights.families import FAMILIES, Family, TensorNames, layers_of
from arc_ds.model.weights.fields import Fields
from arc_ds.model.weights.gguf_store import GgufStore
from arc_ds.model.weights.hf_config import RopeScalingChoice

_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
_LLAMA3_DIVISORS, _SHORT_DIVISORS, _LONG_DIVISORS = (
    f"{name}.weight" for name in ("rope_freqs", "rope_factors_short", "rope_factors_long")
)
_NAMES: Mapping[str, str] = {
    "tok_embeddings": "token_embd",
    "layers.{i}.attention_norm": "blk.{i}.attn_norm",
    "layers.{i}.attention.wq": "blk.{i}.attn_q",
    "layers.{i}.attention.wk": "blk.{i}.attn_k",
    "layers.{i}.attention.wv": "blk.{i}.attn_v",
    "layers.{i}.attention.wo": "blk.{i}.attn_output",
    "layers.{i}.attention.q_norm": "blk.{i}.attn_q_norm",
    "layers.{i}.attention.k_norm": "blk.{i}.attn_k_norm",
    "layers.{i}.ffn_norm": "blk.{i}.ffn_norm",
    "layers.{i}.feed_forward.w1": "blk.{i}.ffn_gate",
    "layers.{i}.feed_forward.w2": "blk.{i}.ffn_down",
    "layers.{i}.feed_forward.w3": "blk.{i}.ffn_up",
    "norm": "output_norm",
    "output": "output",
}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """An architecture of llama.cpp.

    family: key of `FAMILIES`, which has the constants that the metadata do not hold.
    label: see `BackboneConfig.family`; None for `family`.
    interleaved: whether the converter reorders wq and wk to the pairs (2i, 2i + 1).
    epsilon: the metadata key of the norms' epsilon.
    names: names of tensors that differ from llama's.
    """

    family: str
    label: str | None = None
    interleaved: bool = False
    epsilon: str = "attention.layer_norm_rms_epsilon"
    names: Mapping[str, str] = field(default_factory=dict)


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(family="mistral", label="llama", interleaved=True),  # Mistral's models, too
    "mistral3": Architecture(family="ministral3", interleaved=True),
    "qwen2": Architecture(family="qwen2"),
    "qwen3": Architecture(family="qwen3"),
    "olmo": Architecture(family="olmo", interleaved=True, epsilon="attention.layer_norm_epsilon"),
    "olmo2": Architecture(  # OLMo 3's models, too
        family="olmo3",
        label="olmo2",
        names={
            "layers.{i}.attention_norm": "blk.{i}.post_attention_norm",
            "layers.{i}.ffn_norm": "blk.{i}.post_ffw_norm",
        },
    ),
    "granite": Architecture(family="granite", interleaved=True),
    "smollm3": Architecture(family="smollm3", interleaved=True),
    "phi3": Architecture(
        family="phi3",
        names={
            **dict.fromkeys((f"layers.{{i}}.attention.{name}" for name in ("wq", "wk", "wv")), "blk.{i}.attn_qkv"),
            **dict.fromkeys((f"layers.{{i}}.feed_forward.{name}" for name in ("w1", "w3")), "blk.{i}.ffn_up"),
        },
    ),
}
# Metadata keys of numbers that a file may lack, by field of `BackboneConfig`.
_NUMBERS = {
    "clip_qkv": "attention.clamp_kqv",
    "attention_scale": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
}
_INSTEAD = "Use the model's Hugging Face folder, or set rope_scaling: none if its contexts are short."
_BIASES = {"qkv_bias": "attention.wq", "output_bias": "attention.wo", "ffn_bias": "feed_forward.w2"}


def gguf_names(store: GgufStore) -> TensorNames:
    """The tensor names of a file's architecture. WeightsError if the architecture is unknown."""
    name, architecture = _architecture(store)
    return TensorNames(
        name=f"GGUF {name}",
        table={**_NAMES, **architecture.names},
        interleaved=architecture.interleaved,
        ignored=(_LLAMA3_DIVISORS, _SHORT_DIVISORS, _LONG_DIVISORS),  # `sizes_of_gguf` reads them
    )


def _architecture(store: GgufStore) -> tuple[str, Architecture]:
    name = str(store.metadata.get("general.architecture"))
    if name not in ARCHITECTURES:
        raise WeightsError(
            f"{store.path}: `general.architecture` is {name!r}; ARC-DS reads GGUF files of {', '.join(ARCHITECTURES)}. "
            "Choose another file, or the model's Hugging Face folder."
        )
    return name, ARCHITECTURES[name]


def sizes_of_gguf(store: GgufStore, rope_scaling: RopeScalingChoice) -> BackboneConfig:
    """Sizes from the metadata of a GGUF file, and from its tensors: biases, a tied head, and rotary divisors.

    Raises WeightsError for an unknown architecture, experts, and a rotary scaling that ARC-DS does not compute.
    """
    name, architecture = _architecture(store)
    prefix = f"{name}."
    own = {key.removeprefix(prefix): value for key, value in store.metadata.items() if key.startswith(prefix)}
    fields = Fields(own, f"{store.path}: {name}")
    fields.refuse("expert_count", 0)
    if _EMBEDDING not in store.shapes:
        raise WeightsError(f"{store.path}: tensor `{_EMBEDDING}` is missing. Copy the file again.")
    hidden, num_heads = fields.integer("embedding_length"), fields.integer("attention.head_count")
    head_dim = fields.integer("attention.key_length", hidden // num_heads)
    fields.refuse("attention.value_length", head_dim)
    if architecture.interleaved:
        fields.refuse("rope.dimension_count", head_dim)
    rotary_dim = fields.integer("rope.dimension_count", head_dim)
    num_layers = fields.integer("block_count")
    family = FAMILIES[architecture.family]
    window, windowed_layers = _windows(fields, family, num_layers)
    config = BackboneConfig(
        family=architecture.label or architecture.family,
        hidden_size=hidden,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=fields.integer("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        ffn_size=fields.integer("feed_forward_length"),
        vocab_size=store.shapes[_EMBEDDING][0],
        rope_theta=fields.number("rope.freq_base", 10000.0),
        norm_eps=fields.number(architecture.epsilon),
        norm=family.norm,
        norm_place=family.norm_place,
        qk_norm=family.qk_norm,
        rotary_dim=None if rotary_dim == head_dim else rotary_dim,
        layers_without_rope=layers_of(family.without_rope, fields, num_layers),
        window=window,
        windowed_layers=windowed_layers,
        windowed_rope_scaling=family.windowed_rope_scaling or window is None,
        tie_embeddings=_HEAD not in store.shapes,
        **_optional(fields, store, architecture),
    )
    if rope_scaling == "checkpoint":
        config = dataclasses.replace(config, rope_scaling=_rope_scaling(fields, store, config))
    return config


def _optional(fields: Fields, store: GgufStore, architecture: Architecture) -> dict[str, Any]:
    """Biases and multipliers, by field of `BackboneConfig`."""
    table = {**_NAMES, **architecture.names}
    given: dict[str, Any] = {
        key: f"{table['layers.{i}.' + module]}.bias".replace("{i}", "0") in store.shapes
        for key, module in _BIASES.items()
    }
    given |= {key: fields.number(number) for key, number in _NUMBERS.items() if fields.get(number)}
    if fields.get("logit_scale"):
        given["logits_multiplier"] = 1.0 / fields.number("logit_scale")
    return given


def _windows(fields: Fields, family: Family, num_layers: int) -> tuple[int | None, tuple[int, ...]]:
    """`window` and `windowed_layers` of `BackboneConfig`. The metadata write 0 for no window."""
    if not fields.get("attention.sliding_window"):
        return None, ()
    key = "attention.sliding_window_pattern"
    pattern = fields.get(key)
    if pattern is None:
        layers = layers_of(family.windowed, fields, num_layers)
    elif isinstance(pattern, list) and len(pattern) == num_layers:
        layers = tuple(idx for idx, is_windowed in enumerate(pattern) if is_windowed)
    else:
        raise fields.wrong(key, f"a list of {num_layers} flags", pattern)
    return (fields.integer("attention.sliding_window"), layers) if layers else (None, ())


def _rope_scaling(fields: Fields, store: GgufStore, config: BackboneConfig) -> RopeScaling | None:
    """The rotary scaling: llama3 and longrope have tensors of divisors, the others a name."""
    if _LLAMA3_DIVISORS in store.shapes:
        return _llama3(config, store.tensor(_LLAMA3_DIVISORS), fields.where)
    if store.shapes.keys() & {_SHORT_DIVISORS, _LONG_DIVISORS}:
        return _longrope(fields, store, config)
    kind = fields.get("rope.scaling.type", "none")
    if kind != "yarn":
        fields.refuse("attention.temperature_scale", 0)
    if kind == "none":
        return None
    factor = fields.number("rope.scaling.factor")
    if kind == "linear":
        return RopeScaling(kind="linear", factor=factor)
    if kind == "yarn":
        return _yarn(fields, factor)
    raise WeightsError(f"{fields.where}: `rope.scaling.type` is {kind!r}; expected none, linear or yarn. {_INSTEAD}")


def _original(fields: Fields) -> int:
    """Length of the original context."""
    return fields.integer("rope.scaling.original_context_length", fields.get("context_length"))


def _longrope(fields: Fields, store: GgufStore, config: BackboneConfig) -> RopeScaling:
    """Phi-3's scaling. Its attention factor follows from the two lengths, if the file does not hold it."""
    num_pairs = (config.rotary_dim or config.head_dim) // 2
    for name in (_SHORT_DIVISORS, _LONG_DIVISORS):
        if store.shapes.get(name) != (num_pairs,):
            raise WeightsError(
                f"{store.path}: expected the tensor `{name}` with {num_pairs} numbers, got {store.shapes.get(name)}. "
                f"{_INSTEAD}"
            )
    original = _original(fields)
    factor = fields.integer("context_length") / original
    by_default = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return RopeScaling(
        kind="longrope",
        factor=factor,
        original_max_positions=original,
        attention_factor=fields.number("rope.scaling.attn_factor", by_default),
        short_factors=tuple(store.tensor(_SHORT_DIVISORS).tolist()),
        long_factors=tuple(store.tensor(_LONG_DIVISORS).tolist()),
    )


def _yarn(fields: Fields, factor: float) -> RopeScaling:
    """llama.cpp multiplies cosines and sines by 1 + 0.1 ln(factor), or by its ratio to a second such term."""
    weight = fields.number_or_zero("rope.scaling.yarn_log_multiplier")
    attention_factor = (0.1 * math.log(factor) + 1.0) / (0.1 * weight * math.log(factor) + 1.0)
    stored = fields.get("rope.scaling.attn_factor", 1.0)
    if stored != 1.0 and not math.isclose(stored, attention_factor, rel_tol=1e-5):
        raise WeightsError(
            f"{fields.where}: `rope.scaling.attn_factor` is {stored!r}; expected 1 or {attention_factor:.4f}. "
            f"{_INSTEAD}"
        )
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_max_positions=_original(fields),
        beta_fast=fields.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=fields.number("rope.scaling.yarn_beta_slow", 1.0),
        attention_factor=attention_factor,
        query_beta=fields.number_or_zero("attention.temperature_scale"),
    )


def _llama3(config: BackboneConfig, divisors: Tensor, where: str) -> RopeScaling:
    """The llama3 scaling that has these divisors of frequencies. The defaults are Llama 3.1's constants."""
    factor = round(float(divisors.max()), 4)
    scaling = RopeScaling(factor=factor, original_max_positions=8192)
    scaled = dataclasses.replace(config, rope_scaling=scaling)
    frequencies, expected = (rope_frequencies(c, divisors.device) for c in (config, scaled))
    if divisors.shape != frequencies.shape or not torch.allclose(frequencies / divisors, expected, rtol=1e-4, atol=0):
        raise WeightsError(
            f"{where}: `{_LLAMA3_DIVISORS}` is not the llama3 scaling with low 1, high 4 and 8192 positions. {_INSTEAD}"
        )
    return scaling
