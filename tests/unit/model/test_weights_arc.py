"""The ARC format: a round trip is byte-identical, and settings have the same meaning as in the reference."""

from __future__ import annotations

import dataclasses
import filecmp
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from arc_ds.batch.groups import GroupRule
from arc_ds.errors import WeightsError
from arc_ds.model.spec import CompressorSpec, build_compressor
from arc_ds.model.weights import load_backbone, read_arc_checkpoint, write_arc_checkpoint
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


def write(path: Path, spec: CompressorSpec, compressor) -> None:
    path.mkdir()
    write_arc_checkpoint(path, params_of_spec(spec, "float32"), dict(compressor.named_parameters()), spec.backbone)


@pytest.mark.parametrize("name", ["arc_mlp", "arc_multi"])
def test_golden_checkpoint_fills_a_compressor_and_is_written_back_byte_for_byte(
    golden: Path, tmp_path: Path, name: str
):
    folder = golden / "arc_checkpoints" / name / "checkpoints" / "checkpoint_000010"
    checkpoint = read_arc_checkpoint(folder, golden / "models" / "enc")
    spec = spec_of_params(checkpoint.params, checkpoint.backbone, checkpoint.num_ports)
    assert spec.rules == (GroupRule("factor", 4),)
    assert (spec.num_layers, spec.strategy, spec.pooled_queries, spec.bridge) == (3, "mean", True, "mlp")
    assert spec.decoder_sizes == (96,) * (2 if name == "arc_multi" else 1)
    with torch.device("meta"):
        compressor = build_compressor(spec)
    load_backbone(compressor, checkpoint)
    for parameter_name, parameter in compressor.named_parameters():
        assert torch.equal(parameter, checkpoint.tensor(parameter_name).float()), parameter_name
    tensors = {n: checkpoint.tensor(n) for n in checkpoint.shapes}
    write_arc_checkpoint(tmp_path, checkpoint.params.values, tensors, checkpoint.backbone)
    for file in FILES:
        assert filecmp.cmp(tmp_path / file, folder / file, shallow=False), file
    assert read_arc_checkpoint(tmp_path).backbone == checkpoint.backbone


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
    again = spec_of_params(checkpoint.params, checkpoint.backbone, checkpoint.num_ports)
    assert dataclasses.replace(again, bridge_hidden_size=spec.bridge_hidden_size) == spec
    other = filled_compressor(again, seed=1)
    load_backbone(other, checkpoint)
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
    assert params_of_spec(read, "float32") == checkpoint.params.values


def test_marker_names_of_old_checkpoints_are_decoder_zeros(tmp_path: Path):
    spec = tiny_spec(memory_tokens=3, rules=())
    compressor = filled_compressor(spec)
    write(tmp_path / "a", spec, compressor)
    file = tmp_path / "a" / FILES[1]
    old = {"rec_tok.0.weight": "rec_tok.weight", "mem_embeddings.0.weight": "mem_embeddings.weight"}
    save_file({old.get(n, n): t for n, t in load_file(file).items()}, file)
    source = read_arc_checkpoint(tmp_path / "a")
    assert torch.equal(source.tensor("ports.0.rec"), compressor.ports[0].rec)
    assert torch.equal(source.tensor("encoder.memory"), compressor.encoder.memory)


def test_checkpoint_of_another_backbone_is_refused(golden: Path):
    """The width is the same, so `spec_of_params` cannot notice it."""
    folder = golden / "arc_checkpoints/arc_mlp/checkpoints/checkpoint_000010"
    checkpoint = read_arc_checkpoint(folder, golden / "models/enc")
    other = dataclasses.replace(checkpoint.backbone, ffn_size=100)
    compressor = build_compressor(spec_of_params(checkpoint.params, other, 1))
    with pytest.raises(WeightsError, match=r"w1.weight` is \[160, 64\], expected \[100, 64\].* encoder_backbone is"):
        load_backbone(compressor, checkpoint)


def test_tensor_without_a_place_in_the_format_is_refused(tmp_path: Path):
    spec = tiny_spec()
    with pytest.raises(WeightsError, match="`decoder.norm.weight` has no place"):
        write_arc_checkpoint(
            tmp_path, params_of_spec(spec, "float32"), {"decoder.norm.weight": torch.ones(2)}, spec.backbone
        )


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
    several = ({"decoder_sizes": (48, 64)}, {"decoder_sizes": (48, 48), "bridge": "rms"})
    for changes in (*several, {"strategy": "kmeans"}, {"strategy": "prune_norm"}):
        with pytest.raises(WeightsError, match="[Uu]se our own export format"):
            params_of_spec(tiny_spec(**changes), "float32")
