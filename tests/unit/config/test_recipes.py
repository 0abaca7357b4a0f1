"""Every recipe loads and has the numbers of the paper (arXiv 2510.20535, appendix B)."""

from __future__ import annotations

from pathlib import Path

import pytest

from arc_ds.config.deepspeed import resolve_deepspeed
from arc_ds.config.load import load_config
from arc_ds.config.schema import LoraConfig, RunConfig

ROOT = Path(__file__).parents[3]
RECIPES = sorted((ROOT / "ds_configs" / "recipes").rglob("*.yaml"))
PRETRAINING = [path for path in RECIPES if path.stem.startswith("pretrain_")]


def load(path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setenv("MODELS", "/models")
    monkeypatch.setenv("SHARDS", "/shards")
    monkeypatch.setenv("START", "/exports/start")
    monkeypatch.delenv("RUNS", raising=False)
    return load_config(path)


def test_the_recipes_of_the_paper_and_the_demo_are_there():
    pretraining = ("llama2_7b_chat", "llama31_8b", "mistral_7b", "olmo_7b", "two_decoders")
    assert {path.stem for path in RECIPES} >= {"demo", *(f"pretrain_{name}" for name in pretraining)}


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_loads_with_its_deepspeed_json(path, monkeypatch):
    config = load(path, monkeypatch)
    resolved = resolve_deepspeed(ROOT / config.deepspeed, config, world_size=1)
    assert resolved["train_batch_size"] == config.data.batch_size
    assert config.run_dir == f"runs/{path.stem}"
    assert ": /" not in path.read_text(encoding="utf-8"), "an absolute path"


@pytest.mark.parametrize(
    ("name", "num_ranks", "per_host", "per_gpu"),
    [
        ("one_gpu_24gb", 1, 1, 2),
        ("one_gpu_80gb", 1, 1, 4),
        ("one_host_8x80gb", 8, 8, 16),
        ("hosts_16x8x80gb", 128, 8, 1),
    ],
)
def test_recipe_of_a_machine_resolves_for_its_gpus(name, num_ranks, per_host, per_gpu, monkeypatch):
    config = load(ROOT / "ds_configs" / "recipes" / f"{name}.yaml", monkeypatch)
    resolved = resolve_deepspeed(ROOT / config.deepspeed, config, num_ranks, per_host)
    assert resolved["train_micro_batch_size_per_gpu"] == per_gpu
    zero = resolved["zero_optimization"]
    assert zero.get("zero_hpz_partition_size", 1) == (8 if num_ranks > 8 else 1)
    assert ("offload_optimizer" in zero) == (name == "one_gpu_24gb")


@pytest.mark.parametrize("path", PRETRAINING, ids=lambda p: p.stem)
def test_pretraining_recipe_has_the_papers_numbers(path, monkeypatch):
    config = load(path, monkeypatch)
    optimizer = config.optimizer
    assert (config.steps, config.seed, config.data.batch_size) == (80_000, 0, 16 * 8)
    assert (optimizer.encoder_lr, optimizer.markers_lr, optimizer.bridge_lr) == (1e-5, 1e-5, 5e-5)
    assert (optimizer.initial_lr, optimizer.final_lr, optimizer.warmup_steps) == (1e-20, 1e-10, 1000)
    assert (optimizer.betas, optimizer.weight_decay, optimizer.max_grad_norm) == ((0.9, 0.95), 0.1, 1.0)
    assert config.pooling.factors == (8,)
    assert config.encoder.kept_layers(28) == 26
    assert config.bridge.hidden_size == 2048
    assert config.data.reconstruction_share == 0.2
    assert (config.data.max_context_tokens, config.data.max_prefix_tokens) == (256, 256)
    assert (config.bridge.init, config.markers.init) == ("kaiming", "ones")
    assert len({decoder.backbone for decoder in config.decoders}) == (2 if "two" in path.stem else 1)


@pytest.mark.parametrize(
    ("name", "steps", "markers_lr"), [("finetune_llama31_8b", 4000, 2e-6), ("finetune_two_decoders", 8000, 3e-5)]
)
def test_fine_tuning_recipe_has_the_papers_numbers(name, steps, markers_lr, monkeypatch):
    config = load(ROOT / "ds_configs" / "recipes" / f"{name}.yaml", monkeypatch)
    optimizer = config.optimizer
    assert (config.steps, config.data.batch_size, config.pooling.factors) == (steps, 8 * 8, (4,))
    assert (optimizer.encoder_lr, optimizer.markers_lr, optimizer.bridge_lr) == (2e-6, markers_lr, 3e-5)
    assert (optimizer.final_lr, optimizer.warmup_steps, optimizer.weight_decay) == (1e-8, 50, 0.05)
    assert config.data.max_documents_tokens == 2048
    sources = config.data.sources
    assert sum(source.weight for source in sources) == 100 and len(sources) == 12
    assert all(source.task == "few_shot" for source in sources)
    by_weight = {source.weight: source for source in sources}
    assert (by_weight[27].in_context_examples, by_weight[27].max_passages) == (5, 4)
    assert (by_weight[20].in_context_examples, by_weight[20].max_passages) == (5, 1)


def test_a_new_decoder_trains_nothing_of_the_encoder(monkeypatch):
    config = load(ROOT / "ds_configs" / "recipes" / "new_decoder_olmo_7b.yaml", monkeypatch)
    assert config.encoder.train == "bridge"
    assert (config.steps, config.optimizer.warmup_steps, config.optimizer.bridge_lr) == (8000, 100, 1e-4)


def test_long_contexts_are_chunks_without_markers_in_a_chat(monkeypatch):
    config = load(ROOT / "ds_configs" / "recipes" / "long_context_llama2_7b_chat.yaml", monkeypatch)
    assert (config.steps, config.data.batch_size, config.micro_batches) == (8000, 2 * 4 * 8, 4)
    assert (config.data.max_chunks, config.data.sources[0].chunk_tokens) == (32, 1024)
    assert (config.markers.rec, config.markers.cont, config.decoders[0].chat_template) == (False, False, "llama2")


def baseline(name: str, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    return load(ROOT / "ds_configs" / "recipes" / "baselines" / f"{name}_llama31_8b.yaml", monkeypatch)


@pytest.mark.parametrize("name", ["icae", "icae_finetune", "pisco"])
def test_the_baselines_with_memory_tokens_have_the_decoders_own_model_as_encoder(name, monkeypatch):
    config = baseline(name, monkeypatch)
    assert config.encoder.backbone == config.decoders[0].backbone and config.encoder.kept_layers(32) == 32
    assert (config.pooling.memory_tokens, config.pooling.factors, config.bridge.kind) == (32, (), "none")
    pisco = LoraConfig(rank=16, alpha=32)
    adapters = (pisco, pisco) if name == "pisco" else (LoraConfig(rank=128, alpha=32), None)
    assert (config.encoder.lora, config.decoders[0].lora) == adapters
    assert name != "icae" or (config.data.reconstruction_share, config.steps) == (0.5, 100_000)


@pytest.mark.parametrize(("name", "lr", "num_samples"), [("xrag", 6e-3, 2_000_000), ("xrag_finetune", 2e-5, 4000 * 64)])
def test_the_xrag_like_baseline_trains_a_bridge_from_one_vector(name, lr, num_samples, monkeypatch):
    config = baseline(name, monkeypatch)
    assert (config.encoder.train, config.encoder.kept_layers(32), config.encoder.causal) == ("bridge", 32, False)
    pooling = config.pooling
    assert (pooling.strategy, pooling.num_groups, pooling.where, pooling.factors) == ("mean", 1, "after", ())
    assert (config.bridge.kind, config.bridge.hidden_size) == ("mlp_gelu", None)
    assert not (config.markers.rec or config.markers.cont)
    assert (config.optimizer.bridge_lr, config.optimizer.weight_decay) == (lr, 0)
    assert abs(config.steps * config.data.batch_size - num_samples) < config.data.batch_size


def test_baselines_and_the_encoder_are_fine_tuned_on_the_same_data(monkeypatch):
    papers = load(ROOT / "ds_configs" / "recipes" / "finetune_llama31_8b.yaml", monkeypatch)
    for name, steps in (("icae_finetune", papers.steps), ("xrag_finetune", papers.steps), ("pisco", 8000)):
        config = baseline(name, monkeypatch)
        assert (config.data, config.steps) == (papers.data, steps)
