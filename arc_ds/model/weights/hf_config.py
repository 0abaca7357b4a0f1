"""Sizes from a `config.json`: Hugging Face folders, and OLMo's own (`model_type: hf_olmo`)."""

from __future__ import annotations

from typing import Literal, NamedTuple

from arc_ds.errors import WeightsError
from arc_ds.model.backbone_config import BackboneConfig, RopeScaling
from arc_ds.model.weights.families import FAMILIES, OLMO_EPS
from arc_ds.model.weights.fields import Fields

RopeScalingChoice = Literal["checkpoint", "none"]


class Sizes(NamedTuple):
    """The sizes of a backbone.

    config: its sizes and constants.
    sliding_window: length of the longest sequence that it attends to fully; None for any length.
    """

    config: BackboneConfig
    sliding_window: int | None


SUPPORTED_MODEL_TYPES = (*FAMILIES, "hf_olmo")
_SILU = ("silu", "swish")


def sizes_of_hugging_face(fields: Fields, rope_scaling: RopeScalingChoice) -> Sizes:
    """Sizes from the `config.json` of a Llama (including SmolLM), Mistral or OLMo-1 folder.

    Reads `rope_theta` and `rope_scaling` (transformers 4) and `rope_parameters` (transformers 5). Raises WeightsError
    for an unknown `model_type` and for unsupported features: biases, other activations, clipped or partly rotary
    attention, and rotary scalings other than llama3.
    """
    model_type = fields.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise WeightsError(
            f"{fields.where}: `model_type` is {model_type!r}; ARC-DS reads {', '.join(SUPPORTED_MODEL_TYPES)}. "
            "Choose a backbone of one of these families."
        )
    for key in ("attention_bias", "mlp_bias", "clip_qkv"):
        fields.refuse(key)
    if model_type == "hf_olmo":
        return _sizes_of_olmo(fields)
    fields.refuse("hidden_act", *_SILU)
    family = FAMILIES[model_type]
    hidden, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    theta, scaling = _rope(fields, rope_scaling)
    config = BackboneConfig(
        family=model_type,
        hidden_size=hidden,
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", num_heads),
        head_dim=fields.integer("head_dim", hidden // num_heads),
        ffn_size=fields.integer("intermediate_size"),
        vocab_size=fields.integer("vocab_size"),
        rope_theta=theta,
        norm_eps=family.norm_eps or fields.number("rms_norm_eps", 1e-6),
        norm=family.norm,
        rope_scaling=scaling,
        tie_embeddings=fields.flag("tie_word_embeddings", False),
    )
    return Sizes(config, _sliding_window(fields))


def _sliding_window(fields: Fields) -> int | None:
    if fields.get("sliding_window") is None or not fields.flag("use_sliding_window", True):
        return None
    return fields.integer("sliding_window")


def _rope(fields: Fields, choice: RopeScalingChoice) -> tuple[float, RopeScaling | None]:
    parameters = fields.object("rope_parameters", {}).values
    theta = fields.number("rope_theta", parameters.get("rope_theta", 10000.0))
    fields.refuse("partial_rotary_factor", 1)
    rope = Fields({**fields.object("rope_scaling", {}).values, **parameters}, fields.where)
    rope.refuse("partial_rotary_factor", 1)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if choice == "none" or kind == "default":
        return theta, None
    if kind != "llama3":
        raise WeightsError(
            f"{fields.where}: the rotary scaling is {kind!r}; ARC-DS computes llama3 and none. Choose another "
            "backbone, or set rope_scaling: none if its contexts are short."
        )
    return theta, RopeScaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_positions=rope.integer("original_max_position_embeddings"),
    )


def _sizes_of_olmo(fields: Fields) -> Sizes:
    """Read OLMo-1's own config. `mlp_hidden_size` is the sum of up and gate; epsilon is a constant of OLMo's code."""
    fields.refuse("layer_norm_type", "default")
    fields.refuse("activation_type", "swiglu")
    for key in ("layer_norm_with_affine", "attention_layer_norm", "include_bias", "alibi", "multi_query_attention"):
        fields.refuse(key)
    if not fields.flag("rope", True):
        raise fields.wrong("rope", "true", False)
    hidden, num_heads = fields.integer("d_model"), fields.integer("n_heads")
    both_halves = fields.integer("mlp_hidden_size", fields.integer("mlp_ratio", 4) * hidden)
    config = BackboneConfig(
        family="olmo",
        hidden_size=hidden,
        num_layers=fields.integer("n_layers"),
        num_heads=num_heads,
        num_kv_heads=fields.integer("n_kv_heads", num_heads),
        head_dim=hidden // num_heads,
        ffn_size=both_halves // 2,
        vocab_size=fields.integer("embedding_size", fields.integer("vocab_size")),
        rope_theta=fields.number("rope_theta", 10000.0),
        norm_eps=OLMO_EPS,
        norm="layer",
        tie_embeddings=fields.flag("weight_tying", False),
    )
    return Sizes(config, None)
