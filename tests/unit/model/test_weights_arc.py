"""The ARC format: a round trip is byte-identical, and settings have the same meaning as in the reference."""

from __future__ import annotations

import dataclasses
import filecmp
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from arc_ds.batch.groups import GroupRule
from arc_ds.errors import WeightsError
from arc_ds.model.spec import CompressorSpec, build_compressor
from arc_ds.model.weights import (
    load_backbone,
    open_backbone,
    read_arc_checkpoint,
    read_backbone_config,
    write_arc_checkpoint,
)
from arc_ds.model.weights.arc_spec import compress_rate, group_rule, params_of_spec, spec_of_params
from tests.helpers import tiny_models as tiny

FILES = ("params.json", "embedder/consolidated.safetensors", "bridge_module/consolidated.safetensors")


def tiny_spec(**changes) -> CompressorSpec:
    values = {"backbone": tiny.tiny_config(), "num_layers": 1, "bridge_hidden_size": 24, "decoder_sizes": (48,)}
    return CompressorSpec(**{**values, **changes})


def filled_compressor(spec: CompressorSpec, seed: int = 0):
    compressor = build_compressor(spec)
    generator = torch.Generator().manual_seed(seed)
    for parameter in compressor.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return compressor


def write(path: Path, spec: CompressorSpec, compressor, **options) -> None:
    params = params_of_spec(spec, param_dtype="float32", trained_layers=1, train_embeddings=True)
    write_arc_checkpoint(path, params, dict(compressor.named_parameters()), spec.backbone, **options)


@pytest.mark.parametrize("name", ["arc_mlp", "arc_multi"])
def test_golden_checkpoint_is_written_back_byte_for_byte(golden: Path, tmp_path: Path, name: str):
    checkpoint = read_arc_checkpoint(golden / "arc_checkpoints" / name / "checkpoints" / "checkpoint_000010")
    backbone = read_backbone_config(golden / "models" / "enc", "none")
    source = checkpoint.source(backbone)
    tensors = {n: source.tensor(n) for n in source.names()}
    write_arc_checkpoint(tmp_path / "out", checkpoint.params, tensors, backbone)
    for file in FILES:
        assert filecmp.cmp(tmp_path / "out" / file, checkpoint.path / file, shallow=False), file
    assert read_arc_checkpoint(tmp_path / "out").backbone == backbone


def test_query_rows_are_turned_and_others_are_not(golden: Path):
    folder = golden / "arc_checkpoints/arc_mlp/checkpoints/checkpoint_000010"
    source = read_arc_checkpoint(folder).source(read_backbone_config(golden / "models/enc", "none"))
    file = load_file(folder / FILES[1])
    for name, heads in (("wq", 4), ("wk", 2)):
        stored = file[f"layers.1.attention.{name}.weight"]
        found = source.tensor(f"encoder.layers.1.attention.{name}.weight")
        assert torch.equal(tiny.interleaved(found, heads), stored)
        assert not torch.equal(found, stored)
    assert torch.equal(source.tensor("encoder.layers.1.attention.wv.weight"), file["layers.1.attention.wv.weight"])


@pytest.mark.parametrize("name", ["arc_mlp", "arc_multi"])
def test_golden_checkpoint_fills_a_compressor(golden: Path, name: str):
    checkpoint = read_arc_checkpoint(golden / "arc_checkpoints" / name / "checkpoints" / "checkpoint_000010")
    source = checkpoint.source(read_backbone_config(golden / "models" / "enc", "none"))
    spec = spec_of_params(checkpoint.params, source.backbone, checkpoint.num_ports)
    assert spec.rules == (GroupRule("factor", 4),)
    assert (spec.num_layers, spec.strategy, spec.pooled_queries, spec.bridge) == (3, "mean", True, "mlp")
    assert spec.decoder_sizes == (96,) * (2 if name == "arc_multi" else 1)
    with torch.device("meta"):
        compressor = build_compressor(spec)
    load_backbone(compressor, source)
    for parameter_name, parameter in compressor.named_parameters():
        assert torch.equal(parameter, source.tensor(parameter_name).float()), parameter_name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"decoder_sizes": (48, 48)},
        {"bridge": "linear"},
        {"bridge": "rms"},
        {"bridge": "none", "decoder_sizes": (32,), "bridge_hidden_size": None},
        {"memory_tokens": 5, "rules": (), "pooled_queries": False},
        {"markers": ("rec",)},
        {"markers": ()},
        {"strategy": "fusion", "causal": True, "where": "between", "rules": (GroupRule("count", 3),)},
    ],
)
def test_every_kind_of_compressor_survives_the_round_trip(tmp_path: Path, changes: dict):
    spec = tiny_spec(**changes)
    compressor = filled_compressor(spec)
    write(tmp_path / "a", spec, compressor)
    checkpoint = read_arc_checkpoint(tmp_path / "a")
    source = checkpoint.source()
    again = spec_of_params(checkpoint.params, source.backbone, checkpoint.num_ports)
    assert dataclasses.replace(again, bridge_hidden_size=spec.bridge_hidden_size) == spec
    other = filled_compressor(again, seed=1)
    load_backbone(other, source)
    for (name, expected), (_, found) in zip(compressor.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(expected, found), name
    write(tmp_path / "b", again, other)
    assert (tmp_path / "a" / FILES[0]).read_text() == (tmp_path / "b" / FILES[0]).read_text()


@pytest.mark.parametrize(
    ("rate", "rule"),
    [
        (-8, GroupRule("factor", 8)),
        (-1, GroupRule("none")),
        (0, GroupRule("count", 1)),
        (4, GroupRule("count", 4)),
    ],
)
def test_rates_of_the_reference(rate: int, rule: GroupRule):
    assert group_rule(rate) == rule
    assert compress_rate(rule) == rate


@pytest.mark.parametrize(
    ("pool_type", "strategy", "pooled_queries"),
    [
        ("mean_pooled_queries", "mean", True),
        ("last", "last", False),
        ("sum_pooled_queries", "sum", True),
        ("fusion_pooled_queries", "fusion", True),
        ("pooled_queries_metric_cosine", "similarity_cosine", True),
        ("pruning_metric_euclidean", "prune_euclidean", False),
        ("metric_scalar_product", "similarity_dot", False),
    ],
)
def test_pool_types_of_the_reference(tmp_path: Path, pool_type: str, strategy: str, pooled_queries: bool):
    spec = tiny_spec()
    write(tmp_path / "a", spec, filled_compressor(spec))
    file = tmp_path / "a" / FILES[0]
    file.write_text(file.read_text().replace("mean_pooled_queries", pool_type))
    checkpoint = read_arc_checkpoint(tmp_path / "a")
    read = spec_of_params(checkpoint.params, checkpoint.backbone, 1)
    assert (read.strategy, read.pooled_queries) == (strategy, pooled_queries)
    assert read.rules == (GroupRule("floor_factor" if "metric" in pool_type else "factor", 8),)
    written = params_of_spec(read, param_dtype="float32", trained_layers=1, train_embeddings=True)
    assert written == checkpoint.params


def test_marker_names_of_old_checkpoints_are_decoder_zeros(tmp_path: Path):
    spec = tiny_spec(memory_tokens=3, rules=())
    compressor = filled_compressor(spec)
    write(tmp_path / "a", spec, compressor)
    file = tmp_path / "a" / FILES[1]
    old = {"rec_tok.0.weight": "rec_tok.weight", "mem_embeddings.0.weight": "mem_embeddings.weight"}
    save_file({old.get(n, n): t for n, t in load_file(file).items()}, file)
    source = read_arc_checkpoint(tmp_path / "a").source()
    assert torch.equal(source.tensor("ports.0.rec"), compressor.ports[0].rec)
    assert torch.equal(source.tensor("encoder.memory"), compressor.encoder.memory)


def test_unknown_settings_are_kept(tmp_path: Path):
    spec = tiny_spec()
    compressor = filled_compressor(spec)
    write(tmp_path / "a", spec, compressor)
    file = tmp_path / "a" / FILES[0]
    plain = json.loads(file.read_text())
    plain["max_embeds"] = 1
    plain["embedder_params"]["mixed_method"] = {"a": [1]}
    plain["embedder_params"]["pooling_module"]["based_on"] = None
    file.write_text(json.dumps(plain))
    checkpoint = read_arc_checkpoint(tmp_path / "a")
    assert json.loads(checkpoint.params.to_json()) == plain


def test_nothing_is_overwritten_unasked_and_a_failed_write_leaves_no_trace(tmp_path: Path):
    spec = tiny_spec()
    first, second = filled_compressor(spec), filled_compressor(spec, seed=1)
    write(tmp_path / "a", spec, first)
    with pytest.raises(WeightsError, match="exists already"):
        write(tmp_path / "a", spec, second)
    assert torch.equal(read_arc_checkpoint(tmp_path / "a").source().tensor("ports.0.rec"), first.ports[0].rec)
    write(tmp_path / "a", spec, second, overwrite=True)
    assert torch.equal(read_arc_checkpoint(tmp_path / "a").source().tensor("ports.0.rec"), second.ports[0].rec)
    params = params_of_spec(spec, param_dtype="float32", trained_layers=1, train_embeddings=True)
    with pytest.raises(WeightsError, match="`decoder.norm.weight` has no place"):
        write_arc_checkpoint(tmp_path / "b", params, {"decoder.norm.weight": torch.ones(2)}, spec.backbone)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "notes").write_text("")
    with pytest.raises(WeightsError, match="is not an ARC checkpoint, so it is not overwritten"):
        write(tmp_path / "home", spec, first, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "home"]


def test_checkpoint_of_another_backbone_is_refused(golden: Path, tmp_path: Path):
    folder = golden / "arc_checkpoints/arc_mlp/checkpoints/checkpoint_000010"
    checkpoint = read_arc_checkpoint(folder)
    with pytest.raises(WeightsError, match="pass the backbone's folder as encoder_backbone"):
        checkpoint.source()
    with pytest.raises(WeightsError, match=r"`cont_tok.0.weight` is \[1, 64\], expected \[1, 96\]"):
        checkpoint.source(open_backbone(golden / "models/decM").config)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, copy_function=shutil.copyfile)
    shutil.rmtree(copy / "bridge_module")
    with pytest.raises(WeightsError, match="has no bridge_module"):
        read_arc_checkpoint(copy)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"bridge_type": "mlp"', '"bridge_type": "conv"', "bridge_type` is 'conv'"),
        ('"compress_rates": [', '"compress_rates": ["a", ', "list of whole numbers"),
        ('"n_truncated_layers": 1', '"n_truncated_layers": -1', "whole number of at least 0; it is -1"),
        ('"n_truncated_layers": 1,', "", "n_truncated_layers` to be .*; it is missing"),
        ("mean_pooled_queries", "attention", "`pool_type` is 'attention'"),
        ("mean_pooled_queries", "metric_pruning_norm", "keeps the rows of smallest norm"),
        ('"in_dim": 32', '"in_dim": 33', "reads vectors of 33, but the backbone has width 32"),
    ],
)
def test_settings_that_cannot_be_are_named(tmp_path: Path, old: str, new: str, message: str):
    spec = tiny_spec()
    write(tmp_path / "a", spec, filled_compressor(spec))
    file = tmp_path / "a" / FILES[0]
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(WeightsError, match=message):
        checkpoint = read_arc_checkpoint(tmp_path / "a")
        spec_of_params(checkpoint.params, spec.backbone, 1)


def test_what_the_reference_cannot_say_is_not_written():
    options = {"param_dtype": "float32", "trained_layers": 1, "train_embeddings": True}
    several = ({"decoder_sizes": (48, 64)}, {"decoder_sizes": (48, 48), "bridge": "rms"})
    for changes in (*several, {"strategy": "kmeans"}, {"strategy": "prune_norm"}):
        with pytest.raises(WeightsError, match="[Uu]se our own export format"):
            params_of_spec(tiny_spec(**changes), **options)
