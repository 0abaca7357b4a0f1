"""Sizes from a `params.json` of Meta (Llama), Mistral, or OLMo in the layout of the ARC-Encoder reference."""

from __future__ import annotations

import math
from collections.abc import Callable

from arc_ds.errors import WeightsError
from arc_ds.model.backbone_config import BackboneConfig, RopeScaling
from arc_ds.model.weights.families import FAMILIES, TensorNames
from arc_ds.model.weights.fields import Fields
from arc_ds.model.weights.hf_config import RopeScalingChoice
from arc_ds.model.weights.names import Shape
from arc_ds.model.weights.stores import TensorStore

_LLAMA_32_WIDEST = 3072  # Llama 3.2 3B; the narrowest Llama 3.1 is 4096 wide


def is_olmo(store: TensorStore | None) -> bool:
    """Whether the tensors have OLMo-1's names. Its `params.json` alone does not identify it."""
    return store is not None and any(name.endswith("transformer.wte.weight") for name in store.shapes)


def sizes_of_native(
    fields: Fields, store: TensorStore | None, names: TensorNames, rope_scaling: RopeScalingChoice
) -> BackboneConfig:
    """Sizes from `params.json`.

    There are three dialects. Mistral's file has head_dim and hidden_dim. Llama's file implies them. OLMo's file omits
    the size of the feed-forward layer, which is read from the tensors.

    store: the tensors. May be None for Llama and Mistral, but not for OLMo.
    names: their names.

    Raises WeightsError for unsupported features: experts, vision modules.
    """
    for key in ("moe", "moe_args", "vision_encoder", "q_lora_rank", "kv_lora_rank"):
        fields.refuse(key)
    dim, num_heads = fields.integer("dim"), fields.integer("n_heads")
    window: int | None = None
    windowed_layers: tuple[int, ...] = ()
    scaling, theta, tied = None, 10000.0, False
    if is_olmo(store):
        family = "olmo"
        ffn_size = _shape(fields, store, names, "layers.0.feed_forward.w2.weight")[1]
        vocab_size = _shape(fields, store, names, "tok_embeddings.weight")[0]
        tied = fields.flag("weight_tying", False)
    elif "hidden_dim" in fields.values or "head_dim" in fields.values:
        family = "mistral"
        ffn_size, vocab_size = fields.integer("hidden_dim"), _vocab_size(fields, store, names)
        window, windowed_layers = _windows(fields)
        # As in Mistral's code: if the file has no base, it is 1e4 for windowed models (v0.1) and 1e6 for the others.
        theta = 1e6 if window is None else 1e4
        tied = fields.flag("tied_embeddings", False)
        if fields.get("yarn") is None:
            fields.refuse("llama_4_scaling")
        elif rope_scaling == "checkpoint":
            scaling = _yarn(fields)
    else:
        family = "llama"
        ffn_size, vocab_size = _llama_ffn_size(fields, dim), _vocab_size(fields, store, names)
        if rope_scaling == "checkpoint" and fields.flag("use_scaled_rope", False):
            scaling = _llama3_scaling(fields, dim)
    return BackboneConfig(
        family=family,
        hidden_size=dim,
        num_layers=fields.integer("n_layers"),
        num_heads=num_heads,
        num_kv_heads=fields.integer("n_kv_heads", num_heads),
        head_dim=fields.integer("head_dim", dim // num_heads),
        ffn_size=ffn_size,
        vocab_size=vocab_size,
        rope_theta=fields.number("rope_theta", theta),
        norm_eps=fields.number("norm_eps", 1e-5),
        norm=FAMILIES[family].norm,
        rope_scaling=scaling,
        window=window,
        windowed_layers=windowed_layers,
        tie_embeddings=tied,
    )


def _windows(fields: Fields) -> tuple[int | None, tuple[int, ...]]:
    """`window` and `windowed_layers` of `BackboneConfig`: one for all layers, or a list (Ministral) that repeats.

    A list may hold two lengths. The larger one (131072) is then the length of the model's longest sequence, so the
    layers with it have no window.
    """
    key = next((key for key in ("sliding_window", "_sliding_window") if fields.get(key) is not None), None)
    if key is None:
        return None, ()
    num_layers, value = fields.integer("n_layers"), fields.get(key)
    pattern = value if isinstance(value, list) else [fields.integer(key)]
    numbers = [Fields({key: size}, fields.where).integer(key) for size in pattern if size is not None]
    lengths = sorted(set(numbers))
    if not pattern or num_layers % len(pattern) or len(lengths) + (None in pattern) > 2:
        raise fields.wrong(key, f"at most two lengths, in a list that repeats over {num_layers} layers", value)
    if not lengths:
        return None, ()
    return lengths[0], tuple(idx for idx in range(num_layers) if pattern[idx % len(pattern)] == lengths[0])


def _yarn(fields: Fields) -> RopeScaling:
    """Mistral's yarn. `beta` and `alpha` are its bounds. Without `apply_scale`, cosines and sines have no factor."""
    yarn, queries = fields.object("yarn"), fields.object("llama_4_scaling", {})
    factor, original = yarn.number("factor"), yarn.integer("original_max_position_embeddings")
    queries.refuse("original_max_position_embeddings", original)
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_max_positions=original,
        beta_fast=yarn.number("beta", 32.0),
        beta_slow=yarn.number("alpha", 1.0),
        attention_factor=0.1 * math.log(factor) + 1.0 if yarn.flag("apply_scale", True) else 1.0,
        query_beta=queries.number_or_zero("beta"),
    )


def _llama_ffn_size(fields: Fields, dim: int) -> int:
    size = int(8 * dim / 3)
    if fields.get("ffn_dim_multiplier") is not None:
        size = int(fields.number("ffn_dim_multiplier") * size)
    multiple = fields.integer("multiple_of", 256)
    return -(-size // multiple) * multiple


def _llama3_scaling(fields: Fields, dim: int) -> RopeScaling:
    """The llama3 scaling of a Meta folder, whose file says only that positions are scaled.

    Llama 3.1 scales by 8 and Llama 3.2 by 32 (their published Hugging Face configs). The width distinguishes the two. A
    `rope_scaling_factor` in the file takes precedence.
    """
    by_width = 32.0 if dim <= _LLAMA_32_WIDEST else 8.0
    return RopeScaling(factor=fields.number("rope_scaling_factor", by_width), original_max_positions=8192)


def _vocab_size(fields: Fields, store: TensorStore | None, names: TensorNames) -> int:
    """Vocabulary size. Llama 2 writes -1 and relies on the tokenizer; the embedding has the size too."""
    if fields.get("vocab_size") == -1:
        return _shape(fields, store, names, "tok_embeddings.weight")[0]
    return fields.integer("vocab_size")


def _shape(fields: Fields, store: TensorStore | None, names: TensorNames, parameter: str) -> Shape:
    name, _ = names.find(parameter)
    shape = () if store is None else store.shapes.get(name, ())
    if len(shape) != 2:
        raise WeightsError(
            f"{fields.where} omits a size that the tensor `{name}` would give, but this tensor is missing or not a "
            "matrix. Put the weights next to the file, or write the size into the file."
        )
    return shape


def shard_axis(dim: int) -> Callable[[str, Shape], int | None]:
    """The split axis of each tensor in Meta's `consolidated.00.pth, consolidated.01.pth, ...` (model-parallel layers).

    dim: width of the model.

    wq, wk, wv, w1, w3 and output are split by rows, wo and w2 by columns. The embedding is split by columns in Llama 1
    and 2 and by rows in Llama 3; its width distinguishes the two. Vectors are copies (axis None).
    """

    def axis(name: str, shape: Shape) -> int | None:
        if len(shape) != 2:
            return None
        if name.endswith("tok_embeddings.weight"):
            return 0 if shape[1] == dim else 1
        return 1 if name.endswith((".attention.wo.weight", ".feed_forward.w2.weight")) else 0

    return axis
