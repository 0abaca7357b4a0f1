"""Load a source into a module: by name, one tensor at a time, and nothing at all if something does not fit."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import nn

from arc_ds.errors import WeightsError
from arc_ds.model.compressor import Compressor
from arc_ds.model.decoder import Decoder
from arc_ds.model.spec import build_compressor
from arc_ds.model.weights import (
    SelectedTensors,
    beyond_layers,
    copy_into,
    load_backbone,
    open_backbone,
    use_memory_tokens,
)
from arc_ds.model.weights.load import _fill_partitions
from tests.helpers import tiny_models as tiny
from tests.helpers.tiny_export import tiny_spec


@pytest.fixture
def opened(tmp_path: Path):
    config = tiny.tiny_config()
    tensors = tiny.random_tensors(config, dtype=torch.bfloat16)
    return open_backbone(tiny.write_hf(tmp_path, config, tensors)), tensors


class CountingSource:
    """Forwards to another source and records the tensors that were read."""

    def __init__(self, source) -> None:
        self.source, self.path, self.shapes, self.read = source, source.path, source.shapes, []

    def tensor(self, name, rows=slice(None)):
        self.read.append(name)
        return self.source.tensor(name, rows)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_decoder_gets_every_tensor_once(opened, device: str, dtype):
    source, tensors = opened
    with torch.device(device):
        decoder = Decoder(source.config)
    counting = CountingSource(source)
    load_backbone(decoder, counting, dtype=dtype)
    assert sorted(counting.read) == sorted(tensors)
    for name, parameter in decoder.named_parameters():
        assert parameter.dtype == (dtype or torch.float32) and not parameter.requires_grad
        assert torch.equal(parameter, tensors[name].to(parameter.dtype)), name


def test_the_log_gives_size_time_and_memory(opened, caplog):
    source, tensors = opened
    with caplog.at_level("INFO"):
        load_backbone(Decoder(source.config), source, name="decoder")
    gigabytes = sum(tensor.nbytes for tensor in tensors.values()) / 1e9
    expected = rf"loaded decoder from {source.path}: each rank read {gigabytes:.2f} GB in \d+\.\d s, \d+ MB/s, peak"
    assert re.search(expected + r" memory [1-9]\d+ MiB", caplog.text)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tied_head_stays_tied(tmp_path: Path, device: str):
    config = tiny.tiny_config(tie_embeddings=True)
    source = open_backbone(tiny.write_hf(tmp_path, config, tiny.random_tensors(config)))
    with torch.device(device):
        decoder = Decoder(config)
    load_backbone(decoder, source)
    assert decoder.output.weight is decoder.tok_embeddings.weight
    assert torch.equal(decoder.output.weight, source.tensor("tok_embeddings.weight"))


def one_layer_compressor(config) -> Compressor:
    return build_compressor(tiny_spec(backbone=config, num_layers=1, rules=(), memory_tokens=2))


def test_truncated_encoder_takes_its_layers_and_reads_no_other(opened):
    source, tensors = opened
    model, counting = one_layer_compressor(source.config), CountingSource(source)
    load_backbone(model, counting, prefix="encoder.", skip=lambda name: name == "memory", allow_unused=beyond_layers(1))
    assert torch.equal(model.encoder.layers[0].attention.wq.weight, tensors["layers.0.attention.wq.weight"].float())
    assert torch.equal(model.encoder.memory, torch.ones(2, 32))
    assert not any(name.startswith(("layers.1", "norm", "output")) for name in counting.read)


def test_parameter_without_a_tensor_is_an_error_before_anything_is_copied(opened):
    source, _ = opened
    model = one_layer_compressor(source.config)
    nn.init.ones_(model.encoder.layers[0].attention.wq.weight)  # uninitialised memory may hold NaN, unequal to itself
    before = model.encoder.layers[0].attention.wq.weight.clone()
    with pytest.raises(WeightsError, match=r"`memory` is missing, expected \[2, 32\]"):
        load_backbone(model, source, prefix="encoder.", allow_unused=beyond_layers(1))
    assert torch.equal(model.encoder.layers[0].attention.wq.weight, before)


def test_tensor_without_a_parameter_is_an_error_unless_allowed(opened):
    source, _ = opened
    with pytest.raises(WeightsError, match=r"`layers.1.attention.wk.weight` has no place in the model"):
        load_backbone(
            one_layer_compressor(source.config), source, prefix="encoder.", skip=lambda name: name == "memory"
        )


def test_model_of_another_size_is_an_error(opened):
    source, _ = opened
    with pytest.raises(WeightsError, match=r"layers.\{0-1\}..*w1.weight` is \[96, 32\], expected \[64, 32\]"):
        load_backbone(Decoder(tiny.tiny_config(ffn_size=64)), source)


def test_copy_does_not_broadcast():
    parameter = nn.Parameter(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="cannot hold a tensor"):
        copy_into(parameter, torch.ones(2))
    copy_into(parameter, torch.ones(3, 2, dtype=torch.bfloat16))
    assert torch.equal(parameter, torch.ones(3, 2))


def test_selected_tensors_are_renamed_and_cut_and_their_rows_are_read_alone() -> None:
    read: list[tuple[str, slice]] = []
    memory = torch.arange(16.0).view(8, 2)

    class Source:
        path = Path("memory")
        shapes: ClassVar = {"encoder.memory": (8, 2), "bridge.layer1.weight": (3, 2)}

        def tensor(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
            read.append((name, rows))
            return memory[rows]

    assert use_memory_tokens(Source(), 8).shapes == Source.shapes
    names = {"encoder.memory": "encoder.memory", "ports.4.bridge.layer1.weight": "bridge.layer1.weight"}
    source = use_memory_tokens(SelectedTensors(source=Source(), names=names), 5)
    assert source.shapes == {"encoder.memory": (5, 2), "ports.4.bridge.layer1.weight": (3, 2)}
    assert torch.equal(source.tensor("encoder.memory"), memory[:5])
    for rows in (slice(3, 5), slice(3, 9), slice(0, 2)):
        assert torch.equal(source.tensor("encoder.memory", rows), memory[:5][rows]), rows
    source.tensor("ports.4.bridge.layer1.weight", slice(1, 2))
    assert read[-1] == ("bridge.layer1.weight", slice(1, 2))
    assert read[1] == ("encoder.memory", slice(3, 5, 1))


@pytest.mark.parametrize("rank", range(3))
def test_a_rank_reads_the_rows_of_its_partition_and_leaves_the_padding(rank: int) -> None:
    """Five rows of two values in three partitions of four: the second begins and ends at rows, the last has padding."""
    values, read = torch.arange(10.0).reshape(5, 2), []
    source = SimpleNamespace(tensor=lambda name, rows: (read.append(rows), values[rows])[1])
    partition = torch.full((4,), -1.0)
    parameter = SimpleNamespace(
        ds_numel=10, ds_shape=(5, 2), ds_tensor=partition, ds_zero_partition_rank=rank, ds_secondary_tensor=None
    )
    assert _fill_partitions(parameter, source, "w") == values[read[0]].nbytes
    assert read == [[slice(0, 2), slice(2, 4), slice(4, 5)][rank]]
    assert partition.tolist() == [[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0], [8.0, 9.0, -1.0, -1.0]][rank]
