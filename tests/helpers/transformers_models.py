"""Tiny random causal language models of `transformers`, of families that our own transformer computes and others.

Import this module only if transformers is installed.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from arc_ds.batch.groups import GroupRule
from arc_ds.batch.packing import PackedBatch, PoolingSpec, pack
from arc_ds.batch.segments import Sample, Segment

VOCAB = 96
_BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "max_position_embeddings": 256,
    "eos_token_id": 1,
    "bos_token_id": 0,
    "pad_token_id": None,
}
_WINDOWS = {
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen3": {},
    "Granite": {
        "embedding_multiplier": 6.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
        "logits_scaling": 4,
    },
    "Gemma2": {**_WINDOWS, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0, "pad_token_id": 0},
    "Gemma3Text": {**_WINDOWS, "query_pre_attn_scalar": 8, "pad_token_id": 0},
    "GPTNeoX": {},
    "Cohere": {"logit_scale": 0.5},
    "GptOss": {**_WINDOWS, "num_local_experts": 4, "num_experts_per_tok": 2},
    "FalconH1": {
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 8,
        "embedding_multiplier": 3.0,
        "lm_head_multiplier": 0.5,
        "tie_word_embeddings": True,
    },
    "Mamba2": {"num_heads": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 16, "dropout": 0.5, "num_key_value_heads": None},
    "Mamba": {"state_size": 8},
    "Rwkv": {"attention_hidden_size": 32},
    "Bert": {},
}


def write_model(folder: Path, family: str, **changes: Any) -> Any:
    """Save a random model of a family of `FAMILIES` to a folder and return it, in float32 for evaluation."""
    torch.manual_seed(0)
    config_class = getattr(transformers, f"{family}Config")
    model_class = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    model = model_class(config_class(**{**_BASE, **FAMILIES[family], **changes})).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return model


def mixed_batch(seed: int = 1) -> PackedBatch:
    """Four ragged sequences: three with a context between texts, and one that is text only."""
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return torch.randint(2, VOCAB, (count,), generator=generator).tolist()

    samples = [
        Sample("test", (Segment.text(ids(before)), Segment.context(ids(8)), Segment.text(ids(after), in_loss=True)))
        for before, after in ((3, 4), (0, 9), (5, 6))
    ]
    return pack(
        [*samples, Sample("test", (Segment.text(ids(5), in_loss=True),))], PoolingSpec((GroupRule("factor", 2),))
    )


def text_batch(sequences: list[list[int]]) -> PackedBatch:
    """Sequences of text alone."""
    return pack([Sample("test", (Segment.text(ids),)) for ids in sequences], PoolingSpec(()))


def random_vectors(batch: PackedBatch, width: int) -> Tensor:
    """Compressed vectors for a batch, which require a gradient."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch.compressed_rows.numel(), width, generator=generator).requires_grad_()


def parameter_hash(module: nn.Module) -> str:
    """sha256 of the bytes of all parameters and buffers. The parameters must be whole."""
    digest = hashlib.sha256()
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
