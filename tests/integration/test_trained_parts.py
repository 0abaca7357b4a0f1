"""Runs on two ranks that train adapters or bridges only: checkpoints, resume, and exports with an ordinary encoder.

One of the two decoders has adapters, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from arc_ds.checkpoints.shards import SavedParameter, open_shards
from arc_ds.errors import CheckpointError
from arc_ds.export.consolidate import consolidate, consolidate_newest, find_checkpoint
from arc_ds.model.weights import open_backbone
from arc_ds.model.weights.lazy_tensor import as_lazy
from tests.helpers.tiny_run import losses, numbers_by_step, train_on_ranks, write_inputs

pytestmark = pytest.mark.distributed

SHORT = [
    "steps=4",
    "optimizer.warmup_steps=1",
    "checkpoint.every=2",
    "validation.every=0",
    "validation.num_samples=4",
]
LORA = ["encoder.lora.rank=2", "encoder.lora.alpha=8", "encoder.activation_checkpointing=selective"]
SCALE = 4  # alpha / rank
DECODER_LORA = ["decoders.0.lora.rank=2", "decoders.0.lora.alpha=8"]
DECODERS = [*DECODER_LORA, "decoders.0.activation_checkpointing=selective", "decoders.1.activation_checkpointing=true"]


def _encoder_changes(run: Path, backbone: Path) -> dict[str, Tensor]:
    """Exported minus original weights of the encoder, by name."""
    trained = consolidate(find_checkpoint(run)).tensors
    source = open_backbone(backbone, "checkpoint")
    names = [name for name in trained if name.startswith("encoder.")]
    assert len(names) == 1 + 2 * 9, names  # embeddings, and nine tensors of each of the two layers
    return {n: as_lazy(trained[n]).whole() - source.tensor(n.removeprefix("encoder.")).float() for n in names}


def _decoder_adapters(run: Path) -> dict[str, Tensor]:
    tensors = consolidate(find_checkpoint(run)).tensors
    return {name: as_lazy(tensor).whole() for name, tensor in tensors.items() if ".adapters." in name}


def _product(adapters: Mapping[str, SavedParameter], weight: str) -> Tensor:
    """B A of the adapter of a weight."""
    prefix = weight.removesuffix("weight") + "adapter"
    b, a = (adapters[f"{prefix}.{part}"] for part in "ba")
    return b.read(0, math.prod(b.shape)).view(b.shape) @ a.read(0, math.prod(a.shape)).view(a.shape)


def test_adapters_are_saved_resumed_and_merged_into_an_ordinary_encoder(tmp_path: Path) -> None:
    config = write_inputs(tmp_path)
    code, console = train_on_ranks(config, [*SHORT, *LORA, *DECODERS, "decoders.0.placement=zero3"])
    assert code == 0, console
    changes = _encoder_changes(tmp_path / "run", tmp_path / "encoder")
    adapters = open_shards(find_checkpoint(tmp_path / "run"), 2).trained
    for name, change in changes.items():
        if change.dim() == 2 and name != "encoder.tok_embeddings.weight":
            assert torch.linalg.matrix_rank(change, atol=1e-6, rtol=0) == 2, name
            assert torch.allclose(change, SCALE * _product(adapters, name), rtol=0, atol=1e-6), name
        else:
            assert not change.any(), name
    half = tmp_path / "run" / "checkpoints" / "step_000002"
    with pytest.raises(CheckpointError, match="adapters of a decoder.*without --average"):
        consolidate_newest(tmp_path / "run", 2)
    mean = consolidate_newest(tmp_path / "run", 2, decoders=["other"])[1].tensors
    steps = [consolidate(half.with_name(name)).tensors for name in ("step_000002", "step_000004")]
    for name in changes:  # of the merged weights, not of the adapters
        expected = torch.lerp(*(as_lazy(step[name]).whole() for step in steps), 0.5)
        assert torch.equal(as_lazy(mean[name]).whole(), expected), name
    branch = tmp_path / "branch"
    code, console = train_on_ranks(config, [*SHORT, *LORA, *DECODERS, f"run_dir={branch}", f"checkpoint.resume={half}"])
    assert code == 0, console
    resumed = [numbers["train/loss"] for step, numbers in sorted(numbers_by_step(branch).items()) if step > 2]
    assert resumed == losses(tmp_path / "run")[2:]
    for name, change in _encoder_changes(branch, tmp_path / "encoder").items():
        assert torch.equal(change, changes[name]), name
    first, last, again = (_decoder_adapters(run) for run in (half, tmp_path / "run", branch))
    assert {name.split(".")[1] for name in last} == {"0"} and len(last) == 2 * 7  # decoder 1 has none
    for name, tensor in last.items():
        assert torch.equal(again[name], tensor) and not torch.equal(first[name], tensor), name
    assert "still gathered" not in console


def test_train_bridge_is_the_old_keys_and_leaves_the_encoder_equal_to_the_bit(tmp_path: Path) -> None:
    config = write_inputs(tmp_path)
    code, console = train_on_ranks(config, [*SHORT, "encoder.train=bridge"])
    assert code == 0, console
    assert not any(change.any() for change in _encoder_changes(tmp_path / "run", tmp_path / "encoder").values())
    old = ["encoder.trained_layers=0", "encoder.train_embeddings=false", f"run_dir={tmp_path / 'old'}"]
    code, console = train_on_ranks(config, [*SHORT, *old])
    assert code == 0, console
    assert losses(tmp_path / "run") == losses(tmp_path / "old") and len(set(losses(tmp_path / "old"))) == 4
