"""All pretraining recipes at full size on the meta device: shapes, parameter counts, trained parts and learning rates.

This file contains the published configs of the backbones. No weights are read and no memory is allocated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from arc_ds.config.deepspeed import resolve_deepspeed
from arc_ds.config.load import load_config
from arc_ds.config.schema import RunConfig
from arc_ds.model.compressor import Compressor
from arc_ds.model.decoder import Decoder
from arc_ds.model.spec import CompressorSpec, build_compressor
from arc_ds.model.weights import read_backbone_config
from arc_ds.training.build import rate_schedule
from arc_ds.training.build_model import compressor_spec
from arc_ds.training.engine import set_trained
from arc_ds.training.optim import make_param_groups
from arc_ds.training.schedule import RateSchedule

ROOT = Path(__file__).parents[3]
RECIPES = sorted((ROOT / "ds_configs" / "recipes").glob("pretrain_*.yaml"))


def _llama3_scaling(factor: float) -> dict[str, Any]:
    bounds = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {"rope_type": "llama3", "factor": factor, **bounds}


def _llama(**sizes: Any) -> dict[str, Any]:
    return {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": False, **sizes}


# The sizes in the models' published config.json files.
MODELS: Mapping[str, dict[str, Any]] = {
    "Llama-3.2-3B": _llama(
        hidden_size=3072, num_hidden_layers=28, num_attention_heads=24, num_key_value_heads=8, head_dim=128,
        intermediate_size=8192, vocab_size=128256, rope_theta=5e5, tie_word_embeddings=True,
        rope_scaling=_llama3_scaling(32.0),
    ),
    "Llama-3.1-8B": _llama(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        intermediate_size=14336, vocab_size=128256, rope_theta=5e5, rope_scaling=_llama3_scaling(8.0),
    ),
    "Mistral-7B-v0.3": _llama(
        model_type="mistral", hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        intermediate_size=14336, vocab_size=32768, rope_theta=1e6, sliding_window=None,
    ),
    "Llama-2-7b-chat": _llama(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32,
        intermediate_size=11008, vocab_size=32000,
    ),
    "OLMo-7B": {
        "model_type": "hf_olmo", "d_model": 4096, "n_heads": 32, "n_layers": 32, "mlp_hidden_size": 22016,
        "vocab_size": 50280, "embedding_size": 50304, "layer_norm_type": "default", "layer_norm_with_affine": False,
        "activation_type": "swiglu", "rope": True, "include_bias": False, "weight_tying": False,
    },
}  # fmt: skip
# Parameters of the model cards: Llama 3.1 8B 8.03 B, Mistral 7B v0.3 7.25 B, Llama 2 7B 6.74 B, OLMo 7B 6.89 B.
DECODER_PARAMETERS = {
    "Llama-3.1-8B": 8_030_261_248,
    "Mistral-7B-v0.3": 7_248_023_552,
    "Llama-2-7b-chat": 6_738_415_616,
    "OLMo-7B": 6_888_095_744,
}
# Embedding, and 26 of 28 layers of attention (wq, wo 3072²; wk, wv 1024 · 3072), FFN (3 · 8192 · 3072) and two norms.
ENCODER_PARAMETERS = 128256 * 3072 + 26 * (2 * 3072**2 + 2 * 1024 * 3072 + 3 * 8192 * 3072 + 2 * 3072)
PORT_PARAMETERS = 3072 * 2048 + 2048 * 4096 + 2 * 3072
WORLD_SIZES = (8, 64)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model folders with a config but no weights."""
    folder = tmp_path_factory.mktemp("models")
    for name, plain in MODELS.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(plain))
    return folder


@pytest.fixture(params=RECIPES, ids=lambda path: path.stem)
def config(request: pytest.FixtureRequest, models: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """Each recipe, loaded with model and shard paths from the environment."""
    monkeypatch.setenv("MODELS", str(models))
    monkeypatch.setenv("SHARDS", "shards")
    monkeypatch.delenv("RUNS", raising=False)
    return load_config(request.param)


def on_meta(config: RunConfig) -> tuple[CompressorSpec, Compressor]:
    """The recipe's compressor on the meta device, with its frozen parts marked."""
    spec = compressor_spec(config)
    with torch.device("meta"):
        compressor = build_compressor(spec, activation_checkpointing=config.encoder.activation_checkpointing)
    set_trained(compressor.encoder, **config.encoder.trained_parts)
    return spec, compressor


def num_parameters(module: nn.Module, trained: bool | None = None) -> int:
    return sum(p.numel() for p in module.parameters() if trained is None or p.requires_grad == trained)


def test_the_encoder_is_llama_3_2_3b_without_its_last_two_layers(config: RunConfig) -> None:
    spec, compressor = on_meta(config)
    assert all(parameter.is_meta for parameter in compressor.parameters())
    assert (spec.num_layers, spec.backbone.num_layers, spec.causal) == (26, 28, False)
    assert (spec.strategy, spec.pooled_queries, spec.where, spec.memory_tokens) == ("mean", True, "before", 0)
    assert num_parameters(compressor.encoder) == ENCODER_PARAMETERS
    assert round(ENCODER_PARAMETERS / 1e9, 1) == 3.0
    # With 28 layers, the final norm and a tied head, this is the 3.21 B of the model card.
    layer = num_parameters(compressor.encoder.layers[0])
    assert ENCODER_PARAMETERS + 2 * layer + 3072 == 3_212_749_824


def test_all_of_the_compressor_is_trained_and_nothing_else(config: RunConfig) -> None:
    _, compressor = on_meta(config)
    assert num_parameters(compressor, trained=False) == 0
    num_trained = num_parameters(compressor)
    assert num_trained == ENCODER_PARAMETERS + len(config.decoders) * PORT_PARAMETERS
    assert {tuple(port.bridge.layer1.weight.shape) for port in compressor.ports} == {(2048, 3072)}
    with torch.device("meta"):
        decoders = [Decoder(read_backbone_config(d.backbone, d.rope_scaling)) for d in config.decoders]
    assert all(num_parameters(decoder, trained=True) == 0 for decoder in decoders)
    share = num_trained / (num_trained + sum(num_parameters(decoder) for decoder in decoders))
    percent = {"llama2_7b_chat": 31, "llama31_8b": 27, "mistral_7b": 29, "olmo_7b": 31, "two_decoders": 17}
    assert round(100 * share) == percent[Path(config.run_dir).name.removeprefix("pretrain_")]


def test_decoders_have_the_parameters_of_their_cards(config: RunConfig) -> None:
    for wanted in config.decoders:
        sizes = read_backbone_config(wanted.backbone, wanted.rope_scaling)
        with torch.device("meta"):
            decoder = Decoder(sizes)
        assert num_parameters(decoder) == DECODER_PARAMETERS[Path(wanted.backbone).name]
        assert sizes.norm == ("layer" if "OLMo" in wanted.backbone else "rms")
        scaled = sizes.rope_scaling is not None and sizes.rope_scaling.factor == 8.0
        assert scaled == ("Llama-3.1" in wanted.backbone)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_deepspeed_gets_the_recipes_numbers(config: RunConfig, world_size: int) -> None:
    resolved = resolve_deepspeed(ROOT / config.deepspeed, config, world_size, local_world_size=8)
    assert resolved["train_batch_size"] == 128
    per_rank = resolved["train_micro_batch_size_per_gpu"]
    assert per_rank * resolved["gradient_accumulation_steps"] * world_size == 128
    assert per_rank == (16 if world_size == 8 else 2)
    assert resolved["bf16"]["enabled"] is True


def test_rates_are_the_papers(config: RunConfig) -> None:
    _, compressor = on_meta(config)
    optimizer = config.optimizer
    groups = make_param_groups(compressor, optimizer)
    peaks = {"encoder": 1e-5, "bridge": 5e-5, "markers": 1e-5}
    assert {g.name.partition(".")[0]: g.peak_lr for g in groups} == peaks
    assert len(groups) == 1 + 2 * len(config.decoders)
    assert all(group.weight_decay == 0.1 for group in groups)
    paper = RateSchedule(total_steps=80_000, warmup_steps=1000, initial_lr=1e-20, final_lr=1e-10)
    assert rate_schedule(optimizer, config.steps) == paper
