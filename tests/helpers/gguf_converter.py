"""A folder of transformers as a GGUF file, with the names, row orders and metadata of llama.cpp's converter.

It is independent of the reader: names come from the `gguf` package, and rows are reordered by explicit indices.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import load_file

from tests.helpers.tiny_models import finish_gguf, interleaved

# llama.cpp's architecture, and whether its converter reorders queries and keys to the pairs (2i, 2i + 1).
ARCHITECTURES = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "ministral3": ("mistral3", True),
    "olmo": ("olmo", True),
    "olmo2": ("olmo2", False),
    "olmo3": ("olmo2", False),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
    "smollm3": ("smollm3", True),
    "granite": ("granite", True),
    "phi3": ("phi3", False),
}


def convert(folder: Path, file: Path, *, reorder: bool | None = None) -> Path:
    """Write the GGUF file of a Hugging Face folder with one file of tensors.

    reorder: whether queries and keys are reordered, if not as for the architecture.
    """
    config = json.loads((folder / "config.json").read_text())
    name, reordered = ARCHITECTURES[config["model_type"]]
    architecture = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    writer = gguf.GGUFWriter(str(file), name)
    _add_sizes(writer, config)
    _add_rope(writer, config)
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for theirs, tensor in load_file(folder / "model.safetensors").items():
        module = theirs.split(".")[-2]
        if module in heads and (reordered if reorder is None else reorder):
            tensor = interleaved(tensor, heads[module])
        ours = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        assert ours is not None, theirs
        writer.add_tensor(ours, tensor.contiguous().numpy())
    finish_gguf(writer)
    return file


def _add_sizes(writer: Any, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    if config["model_type"] == "olmo":
        writer.add_layer_norm_eps(1e-5)
    else:
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if config.get("head_dim"):
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if config.get("clip_qkv"):
        writer.add_clamp_kqv(config["clip_qkv"])
    if config.get("attention_multiplier"):
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])
    window = config.get("sliding_window")
    if config["model_type"] in ("olmo3", "phi3", "mistral") and window is not None:
        writer.add_sliding_window(window)
    if config["model_type"] == "olmo3":
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])


def _add_rope(writer: Any, config: dict[str, Any]) -> None:
    rope = config["rope_parameters"]
    rope = rope.get("full_attention", rope)
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    kind = rope["rope_type"]
    if kind == "llama3":
        divisors = llama3_divisors(rope, head_dim)
        writer.add_tensor("rope_freqs.weight", divisors.numpy())
    elif kind == "longrope":
        original = config["original_max_position_embeddings"]
        factor = config["max_position_embeddings"] / original
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(factor) / math.log(original)))
        for length in ("short", "long"):
            divisors = torch.tensor(rope[f"{length}_factor"], dtype=torch.float32)
            writer.add_tensor(f"rope_factors_{length}.weight", divisors.numpy())
    elif kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
        if rope.get("mscale_all_dim"):
            writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
        if rope.get("llama_4_scaling_beta"):
            writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])
        if config["model_type"] == "olmo3":
            writer.add_rope_scaling_attn_factors(0.1 * math.log(rope["factor"]) + 1.0)


def llama3_divisors(rope: dict[str, Any], head_dim: int) -> torch.Tensor:
    """Divisors of the rotary frequencies of Llama 3.1, one frequency after the other."""
    low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
    high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
    divisors = []
    for i in range(head_dim // 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (2 * i / head_dim)
        kept = min(max((low / wavelength - 1) / (low / high - 1), 0.0), 1.0) if low != high else 0.0
        divisors.append(1 / ((1 - kept) / rope["factor"] + kept))
    return torch.tensor(divisors, dtype=torch.float32)
