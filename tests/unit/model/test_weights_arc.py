"""The ARC format: golden files are written back byte for byte, and settings have the same meaning as in the reference.

`tests/unit/export` has the round trip of every kind of compressor.
"""

from __future__ import annotations

import dataclasses
import filecmp
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from arc_ds import ArcModel
from arc_ds.batch.groups import GroupRule
from arc_ds.errors import ConfigError, WeightsError
from arc_ds.model.pooling import STRATEGIES
from arc_ds.model.spec import CompressorSpec, build_compressor
from arc_ds.model.weights import load_backbone, read_arc_checkpoint, write_arc_checkpoint
from arc_ds.model.weights.arc_spec import compress_rate, group_rule, params_of_spec, spec_of_params
from arc_ds.model.weights.fields import Fields
from tests.helpers.tiny_export import ENCODER, tiny_spec, tiny_trained
from tests.helpers.tiny_models import interleaved

EMBEDDER = "embedder/consolidated.safetensors"
FILES = ("params.json", EMBEDDER, "bridge_module/consolidated.safetensors")


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
    assert read_arc_checkpoint(tmp_path, golden / "models" / "decM").backbone == checkpoint.backbone  # its own sizes


@pytest.mark.parametrize("qk_norm", ["head", "row"])
def test_biases_and_norms_of_queries_and_keys_are_paired_like_their_weights(tmp_path: Path, qk_norm: Any):
    """A file pairs (2i, 2i + 1), so the rows of the bias and of the norm move with those of the weight."""
    backbone = dataclasses.replace(ENCODER, qkv_bias=True, output_bias=True, ffn_bias=True, qk_norm=qk_norm)
    trained = tiny_trained(tmp_path / "run", backbone=backbone)
    write_arc_checkpoint(tmp_path, params_of_spec(trained.spec, "float32"), trained.tensors, backbone)
    checkpoint = read_arc_checkpoint(tmp_path)
    assert checkpoint.backbone == backbone and checkpoint.shapes.keys() == trained.tensors.keys()
    for name, tensor in trained.tensors.items():
        assert torch.equal(checkpoint.tensor(name), tensor), name
    stored, root = load_file(tmp_path / EMBEDDER), "layers.0.attention"
    for linear, norm, heads in (("wq", "q_norm", 4), ("wk", "k_norm", 2)):
        for name, num_heads in (
            (f"{root}.{linear}.weight", heads),
            (f"{root}.{linear}.bias", heads),
            (f"{root}.{norm}.weight", 1 if qk_norm == "head" else heads),
        ):
            assert torch.equal(stored[name], interleaved(trained.tensors[f"encoder.{name}"], num_heads)), name
    for name in ("wv.bias", "wo.bias"):
        assert torch.equal(stored[f"{root}.{name}"], trained.tensors[f"encoder.{root}.{name}"])


def test_checkpoint_of_another_backbone_is_refused(golden: Path):
    """The width is the same, so `spec_of_params` cannot notice it."""
    folder = golden / "arc_checkpoints/arc_mlp/checkpoints/checkpoint_000010"
    checkpoint = read_arc_checkpoint(folder, golden / "models/enc")
    other = dataclasses.replace(checkpoint.backbone, ffn_size=100)
    compressor = build_compressor(spec_of_params(checkpoint.params, other, 1))
    message = r"layers.\{0-2\}.feed_forward.w1.weight` is \[160, 64\], expected \[100, 64\].*is the backbone"
    with pytest.raises(WeightsError, match=message):
        load_backbone(compressor, checkpoint)


def test_names_of_old_checkpoints_are_read_and_those_of_another_format_refused(tmp_path: Path):
    trained = tiny_trained(tmp_path / "run", memory_tokens=3, rules=())
    params = params_of_spec(trained.spec, "float32")
    write_arc_checkpoint(tmp_path, params, trained.tensors, trained.spec.backbone)
    old = {"rec_tok.0.weight": "rec_tok.weight", "mem_embeddings.0.weight": "mem_embeddings.weight"}
    tensors = {old.get(n, n): t for n, t in load_file(tmp_path / EMBEDDER).items()}
    save_file(tensors, tmp_path / EMBEDDER)
    checkpoint = read_arc_checkpoint(tmp_path)
    for name in ("ports.0.rec", "encoder.memory"):
        assert torch.equal(checkpoint.tensor(name), trained.tensors[name])
    both = {**tensors, "rec_tok.0.weight": tensors["rec_tok.weight"].clone()}
    save_file(both, tmp_path / EMBEDDER)
    assert torch.equal(read_arc_checkpoint(tmp_path).tensor("ports.0.rec"), trained.tensors["ports.0.rec"])
    both["rec_tok.0.weight"] += 1
    save_file(both, tmp_path / EMBEDDER)
    with pytest.raises(WeightsError, match=r"`rec_tok.0.weight` and `rec_tok.weight` are names of one tensor"):
        read_arc_checkpoint(tmp_path)
    save_file({**tensors, "decoder.norm.weight": torch.ones(2)}, tmp_path / EMBEDDER)
    with pytest.raises(WeightsError, match="`decoder.norm.weight` is not part of the ARC format"):
        read_arc_checkpoint(tmp_path)
    with pytest.raises(WeightsError, match="`decoder.norm.weight` has no place"):
        write_arc_checkpoint(tmp_path, params, {"decoder.norm.weight": torch.ones(2)}, trained.spec.backbone)


@pytest.mark.parametrize(
    ("rate", "rule"),
    [(-8, GroupRule("factor", 8)), (-1, GroupRule("none")), (0, GroupRule("count", 1)), (4, GroupRule("count", 4))],
)
def test_rates_of_the_reference(rate: int, rule: GroupRule):
    assert group_rule(rate) == rule
    assert compress_rate(rule) == rate


def changed_params(section: str, key: str, value: object) -> dict[str, Any]:
    """The settings of a tiny compressor with one of them replaced, or removed if the value is `...`."""
    params = json.loads(json.dumps(params_of_spec(tiny_spec(), "float32")))
    part = params["embedder_params"]["pooling_module"] if section == "pooling_module" else params[section]
    part.pop(key) if value is ... else part.update({key: value})
    return params


def read_spec(params: dict[str, Any]) -> CompressorSpec:
    return spec_of_params(Fields(params, "params.json"), ENCODER, 1)


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
def test_pool_types_of_the_reference(pool_type: str, strategy: str, pooled_queries: bool):
    params = changed_params("pooling_module", "pool_type", pool_type)
    read = read_spec(params)
    assert (read.strategy, read.pooled_queries) == (strategy, pooled_queries)
    assert read.rules == (GroupRule("floor_factor" if "metric" in pool_type else "factor", 4),)
    assert params_of_spec(read, "float32") == params


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("bridge_module", "bridge_type", "conv", "bridge_type` is 'conv'"),
        ("bridge_module", "in_dim", 33, "reads vectors of 33, but the backbone has width 32"),
        ("embedder_params", "compress_rates", ["a"], "list of whole numbers"),
        ("embedder_params", "n_truncated_layers", -1, "whole number of at least 0; it is -1"),
        ("embedder_params", "n_truncated_layers", ..., "n_truncated_layers` to be .*; it is missing"),
        ("embedder_params", "n_truncated_layers", 2, "drops 2 layers, but the backbone has 2"),
        ("embedder_params", "pooling_module", "mean", "`pooling_module` to be an object"),
        ("pooling_module", "pool_type", ..., "`pool_type` to be a name such as"),
        ("pooling_module", "pool_type", "attention", "`pool_type` is 'attention'"),
        ("pooling_module", "pool_type", "metric_pruning_norm", "keeps the rows of smallest norm"),
    ],
)
def test_settings_that_cannot_be_are_named(section: str, key: str, value: object, message: str):
    with pytest.raises(WeightsError, match=message):
        read_spec(changed_params(section, key, value))


def write(folder: Path, params: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    write_arc_checkpoint(folder, params, tensors, ENCODER)
    return folder


def test_fewer_memory_tokens_than_the_file_holds_are_its_first_ones(tmp_path: Path):
    """In `params.json` or as an argument. With them the vectors are those of a compressor that has no others."""
    trained = tiny_trained(tmp_path / "run", memory_tokens=8, rules=(), pooled_queries=False)
    params = params_of_spec(trained.spec, "float32")
    eight = write(tmp_path / "eight", params, trained.tensors)
    params["embedder_params"]["memory_tokens"] = 3
    three = write(tmp_path / "three", params, trained.tensors)
    only = {**trained.tensors, "encoder.memory": trained.tensors["encoder.memory"][:3]}
    vectors = [
        ArcModel.from_checkpoint(folder, [], memory_tokens=num).compress([[5, 9, 80]])[0]
        for folder, num in ((write(tmp_path / "only", params, only), None), (three, None), (eight, 3), (eight, None))
    ]
    assert [v.shape[0] for v in vectors] == [4, 4, 4, 9]
    assert torch.equal(vectors[0], vectors[1]) and torch.equal(vectors[0], vectors[2])
    assert not torch.allclose(vectors[0][:3], vectors[3][:3]), "the tokens left out would have been seen"
    for num, message in ((0, "at least 1|1 to 8"), (9, "8")):
        with pytest.raises(ConfigError, match=message):
            ArcModel.from_checkpoint(eight, [], memory_tokens=num)
    params["embedder_params"]["memory_tokens"] = 9
    with pytest.raises(WeightsError, match=r"`encoder.memory` is \[8, 32\], expected \[9, 32\]"):
        ArcModel.from_checkpoint(write(tmp_path / "nine", params, trained.tensors), [])
    pooled = write(tmp_path / "pooled", params_of_spec(tiny_spec(), "float32"), tiny_trained(tmp_path / "p").tensors)
    with pytest.raises(ConfigError, match="this encoder pools and has none"):
        ArcModel.from_checkpoint(pooled, [], memory_tokens=3)


def test_one_bridge_of_two_decoders_is_read_and_written_back_tensor_by_tensor(tmp_path: Path):
    """As in the reference: bridge_type mlp, and markers for each decoder."""
    trained = tiny_trained(tmp_path / "run", decoder_sizes=(48, 48), bridge_shared=True)
    params = params_of_spec(trained.spec, "float32")
    assert params["bridge_module"]["bridge_type"] == "mlp"
    folder = write(tmp_path / "out", params, trained.tensors)
    bridge = load_file(folder / "bridge_module/consolidated.safetensors")
    assert sorted(bridge) == ["layer1.weight", "layer2.weight"]
    assert {name for name in load_file(folder / EMBEDDER) if "_tok." in name} == {
        f"{marker}_tok.{n}.weight" for marker in ("rec", "cont") for n in range(2)
    }
    checkpoint = read_arc_checkpoint(folder)
    assert spec_of_params(checkpoint.params, checkpoint.backbone, checkpoint.num_ports) == trained.spec
    for name, tensor in trained.tensors.items():
        assert torch.equal(checkpoint.tensor(name), tensor), name
    first, second = (ArcModel.from_checkpoint(folder, []).compress([[5, 9, 80]], decoder)[0] for decoder in range(2))
    assert torch.equal(first[:-1], second[:-1]) and not torch.equal(first[-1], second[-1])


@pytest.mark.parametrize(
    ("name", "shape", "accepted"),
    [("rec_tok.0.weight", (1, 32), True), ("rec_tok.0.weight", (2, 32), False), ("rec_tok.1.weight", (1, 32), False),
     ("cont_tok.3.weight", (1, 32), False), ("layers.0.attention.wq.bias", (32,), False)],
)  # fmt: skip
def test_exactly_the_markers_that_the_settings_leave_out_may_be_unused(
    tmp_path: Path, name: str, shape: tuple[int, ...], accepted: bool
):
    trained = tiny_trained(tmp_path / "run", markers=("cont",))
    folder = write(tmp_path / "out", params_of_spec(trained.spec, "float32"), trained.tensors)
    save_file({**load_file(folder / EMBEDDER), name: torch.ones(shape)}, folder / EMBEDDER)
    if accepted:
        ArcModel.from_checkpoint(folder, [])
        return
    with pytest.raises(WeightsError, match=r"`(ports|encoder)\.\S+` (has no place|is missing|is \[)"):
        ArcModel.from_checkpoint(folder, [])


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if not s.startswith("kmeans") and s != "prune_norm"])
@pytest.mark.parametrize("pooled_queries", [True, False])
def test_every_strategy_that_the_format_can_name_is_read_back(strategy: str, pooled_queries: bool):
    kind = "floor_factor" if strategy.startswith(("similarity", "prune")) else "factor"
    spec = tiny_spec(strategy=strategy, pooled_queries=pooled_queries, rules=(GroupRule(kind, 4),))
    read = read_spec(json.loads(json.dumps(params_of_spec(spec, "float32"))))
    same = {"similarity": "similarity_cosine", "prune": "prune_cosine"}  # the format has one name for both
    assert read == dataclasses.replace(spec, strategy=same.get(strategy, strategy))
