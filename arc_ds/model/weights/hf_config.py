"""Sizes from a `config.json`: Hugging Face folders, and OLMo's own (`model_type: hf_olmo`)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, cast, get_args

from arc_ds.errors import UnknownFamilyError, WeightsError
from arc_ds.model.backbone_config import BackboneConfig, RopeKind, RopeScaling
from arc_ds.model.weights.families import (
    FAMILIES,
    HUGGING_FACE,
    OLMO_EPS,
    OTHER_MODULES,
    Family,
    TensorNames,
    layers_of,
)
from arc_ds.model.weights.fields import Fields

RopeScalingChoice = Literal["checkpoint", "none"]


SUPPORTED_MODEL_TYPES = (*FAMILIES, "hf_olmo")
_SHARE = "partial_rotary_factor"
_SILU = ("silu", "swish")
_FULL, _WINDOWED = "full_attention", "sliding_attention"


def sizes_of_hugging_face(fields: Fields, rope_scaling: RopeScalingChoice) -> BackboneConfig:
    """Sizes from the `config.json` of a family in `FAMILIES` or of OLMo-1's own folder.

    Reads `rope_theta` and `rope_scaling` (transformers 4) and `rope_parameters` (transformers 5). For a model of images
    and text, it reads the language model's part, `text_config`.

    Raises UnknownFamilyError for an unknown `model_type`, and WeightsError for settings that the family does not have:
    biases, other activations, clipped or partly rotary attention, other rotary scalings.
    """
    fields = _language_model(fields)
    model_type = fields.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise UnknownFamilyError(
            f"{fields.where}: `model_type` is {model_type!r}; ARC-DS itself computes "
            f"{', '.join(SUPPORTED_MODEL_TYPES)}. For an encoder, choose a backbone of one of these families. A "
            "decoder may be any causal language model of transformers: set `implementation: transformers` for it."
        )
    if model_type == "hf_olmo":
        return _sizes_of_olmo(fields)
    family = FAMILIES[model_type]
    fields = Fields({**family.defaults, **fields.values}, fields.where)
    fields.refuse("hidden_act", *_SILU)
    refused = {
        "attention_bias": family.qkv_bias is False,
        "mlp_bias": family.ffn_bias is False,
        "clip_qkv": "clip_qkv" not in family.numbers,
    }
    for key, is_refused in refused.items():
        if is_refused:
            fields.refuse(key)
    hidden, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    num_layers, head_dim = fields.integer("num_hidden_layers"), fields.integer("head_dim", hidden // num_heads)
    window, windowed_layers = _windows(fields, family, num_layers)
    return BackboneConfig(
        family=model_type,
        hidden_size=hidden,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", num_heads),
        head_dim=head_dim,
        ffn_size=fields.integer("intermediate_size"),
        vocab_size=fields.integer("vocab_size"),
        norm_eps=family.norm_eps or fields.number("rms_norm_eps", 1e-6),
        norm=family.norm,
        norm_place=family.norm_place,
        qk_norm=family.qk_norm,
        qkv_bias=_flag(fields, family.qkv_bias),
        output_bias=_flag(fields, family.output_bias),
        ffn_bias=_flag(fields, family.ffn_bias),
        layers_without_rope=layers_of(family.without_rope, fields, num_layers),
        window=window,
        windowed_layers=windowed_layers,
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        **_rotation(fields, family, head_dim, rope_scaling),
        **_numbers(fields, family),
    )


def names_of_hugging_face(fields: Fields) -> TensorNames:
    """The tensor names of a folder with this `config.json`; Llama's if its family is unknown."""
    inner = _language_model(fields)
    family = _family(inner)
    names = HUGGING_FACE if family is None else family.names
    return names if inner is fields else dataclasses.replace(names, other_modules=OTHER_MODULES)


def _language_model(fields: Fields) -> Fields:
    """The fields of the language model: `text_config` of a model of images or sound and text, or all fields."""
    inner = fields.get("text_config")
    if _family(fields) is not None or not isinstance(inner, Mapping):
        return fields
    # The whole model has the head, so its own setting decides whether the head is tied.
    outer = {key: fields.values[key] for key in ("tie_word_embeddings",) if fields.get(key) is not None}
    language_model = Fields({**inner, **outer}, f"{fields.where}: text_config")
    return fields if _family(language_model) is None else language_model


def _family(fields: Fields) -> Family | None:
    """The family that `model_type` names; None if it is unknown."""
    return FAMILIES.get(str(fields.get("model_type")))


def _flag(fields: Fields, announced: bool | str) -> bool:
    """A flag, or the value of the key that holds it."""
    return fields.flag(announced, False) if isinstance(announced, str) else announced


def _numbers(fields: Fields, family: Family) -> dict[str, Any]:
    """The optional numbers of a family, by field of `BackboneConfig`."""
    given = {name: fields.number(key) for name, key in family.numbers.items() if fields.get(key) is not None}
    if family.logits_divisor is not None:
        given["logits_multiplier"] = 1.0 / fields.number(family.logits_divisor, 1.0)
    return given


def _windows(fields: Fields, family: Family, num_layers: int) -> tuple[int | None, tuple[int, ...]]:
    """The window, and the layers that have it."""
    is_used = family.windowed is not None and fields.flag("use_sliding_window", True)
    if not is_used or fields.get("sliding_window") is None:
        return None, ()
    kinds = fields.get("layer_types")
    if kinds is None:
        windowed = layers_of(family.windowed, fields, num_layers)
    elif isinstance(kinds, list) and len(kinds) >= num_layers and all(kind in (_FULL, _WINDOWED) for kind in kinds):
        windowed = tuple(idx for idx in range(num_layers) if kinds[idx] == _WINDOWED)
    else:
        raise fields.wrong("layer_types", f"a list of {_FULL!r} or {_WINDOWED!r} for each layer", kinds)
    return (fields.integer("sliding_window"), windowed) if windowed else (None, ())


def _rotation(fields: Fields, family: Family, head_dim: int, choice: RopeScalingChoice) -> dict[str, Any]:
    """The rotary positions, by field of `BackboneConfig`.

    There is one rule for all layers, or one for each kind of layers. Two rules may differ in their scaling only.
    """
    given = {**fields.object("rope_scaling", {}).values, **fields.object("rope_parameters", {}).values}
    by_kind = [Fields(given[kind], fields.where) for kind in (_FULL, _WINDOWED) if isinstance(given.get(kind), Mapping)]
    rules = by_kind or [Fields(given, fields.where)]
    thetas = [_number_of(rule, fields, "rope_theta", 10000.0) for rule in rules]
    shares = [_number_of(rule, fields, _SHARE, 1.0) for rule in rules]
    scalings = [_scaling(rule, fields, family) if choice == "checkpoint" else None for rule in rules]
    if len(set(zip(thetas, shares, strict=True))) > 1 or scalings[-1] not in (None, scalings[0]):
        raise fields.wrong("rope_parameters", "one rule, or no scaling in layers with a window", given)
    if not family.partial_rotary:
        for rule in (fields, *rules):
            rule.refuse(_SHARE, 1)
    rotary_dim = int(head_dim * shares[0])
    if rotary_dim != head_dim and (rotary_dim % 2 or not 0 < rotary_dim < head_dim):
        raise fields.wrong(_SHARE, f"the share of an even part of {head_dim} dimensions", shares[0])
    scaling = scalings[0]
    if scaling is not None and scaling.kind == "longrope":
        for name, factors in (("short_factor", scaling.short_factors), ("long_factor", scaling.long_factors)):
            if len(factors) != rotary_dim // 2:
                raise rules[0].wrong(name, f"a list of {rotary_dim // 2} numbers above 0", rules[0].get(name))
    has_own_rule = isinstance(given.get(_WINDOWED), Mapping)
    return {
        "rope_theta": thetas[0],
        "rope_scaling": scaling,
        "rotary_dim": None if rotary_dim == head_dim else rotary_dim,
        "windowed_rope_scaling": scalings[-1] == scaling if has_own_rule else family.windowed_rope_scaling,
    }


def _number_of(rope: Fields, fields: Fields, key: str, default: float) -> float:
    """A number of a rotary rule, or else of the whole config."""
    return (fields if rope.get(key) is None else rope).number(key, default)


def _scaling(rope: Fields, fields: Fields, family: Family) -> RopeScaling | None:
    """The scaling of one rotary rule.

    rope: the rule.
    fields: the whole config.
    """
    kind = str(rope.get("rope_type", rope.get("type", "default")))
    kind = family.rope_kinds.get(kind, kind)
    if kind == "default":
        return None
    if kind not in get_args(RopeKind):
        raise WeightsError(
            f"{fields.where}: the rotary scaling is {kind!r}; ARC-DS computes {', '.join(get_args(RopeKind))} and "
            "none. Choose another backbone, or set rope_scaling: none if its contexts are short."
        )
    return _SCALINGS[cast(RopeKind, kind)](rope, fields)


def _original(rope: Fields, fields: Fields) -> int:
    """The original length. transformers prefers the config's own key to that of the rule, and has this default."""
    key = "original_max_position_embeddings"
    if fields.get(key) is not None:
        return fields.integer(key, minimum=2)
    holder, key = (rope, key) if rope.get(key) is not None else (fields, "max_position_embeddings")
    return holder.integer(key, minimum=2)


def _factor(rope: Fields, fields: Fields, original: int) -> float:
    """The factor of a scaling, which is by default the ratio of the two lengths."""
    if rope.get("factor") is not None:
        return rope.number("factor")
    return fields.integer("max_position_embeddings") / original


def _linear(rope: Fields, _fields: Fields) -> RopeScaling:
    return RopeScaling(kind="linear", factor=rope.number("factor"))


def _dynamic(rope: Fields, fields: Fields) -> RopeScaling:
    original = fields.integer("max_position_embeddings")
    return RopeScaling(kind="dynamic", factor=rope.number("factor"), original_max_positions=original)


def _llama3(rope: Fields, fields: Fields) -> RopeScaling:
    return RopeScaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_positions=_original(rope, fields),
    )


def _yarn(rope: Fields, fields: Fields) -> RopeScaling:
    """The attention factor is that of the paper, or a ratio of two such factors if the files weight them (DeepSeek)."""
    original = _original(rope, fields)
    factor = _factor(rope, fields, original)

    def attention_factor(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    by_default = attention_factor(1.0)
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        by_default = attention_factor(rope.number("mscale")) / attention_factor(rope.number("mscale_all_dim"))
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_max_positions=original,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        truncate=rope.flag("truncate", True),
        attention_factor=rope.number("attention_factor", by_default),
        query_beta=rope.number_or_zero("llama_4_scaling_beta"),
    )


def _longrope(rope: Fields, fields: Fields) -> RopeScaling:
    original = _original(rope, fields)
    factor = _factor(rope, fields, original)
    by_default = math.sqrt(1.0 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return RopeScaling(
        kind="longrope",
        factor=factor,
        original_max_positions=original,
        attention_factor=rope.number("attention_factor", by_default),
        short_factors=_positive(rope, "short_factor"),
        long_factors=_positive(rope, "long_factor"),
    )


def _positive(rope: Fields, key: str) -> tuple[float, ...]:
    values = rope.get(key)
    if not isinstance(values, list):
        raise rope.wrong(key, "a list of numbers above 0", values)
    return tuple(Fields({key: value}, rope.where).number(key) for value in values)


_SCALINGS = {"linear": _linear, "dynamic": _dynamic, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope}


def _sizes_of_olmo(fields: Fields) -> BackboneConfig:
    """Read OLMo-1's own config. `mlp_hidden_size` is the sum of up and gate; epsilon is a constant of OLMo's code."""
    fields.refuse("layer_norm_type", "default")
    fields.refuse("activation_type", "swiglu")
    for key in ("layer_norm_with_affine", "attention_layer_norm", "include_bias", "alibi", "multi_query_attention"):
        fields.refuse(key)
    if not fields.flag("rope", True):
        raise fields.wrong("rope", "true", False)
    hidden, num_heads = fields.integer("d_model"), fields.integer("n_heads")
    both_halves = fields.integer("mlp_hidden_size", fields.integer("mlp_ratio", 4) * hidden)
    return BackboneConfig(
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
        clip_qkv=None if fields.get("clip_qkv") is None else fields.number("clip_qkv"),
        tie_embeddings=fields.flag("weight_tying", False),
    )
