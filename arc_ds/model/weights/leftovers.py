"""Tensors in the files that hold no parameter of the model.

A few are harmless. The others mean that the model is another one than ARC-DS would compute.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch

from arc_ds.model.backbone_config import BackboneConfig
from arc_ds.model.rope import rope_frequencies
from arc_ds.model.weights.families import HUGGING_FACE, NATIVE, OLMO_NATIVE, TensorNames
from arc_ds.model.weights.names import join_faults
from arc_ds.model.weights.stores import TensorStore, same_values

_BLOCK_ROWS = 4096
_OTHER_HEADS = r"(^|\.)(score|classifier|v_head)\."
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class Backbone(NamedTuple):
    """A backbone in files.

    config: its sizes.
    names: tensor names in the files.
    store: the files.
    has_head: whether the head is used.
    """

    config: BackboneConfig
    names: TensorNames
    store: TensorStore
    has_head: bool


def _is_rotary_table(backbone: Backbone, name: str) -> bool:
    """Early Hugging Face files hold the frequencies that follow from the config, rounded to 16 bits or not."""
    if not name.endswith("rotary_emb.inv_freq"):
        return False
    found = backbone.store.tensor(name).float()
    plain = dataclasses.replace(backbone.config, rope_scaling=None)
    frequencies = [rope_frequencies(config, found.device) for config in (backbone.config, plain)]
    return any(f.shape == found.shape and torch.allclose(f, found, rtol=0.01, atol=1e-7) for f in frequencies)


def _is_tied_head(backbone: Backbone, name: str) -> bool:
    """Some programs save a tied head as well. It equals the embedding."""
    config, names, store = backbone.config, backbone.names, backbone.store
    embedding, _ = names.find("tok_embeddings.weight")
    blocks = (slice(row, row + _BLOCK_ROWS) for row in range(0, config.vocab_size, _BLOCK_ROWS))
    return store.shapes[name] == store.shapes.get(embedding) and all(
        same_values(store.tensor(name, rows), store.tensor(embedding, rows)) for rows in blocks
    )


def _is_harmless(backbone: Backbone, name: str) -> bool:
    """Whether a tensor that holds no parameter changes nothing."""
    _, names, store, has_head = backbone
    head, _ = names.find("output.weight")
    return (
        0 in store.shapes[name]  # programs that train with ZeRO-3 or FSDP save a tied head as a tensor without values
        or _is_rotary_table(backbone, name)
        or name.endswith(names.ignored)  # the table of names says why
        # A model of images or sound and text holds more than the language model, and a text passes none of it.
        or (names.other_modules is not None and names.other_modules.search(name) is not None)
        or (name == head and _is_tied_head(backbone, name))
        # Some converters write the biases that a model lacks as zeros.
        or (name.endswith(".bias") and not store.tensor(name).any())
        # An encoder ends before the heads: of the language model, of a classifier, of a reward model.
        or (not has_head and (name == head or re.search(_OTHER_HEADS, name) is not None))
    )


# Pattern of names -> their probable meaning, and the remedy. The first that matches counts.
_MEANINGS: Mapping[str, tuple[str, str]] = {
    r"lora_|\.base_layer\.|modules_to_save|dora_": (
        "an adapter that is not merged",
        "Merge it into the weights first (peft: model.merge_and_unload().save_pretrained(FOLDER)).",
    ),
    r"scale|weight_packed|weight_shape|qweight|qzeros|g_idx|zero_point|absmax|quant|\.SCB$|\.biases$": (
        "part of quantised weights",
        "Use the model's weights in bfloat16, or a .gguf file.",
    ),
    r"\.bias$": (
        "a bias, which the config does not announce",
        "Copy the config from the source of the weights: model_type, attention_bias and mlp_bias say which biases "
        "there are.",
    ),
    r"(q|k)_norm\.weight$": (
        "a norm of queries or keys, which the model_type of the config does not have",
        "Copy the config from the source of the weights.",
    ),
    r"rope|rotary|inv_freq": (
        "rotary positions of other frequencies than those of the config",
        "Correct rope_theta and the rotary scaling in the config, or save the files without these tensors.",
    ),
    r"expert|_exps|block_sparse_moe|gate_inp|shared_mlp": ("part of a mixture of experts", "Choose a dense backbone."),
    r"vision|visual|image|audio|multi_?modal|mm_projector": (
        "part of a model of images or sound",
        "Use its language model alone, saved as a model of its own.",
    ),
    r"_orig_mod\.|_wrapped_module\.|\.module\.": (
        "a name that a wrapper of the model gave (torch.compile, FSDP, activation checkpointing)",
        "Save the model without its wrapper.",
    ),
    _OTHER_HEADS: (
        "a head for another task",
        "Choose the causal language model for a decoder. As encoder.backbone these weights need no head.",
    ),
}
_UNKNOWN = (
    "part of another architecture",
    "Choose a backbone of a family that ARC-DS computes. A decoder may be any causal language model of transformers: "
    "set `implementation: transformers` for it. If the model does not need the tensor, save the files without it.",
)


def leftover_faults(backbone: Backbone, known: Collection[str]) -> dict[str, str]:
    """Phrases about all tensors that are neither known nor harmless, with the remedy of each.

    known: names of the tensors that hold parameters, with or without use.
    """
    leftovers: dict[tuple[str, str], list[str]] = {}
    for name in sorted(set(backbone.store.shapes).difference(known)):
        if not _is_harmless(backbone, name):
            leftovers.setdefault(_meaning(backbone, name, known), []).append(name)
    faults = {}
    for (meaning, remedy), names in leftovers.items():
        faults[f"{join_faults([f'`{name}`' for name in names])}: probably {meaning}"] = remedy
    return faults


def _meaning(backbone: Backbone, name: str, known: Collection[str]) -> tuple[str, str]:
    """The probable meaning of a tensor, and the remedy."""
    if name == backbone.names.find("output.weight")[0]:
        embedding, _ = backbone.names.find("tok_embeddings.weight")
        if embedding not in backbone.store.shapes:
            return (
                "the embedding, saved as the head that is tied to it",
                f"Rename the tensor to {embedding}, or save the model again with save_pretrained.",
            )
        return (
            "a head of its own, because its values differ from the embedding, to which the config ties the head",
            "Set tie_word_embeddings (tied_embeddings, weight_tying) to false to use this head, or save the files "
            "without it.",
        )
    if _NUMBER.sub("0", name) in known:
        return (
            f"a layer beyond the {backbone.config.num_layers} of the config",
            "Set the number of layers in the config to that of the files, or save the files without these layers.",
        )
    for other in (HUGGING_FACE, NATIVE, OLMO_NATIVE):
        if (
            other.name != backbone.names.name
            and _NUMBER.sub("{i}", name).removesuffix(".weight") in other.table.values()
        ):
            return (
                f"a {other.name} name",
                "Keep weights with the config of their format: config.json with model.safetensors for Hugging Face, "
                "params.json with consolidated.safetensors for Meta, Mistral and OLMo.",
            )
    if any(name.endswith(f".{other}") or other.endswith(f".{name}") for other in known):
        return (
            "a second tensor of this name, with another prefix",
            "Keep the tensors of one model in the files, and those of others elsewhere.",
        )
    return next((meaning for pattern, meaning in _MEANINGS.items() if re.search(pattern, name)), _UNKNOWN)
