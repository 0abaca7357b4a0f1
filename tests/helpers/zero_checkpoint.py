"""Checkpoints in DeepSpeed's layout, as earlier versions saved them, with given weights. Made without DeepSpeed."""

from __future__ import annotations

from pathlib import Path

from bench_export import write_checkpoint
from torch import Tensor
from torch.nn.functional import pad

from arc_ds.checkpoints.manifest import MANIFEST_NAME, Manifest, seal_file, write_manifest
from arc_ds.export.consolidate import TrainedCompressor


def write_zero_checkpoint(
    run: Path, trained: TrainedCompressor, world_size: int, *, step: int = 1, frozen: tuple[str, ...] = ()
) -> Path:
    """Write the tensors of a compressor as `world_size` ranks would. See `tools/bench_export.py`."""

    def piece(name: str, numel: int, rank: int) -> Tensor:
        flat = trained.tensors[name].reshape(-1)
        return pad(flat, (0, numel * world_size - flat.numel()))[rank * numel : (rank + 1) * numel].clone()

    return write_checkpoint(run, trained.spec, world_size, piece, step=step, frozen=frozen)


def seal(folder: Path, *, step: int, world_size: int) -> None:
    """Write the manifest of a checkpoint, as of its files now."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST_NAME]
    files = tuple(seal_file(folder, path) for path in paths)
    write_manifest(folder, Manifest(step=step, world_size=world_size, files=files))
