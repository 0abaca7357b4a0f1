"""`arc-ds export` of real ZeRO-3 shards: two ranks train and save, a single process exports."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from arc_ds import ArcModel
from arc_ds.batch.packing import pack
from arc_ds.batch.segments import Sample, Segment
from arc_ds.checkpoints.checkpoint import TrainerState
from arc_ds.checkpoints.shards import MASTER, open_shards
from arc_ds.checkpoints.writer import CheckpointWriter
from arc_ds.cli import main
from arc_ds.config.schema import OptimizerConfig
from arc_ds.export.consolidate import TrainedCompressor, consolidate, find_checkpoint
from arc_ds.export.formats import write_export
from arc_ds.inference.load import open_arc_folder
from arc_ds.model.spec import build_compressor
from arc_ds.tokenizers import load_tokenizer
from arc_ds.training.engine import build_engine, set_trained
from arc_ds.training.optim import PortAdamW, make_param_groups
from tests.helpers.distributed import run_on_ranks
from tests.helpers.tiny_export import tiny_trained
from tests.helpers.zero_checkpoint import frozen_from

DS_CONFIG = {
    "train_batch_size": 2,
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100},
}
CHANGES = {"num_layers": 2, "decoder_sizes": (48, 48)}


def filled_engine(run: Path) -> tuple[TrainedCompressor, Any]:
    """A compressor and an engine with its tensors; the first layer and the embeddings are frozen."""
    trained = tiny_trained(run / f"rank{dist.get_rank()}", **CHANGES)
    compressor = build_compressor(trained.spec)
    compressor.load_state_dict(dict(trained.tensors))
    set_trained(compressor.encoder, trained_layers=1, train_embeddings=False)
    groups = make_param_groups(
        compressor, OptimizerConfig(encoder_lr=1e-2, bridge_lr=1e-2, markers_lr=1e-2, weight_decay=0.0)
    )
    return trained, build_engine(compressor, PortAdamW(groups, betas=(0.9, 0.95), eps=1e-8), DS_CONFIG)


def save(run: Path, trained: TrainedCompressor, engine: Any, step: int) -> None:
    """Save a checkpoint of a run that started from `run/start`."""
    if dist.get_rank() == 0:
        write_export(trained, run / "start")
    dist.barrier()
    state = TrainerState(
        step=step,
        data_position=2 * step,
        data_fingerprint="data",
        config_hash="config",
        extra={
            "compressor": trained.spec.to_json(),
            "encoder_tokenizer": str(run / "rank0" / "tokenizer.model"),
            "decoders": [asdict(decoder) for decoder in trained.decoders],
            "tokenizers": {"encoder": load_tokenizer(trained.encoder_tokenizer).fingerprint},
            "decoder_ids": ["first", "second"],
            "max_context_tokens": 30,
            "frozen": frozen_from(run / "start"),
        },
    )
    CheckpointWriter(run / "checkpoints", keep_last=1, keep_every=0, asynchronous=False).save(engine, state)


def train_and_save(run: Path) -> dict[str, Tensor]:
    """Train two steps and save a checkpoint; return the engine's gathered parameters."""
    import deepspeed

    trained, engine = filled_engine(run)
    batch = pack([Sample("test", (Segment.context(range(dist.get_rank(), 30)),))], trained.spec.packing)
    for _ in range(2):
        engine.backward(engine(batch, 1).square().mean())
        engine.step()
    save(run, trained, engine, step=2)
    engine.save_checkpoint(str(run / "deepspeed"), tag="step_000002")
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return {name: p.detach().float().clone() for name, p in engine.module.named_parameters()}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A run's folder with one checkpoint from two ranks, and the parameters at that step."""
    run = tmp_path_factory.mktemp("run")
    return run, run_on_ranks(train_and_save, run)[0]


def test_joined_shards_are_the_engines_parameters(run_folder: tuple[Path, dict[str, Tensor]], tmp_path: Path, capsys):
    run, expected = run_folder
    trained = consolidate(find_checkpoint(run))
    assert trained.spec == tiny_trained(tmp_path, **CHANGES).spec
    assert trained.encoder_fingerprint == load_tokenizer(run / "rank0" / "tokenizer.model").fingerprint
    assert trained.decoder_ids == ("first", "second")
    assert trained.step == 2 and [decoder.name for decoder in trained.decoders] == ["decoder0", "decoder1"]
    assert trained.tensors.keys() == expected.keys()
    start = tiny_trained(tmp_path, **CHANGES).tensors
    for name, tensor in expected.items():
        found = trained.tensors[name].whole()
        assert torch.equal(found, tensor) and found.dtype == torch.float32, name
    moved = {name for name in expected if not torch.equal(expected[name], start[name])}
    assert "encoder.layers.1.attention.wq.weight" in moved and "ports.1.bridge.layer1.weight" in moved
    assert "encoder.layers.0.attention.wq.weight" not in moved and "encoder.tok_embeddings.weight" not in moved
    assert capsys.readouterr().out == "", "DeepSpeed's messages would mix with the command's output"


def test_joined_shards_are_what_deepspeed_itself_joins(run_folder: tuple[Path, dict[str, Tensor]]):
    """Of its own files, as earlier versions saved them."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    folder = run_folder[0] / "deepspeed"
    theirs = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag="step_000002")
    shards = open_shards(folder / "step_000002", 2)
    ours = {**shards.trained, **shards.others}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name].read(0, tensor.numel()), tensor.flatten()) for name, tensor in theirs.items())
    saved = open_shards(find_checkpoint(run_folder[0]), 2).trained
    for name, parameter in shards.trained.items():  # also the moments
        assert parameter.flats.keys() == saved[name].flats.keys() == {MASTER, "exp_avg", "exp_avg_sq"}
        assert parameter.scalars == saved[name].scalars == {"step": 2.0}
        for state in parameter.flats:
            values = [each.read(0, theirs[name].numel(), state) for each in (parameter, saved[name])]
            assert torch.equal(*values), (name, state)
            assert values[0].any() or name.startswith("ports."), (name, state)


def test_a_checkpoint_holds_12_bytes_for_each_trained_value(run_folder: tuple[Path, dict[str, Tensor]]):
    """And nothing of frozen ones. The names and random states of two ranks take less than 100 kB."""
    checkpoint = find_checkpoint(run_folder[0])
    frozen = ("encoder.layers.0.", "encoder.tok_embeddings.")
    trained = sum(t.numel() for name, t in run_folder[1].items() if not name.startswith(frozen))
    assert trained < sum(t.numel() for t in run_folder[1].values())
    assert 12 * trained <= sum(path.stat().st_size for path in checkpoint.iterdir()) <= 12 * trained + 100_000


@pytest.mark.parametrize("export_format", ["arc-ds", "arc"])
def test_the_command_writes_what_the_run_trained(
    run_folder: tuple[Path, dict[str, Tensor]], tmp_path: Path, capsys, export_format: str
):
    run, expected = run_folder
    out = tmp_path / "out"
    assert main(["export", str(run), str(out), "--format", export_format]) == 0
    assert "step 2" in capsys.readouterr().out
    source = open_arc_folder(out).tensors
    for name, tensor in expected.items():
        assert torch.equal(source.tensor(name), tensor), name
    model = ArcModel.from_checkpoint(out, decoders=[])
    assert model.max_context_tokens == 30
    assert model.compress(["the sea"], decoder=1)[0].shape[1] == 48
