"""Ranges, exclusions and paths of a config."""

from __future__ import annotations

from pathlib import Path

import pytest

from arc_ds.config.load import load_config
from arc_ds.config.schema import RunConfig
from arc_ds.config.validate import check_paths, check_world_size
from arc_ds.errors import ConfigError
from arc_ds.planning.sizes import check_tasks

MINIMAL = """\
run_dir: runs/x
steps: 2000
deepspeed: ds.json
encoder: {backbone: models/enc}
decoders: [{name: a, backbone: models/dec}]
data: {sources: [{path: shards/train}]}
"""


def load(tmp_path: Path, *overrides: str) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL, encoding="utf-8")
    config = load_config(path, overrides)
    check_tasks(config)
    return config


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["pooling.factors=[8, 0]"], ["pooling.factors.1 is 0", "1 keeps every token"]),
        (["pooling.factors=[-8]"], ["pooling.factors.0 is -8"]),
        (["pooling.factors=[]"], ["exactly one of", "got none"]),
        (["pooling.num_groups=4"], ["factors and num_groups", "factors: []"]),
        (["pooling.memory_tokens=4"], ["factors and memory_tokens"]),
        (["pooling.factors=[]", "pooling.num_groups=0"], ["pooling.num_groups is 0"]),
        (["encoder.num_layers=4", "encoder.num_truncated_layers=2"], ["remove one"]),
        (["encoder.num_layers=0"], ["encoder.num_layers is 0"]),
        (["encoder.trained_layers=-1"], ["encoder.trained_layers", "0 freezes"]),
        (["encoder.train=bridge", "encoder.trained_layers=2"], ["trained_layers is 2. Remove one", "last 2 layers"]),
        (["encoder.train=bridge", "encoder.lora.rank=2"], ["encoder.lora trains it. Remove one"]),
        (["encoder.lora.rank=2", "encoder.trained_layers=2"], ["trained_layers is 2. Remove one"]),
        (["encoder.lora.rank=0"], ["encoder.lora.rank is 0", "lora: null means no adapters"]),
        (
            ["decoders.0.lora.rank=2", "decoders.0.implementation=transformers"],
            ["decoders.0.lora: adapters are not available", "that implementation: native computes"],
        ),
        (["decoders.0.lora.rank=2", "decoders.0.train=false"], ["lora needs training", "Remove one of the two keys"]),
        (
            ["encoder.train=bridge", "pooling.factors=[]", "pooling.memory_tokens=8"],
            ["would start untrained", "encoder.init_from"],
        ),
        (
            ["decoders.0.implementation=transformers", "decoders.0.activation_checkpointing=selective"],
            ["decoders.0.activation_checkpointing: selective is not available", "Set full, or none"],
        ),
        (["bridge.hidden_size=0"], ["bridge.hidden_size"]),
        (["steps=0"], ["steps is 0"]),
        (["seed=-1"], ["seed is -1"]),
        (["seed=18446744073709551616"], ["seed is 18446744073709551616", "less than 18446744073709551616"]),
        (["log_every=0"], ["log_every"]),
        (["micro_batches=0"], ["micro_batches is 0"]),
        (["micro_batches=3"], ["multiple of micro_batches=3"]),
        (["data.batch_size=0"], ["data.batch_size is 0"]),
        (["data.sources=[]"], ["data.sources"]),
        (["data.sources.0.weight=0"], ["data.sources.0.weight"]),
        (["data.max_context_tokens=0"], ["data.max_context_tokens"]),
        (["data.max_encoder_tokens=255"], ["data.max_encoder_tokens is 255; expected 256", "null: no limit"]),
        (["data.max_encoder_tokens=256", "pooling.factors=[]", "pooling.memory_tokens=8"], ["expected 264"]),
        (
            ["data.max_encoder_tokens=9000", "data.sources.0.task=long_context", "data.max_chunks=9"],
            ["expected 9216", "data.sources.0 (long_context)", "lower data.max_chunks or the source's chunk_tokens"],
        ),
        (
            ["data.max_decoder_rows=546"],
            ["data.max_decoder_rows is 546; expected 547", "lower data.max_context_tokens"],
        ),
        (["data.cache_gib=0"], ["data.cache_gib is 0", "null for half"]),
        (["data.max_decoder_rows=0"], ["data.max_decoder_rows is 0"]),
        (["data.max_continuation_tokens=1"], ["data.max_continuation_tokens"]),
        (["data.max_answer_tokens=0", "data.max_chunks=0"], ["data.max_answer_tokens is 0", "data.max_chunks is 0"]),
        (
            ["data.max_documents_tokens=0", "data.max_question_tokens=0"],
            ["max_documents_tokens", "max_question_tokens"],
        ),
        (["data.sources.0.task=few_shot", "data.sources.0.in_context_examples=-1"], ["0.in_context_examples is -1"]),
        (["data.sources.0.task=few_shot", "data.sources.0.max_passages=0"], ["data.sources.0.max_passages is 0"]),
        (["data.sources.0.task=long_context", "data.sources.0.chunk_tokens=0"], ["data.sources.0.chunk_tokens is 0"]),
        (
            ["data.sources.0.in_context_examples=5"],
            ["in_context_examples is 5", "few_shot uses this key", "is pretraining"],
        ),
        (["data.sources.0.task=few_shot", "data.sources.0.chunk_tokens=512"], ["chunk_tokens is 512", "long_context"]),
        (["data.sources.0.task=fewshot"], ["data.sources.0.task: the task is 'fewshot'", "Did you mean few_shot"]),
        (["data.validation=[{path: v, task: x}]"], ["data.validation.0.task", "one of few_shot, long_context"]),
        (["data.reconstruction_share=1.2"], ["from 0 to 1"]),
        (["data.reconstruction_share=[]"], ["increasing steps"]),
        (["data.reconstruction_share=[[1, 0.5]]"], ["increasing steps from 0"]),
        (["data.reconstruction_share=[[0, 0.5], [0, 0.2]]"], ["increasing steps"]),
        (["decoders=[]"], ["at least one decoder"]),
        (["decoders.0.name=a b"], ["decoders.0.name"]),
        (["decoders.1.name=a", "decoders.1.backbone=b"], ["like that of decoder 0"]),
        (["decoders=[{name: a}]"], ["decoders.0.backbone is missing"]),
        (["decoders.0.train=false"], ["nothing would be trained", "decoders.0.train is false", "encoder.init_from"]),
        (
            ["encoder.init_from=x", "decoders.1.name=b", "decoders.1.train=false", "decoders.1.fresh_bridge=true"],
            ["decoders.1: fresh_bridge needs training"],
        ),
        (["optimizer.encoder_lr=-1e-5"], ["optimizer.encoder_lr"]),
        (["optimizer.eps=0"], ["optimizer.eps"]),
        (["optimizer.betas=[0.9, 1.0]"], ["optimizer.betas.1"]),
        (["steps=20"], ["optimizer.warmup_steps=1"]),
        (["checkpoint.keep_last=0"], ["checkpoint.keep_last"]),
        (["checkpoint.keep_every=0"], ["checkpoint.keep_every"]),
        (["validation.every=5"], ["data.validation names no"]),
        (["validation.num_samples=3"], ["validation.num_samples"]),
        (["data.validation=[]"], ["data.validation is an empty list", "null for no validation"]),
        (["data.validation=[{path: a}, {path: b, weight: 0}]"], ["data.validation.1.weight is 0"]),
        (["data.validation=[{path: a, in_context_examples: 2}]"], ["data.validation.0.in_context_examples is 2"]),
    ],
)
def test_value_out_of_range_names_key_and_cure(tmp_path, overrides, words):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, *overrides)
    for word in words:
        assert word in str(caught.value)


def test_all_problems_are_named_at_once(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, "seed=-1", "optimizer.eps=0", "pooling.factors=[0]")
    assert len(str(caught.value).splitlines()) == 3


def test_zero_rates_and_lone_alternatives_are_allowed(tmp_path):
    config = load(tmp_path, "optimizer.encoder_lr=0", "pooling.factors=[]", "pooling.memory_tokens=8")
    assert config.pooling.memory_tokens == 8
    assert load(tmp_path, "pooling.factors=[]", "pooling.num_groups=4").pooling.num_groups == 4


def test_world_size_deals_the_batch_or_is_an_error_with_a_batch_that_fits(tmp_path):
    assert check_world_size(load(tmp_path, "data.batch_size=48", "micro_batches=3"), 4) == 4
    with pytest.raises(ConfigError, match=r"data\.batch_size=130"):
        check_world_size(load(tmp_path, "micro_batches=2"), 5)


def test_every_missing_path_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    held_out = "data.validation=[{path: shards/val}, {path: shards/qa, task: few_shot}]"
    config = load(tmp_path, "encoder.init_from=ckpt", "checkpoint.resume=old", held_out)
    (tmp_path / "models" / "dec").mkdir(parents=True)
    with pytest.raises(ConfigError) as caught:
        check_paths(config)
    message = str(caught.value)
    for path in ("deepspeed: ds.json", "models/enc", "ckpt", "old", "shards/train", str(tmp_path), "Correct them"):
        assert path in message
    assert "data.validation.0.path: shards/val" in message and "data.validation.1.path: shards/qa" in message
    assert "models/dec" not in message


def test_shards_behind_urls_are_no_missing_paths_and_other_urls_are(tmp_path, monkeypatch):
    _with_paths(tmp_path, monkeypatch, "run")
    shards = f"data.sources=[{{path: s3://bucket/shards}}, {{path: 'pipe:cat /x'}}, {{path: 'file://{tmp_path}'}}]"
    check_paths(load(tmp_path, shards, "data.validation=https://host/held-out?sig=1"))
    with pytest.raises(ConfigError, match=r"data\.sources\.0\.path: /nowhere\b"):
        check_paths(load(tmp_path, "data.sources=[{path: 'file:///nowhere'}]"))
    with pytest.raises(ConfigError, match=r"encoder\.backbone: https://host/weights"):
        check_paths(load(tmp_path, "encoder.backbone=https://host/weights"))


def _with_paths(tmp_path, monkeypatch, run_dir):
    monkeypatch.chdir(tmp_path)
    for path in ("models/dec", "models/enc", "shards/train"):
        (tmp_path / path).mkdir(parents=True)
    (tmp_path / "ds.json").write_text("{}")
    return load(tmp_path, f"run_dir={run_dir}")


def test_a_run_folder_that_cannot_be_is_an_error_before_the_start(tmp_path, monkeypatch):
    """A file blocks the path. Permissions would not stop root, and root may run the tests."""
    config = _with_paths(tmp_path, monkeypatch, "notes/runs/1")
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ConfigError, match=r"run_dir=notes/runs/1 cannot be created or written to.*Not a directory"):
        check_paths(config)
    (tmp_path / "notes").unlink()
    check_paths(config)


def test_a_run_folder_that_cannot_be_written_is_an_error_before_the_start(tmp_path, monkeypatch):
    config = _with_paths(tmp_path, monkeypatch, "runs/1")
    (tmp_path / "runs" / "1").mkdir(parents=True)

    def refuse(*_, dir, **__):
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr("tempfile.NamedTemporaryFile", refuse)
    with pytest.raises(ConfigError, match=r"run_dir=runs/1 .*Permission denied \(runs/1\)"):
        check_paths(config)


def test_trying_the_run_folder_leaves_nothing_behind(tmp_path, monkeypatch):
    config = _with_paths(tmp_path, monkeypatch, "runs/deep/1")
    (tmp_path / "runs").mkdir()
    check_paths(config)
    assert list((tmp_path / "runs").iterdir()) == []
