"""Checkpoints in DeepSpeed's layout with given weights, made without DeepSpeed."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from arc_ds.checkpoints.reshard import cut_anew
from arc_ds.export.consolidate import TrainedCompressor
from tools.bench_export import write_checkpoint


def write_zero_checkpoint(
    run: Path, trained: TrainedCompressor, world_size: int, *, step: int = 1, frozen: tuple[str, ...] = ()
) -> Path:
    """Write the tensors of a compressor as `world_size` ranks would. See `tools.bench_export.write_checkpoint`."""

    def piece(name: str, numel: int, rank: int) -> Tensor:
        flat = trained.tensors[name].reshape(-1)
        own = cut_anew([flat], flat.numel(), rank=rank, world_size=world_size)
        assert own.numel() == numel
        return own

    return write_checkpoint(run, trained.spec, world_size, piece, step=step, frozen=frozen)
