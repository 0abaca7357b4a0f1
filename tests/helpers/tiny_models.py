"""Tiny random backbones, written in every layout that the readers support.

The writers are independent of the readers: they reorder rotary rows by explicit indices and spell out names. Their
inputs are tensors by internal name with half-split rotary rows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from arc_ds.model.backbone_config import BackboneConfig
from arc_ds.model.weights.names import backbone_shapes

Tensors = dict[str, Tensor]

HF_LAYER = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
GGUF_LAYER = {
    "attention_norm": "attn_norm",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "ffn_norm": "ffn_norm",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
}


def tiny_config(**changes: Any) -> BackboneConfig:
    """A Llama-like config with 2 layers of width 32, 4 query heads and 2 key heads."""
    sizes: dict[str, Any] = {
        "family": "llama",
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "ffn_size": 96,
        "vocab_size": 40,
        "rope_theta": 10000.0,
        "norm_eps": 1e-5,
    }
    return BackboneConfig(**{**sizes, **changes})


def random_tensors(config: BackboneConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensors:
    """Normally distributed weights of all parameters, by internal name."""
    generator = torch.Generator().manual_seed(seed)
    shapes = backbone_shapes(config)
    return {name: (0.2 * torch.randn(shape, generator=generator)).to(dtype) for name, shape in shapes.items()}


def interleaved(weight: Tensor, num_heads: int) -> Tensor:
    """Reorder the rows of half-split heads to pairs (2i, 2i + 1)."""
    head_dim = weight.shape[0] // num_heads
    order = []
    for head in range(num_heads):
        for i in range(head_dim // 2):
            order += [head * head_dim + i, head * head_dim + i + head_dim // 2]
    return weight[order]


def with_interleaved_heads(tensors: Tensors, config: BackboneConfig) -> Tensors:
    """The same tensors with wq and wk in interleaved order."""
    turned = dict(tensors)
    for name, weight in tensors.items():
        if ".wq." in name:
            turned[name] = interleaved(weight, config.num_heads)
        elif ".wk." in name:
            turned[name] = interleaved(weight, config.num_kv_heads)
    return turned


def hf_config(config: BackboneConfig) -> dict[str, Any]:
    """The `config.json` that transformers 4 writes."""
    return {
        "model_type": config.family,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_size,
        "vocab_size": config.vocab_size,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tie_embeddings,
    }


def hf_name(name: str) -> str:
    """Hugging Face's name for an internal name."""
    outer = {"tok_embeddings": "model.embed_tokens", "output": "lm_head", "norm": "model.norm"}
    return _renamed(name, outer, "model.layers", HF_LAYER)


def gguf_name(name: str) -> str:
    """GGUF's name for an internal name."""
    outer = {"tok_embeddings": "token_embd", "output": "output", "norm": "output_norm"}
    return _renamed(name, outer, "blk", GGUF_LAYER)


def _renamed(name: str, outer: dict[str, str], layers: str, inner: dict[str, str]) -> str:
    stem = name.removesuffix(".weight")
    if stem in outer:
        return f"{outer[stem]}.weight"
    _, i, rest = stem.split(".", 2)
    return f"{layers}.{i}.{inner[rest]}.weight"


def write_hf(folder: Path, config: BackboneConfig, tensors: Tensors, num_files: int = 1, **changes: Any) -> Path:
    """Write a Hugging Face folder with `num_files` tensor files. `changes` are added to config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**hf_config(config), **changes}))
    named = {hf_name(name): tensor for name, tensor in tensors.items()}
    if num_files == 1:
        save_file(named, folder / "model.safetensors")
        return folder
    weight_map = {}
    for idx in range(num_files):
        file = f"model-{idx + 1:05d}-of-{num_files:05d}.safetensors"
        part = {name: named[name] for name in sorted(named)[idx::num_files]}
        save_file(part, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def llama_params(config: BackboneConfig, **changes: Any) -> dict[str, Any]:
    """Meta's `params.json`. ffn_size must be 8 / 3 of the width, rounded up to a multiple of 32."""
    return {
        "dim": config.hidden_size,
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_kv_heads,
        "norm_eps": config.norm_eps,
        "vocab_size": config.vocab_size,
        "rope_theta": config.rope_theta,
        "multiple_of": 32,
        **changes,
    }


def write_llama_pickles(folder: Path, config: BackboneConfig, tensors: Tensors, num_files: int, **changes: Any) -> Path:
    """Write Meta's folder. Tensors are split over consolidated.00.pth, ... like its model-parallel layers."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(llama_params(config, **changes)))
    by_columns = (".wo.", ".w2.") + (("tok_embeddings",) if changes.get("vocab_size") == -1 else ())
    for idx in range(num_files):
        shard = {"rope.freqs": torch.ones(config.head_dim // 2)}
        for name, tensor in with_interleaved_heads(tensors, config).items():
            axis = 1 if any(part in name for part in by_columns) else 0
            shard[name] = tensor if tensor.ndim == 1 else tensor.chunk(num_files, dim=axis)[idx].clone()
        torch.save(shard, folder / f"consolidated.{idx:02d}.pth")
    return folder


def write_mistral(folder: Path, config: BackboneConfig, tensors: Tensors, **changes: Any) -> Path:
    """Write Mistral's folder with consolidated.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    params = llama_params(config, head_dim=config.head_dim, hidden_dim=config.ffn_size, **changes)
    params.pop("multiple_of")
    (folder / "params.json").write_text(json.dumps(params))
    save_file(with_interleaved_heads(tensors, config), folder / "consolidated.safetensors")
    return folder


def olmo_tensors(config: BackboneConfig, tensors: Tensors) -> Tensors:
    """Tensors by OLMo-1's own names: one tensor for queries, keys and values, and one for up and gate."""
    root = "model.transformer"
    named = {f"{root}.wte.weight": tensors["tok_embeddings.weight"], f"{root}.ff_out.weight": tensors["output.weight"]}
    for i in range(config.num_layers):
        attention, ffn, block = f"layers.{i}.attention", f"layers.{i}.feed_forward", f"{root}.blocks.{i}"
        named[f"{block}.att_proj.weight"] = torch.cat([tensors[f"{attention}.{w}.weight"] for w in ("wq", "wk", "wv")])
        named[f"{block}.attn_out.weight"] = tensors[f"{attention}.wo.weight"]
        named[f"{block}.ff_proj.weight"] = torch.cat([tensors[f"{ffn}.{w}.weight"] for w in ("w3", "w1")])
        named[f"{block}.ff_out.weight"] = tensors[f"{ffn}.w2.weight"]
    return named


def write_olmo(folder: Path, config: BackboneConfig, tensors: Tensors, layout: str = "consolidated") -> Path:
    """Write a folder with OLMo-1's names.

    layout: "hf_olmo" has OLMo's own config.json; "consolidated" the reference's params.json and
        consolidated.safetensors; "model" params.json and the model.safetensors that the reference's instructions fetch.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "hf_olmo":
        plain = {
            "model_type": "hf_olmo",
            "d_model": config.hidden_size,
            "n_heads": config.num_heads,
            "n_layers": config.num_layers,
            "mlp_hidden_size": 2 * config.ffn_size,
            "embedding_size": config.vocab_size,
            "vocab_size": config.vocab_size - 3,
            "layer_norm_type": "default",
            "layer_norm_with_affine": False,
            "activation_type": "swiglu",
            "rope": True,
            "include_bias": False,
            "weight_tying": False,
        }
        (folder / "config.json").write_text(json.dumps(plain))
        save_file(olmo_tensors(config, tensors), folder / "model.safetensors")
        return folder
    sizes = {"dim": config.hidden_size, "n_layers": config.num_layers, "n_heads": config.num_heads}
    (folder / "params.json").write_text(json.dumps({**sizes, "norm_eps": 1e-5, "vocab_size": config.vocab_size}))
    save_file(olmo_tensors(config, tensors), folder / f"{layout}.safetensors")
    return folder


def write_gguf(
    file: Path,
    config: BackboneConfig,
    tensors: Tensors,
    *,
    quantise: str | None = None,
    rope_divisors: Tensor | None = None,
    architecture: str = "llama",
    more: Tensors | None = None,
    metadata: dict[str, Any] | None = None,
    max_tensors: int = 0,
) -> Path:
    """Write a GGUF file.

    quantise: the block format of the matrices (Q8_0, ...); None keeps float32.
    more: further tensors by their names in the file.
    max_tensors: the most tensors of a file of a split model; 0 for one file. `file` is then a name without a number.
    """
    import gguf

    writer = gguf.GGUFWriter(str(file), architecture, split_max_tensors=max_tensors)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_feed_forward_length(config.ffn_size)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc", "def"])
    writer.add_array("tokenizer.ggml.token_type", [1, 1, 1])
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
    for key, value in (metadata or {}).items():
        add[type(value)](key, value)
    for name, tensor in with_interleaved_heads(tensors, config).items():
        values = tensor.numpy()
        if quantise is None or tensor.ndim == 1:
            writer.add_tensor(gguf_name(name), values)
            continue
        kind = gguf.GGMLQuantizationType[quantise]
        writer.add_tensor(gguf_name(name), gguf.quantize(values, kind), raw_dtype=kind)
    if rope_divisors is not None:
        writer.add_tensor("rope_freqs.weight", rope_divisors.float().numpy())
    for name, tensor in (more or {}).items():
        writer.add_tensor(name, tensor.numpy())
    finish_gguf(writer)
    return file


def finish_gguf(writer: Any) -> None:
    """Write the file of a `gguf.GGUFWriter`."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
