"""Checkpoints with given weights, as a run writes them now and as earlier versions did. Made without DeepSpeed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from bench_export import Piece, shapes_of, state_of, write_checkpoint
from torch.nn.functional import pad

from arc_ds.checkpoints.checkpoint import TRAINER_NAME
from arc_ds.checkpoints.frozen_source import FrozenSource
from arc_ds.checkpoints.manifest import MANIFEST_NAME, Manifest, seal_file, write_manifest
from arc_ds.checkpoints.weight_digests import folder_digest
from arc_ds.export.consolidate import TrainedCompressor


def write_zero_checkpoint(
    run: Path,
    trained: TrainedCompressor,
    world_size: int,
    *,
    step: int = 1,
    frozen: tuple[str, ...] = (),
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write the tensors of a compressor as `world_size` ranks would. See `tools/bench_export.py`."""
    piece = _pieces(trained, world_size)
    return write_checkpoint(run, trained.spec, world_size, piece, step=step, frozen=frozen, extra=extra)


def write_deepspeed_checkpoint(
    run: Path, trained: TrainedCompressor, world_size: int, *, step: int = 1, frozen: tuple[str, ...] = ()
) -> Path:
    """Like `write_zero_checkpoint`, in DeepSpeed's files, which also hold the frozen weights."""
    folder = run / "checkpoints" / f"step_{step:06d}"
    folder.mkdir(parents=True)
    piece, shapes = _pieces(trained, world_size), shapes_of(trained.spec)
    frozen_shapes = {name: shape for name, shape in shapes.items() if name.startswith(frozen)}
    groups = [
        {name: s for name, s in shapes.items() if name.startswith("ports.") is is_port and name not in frozen_shapes}
        for is_port in (False, True)
    ]
    for rank in range(world_size):
        own = {name: piece(name, -(-shape.numel() // world_size), rank) for name, shape in shapes.items()}
        flat = [torch.cat([own[name] for name in group]) for group in groups]
        moments = {
            idx: {"step": torch.tensor(float(step)), "exp_avg": 0.1 * group, "exp_avg_sq": group.square()}
            for idx, group in enumerate(flat)
        }
        optimizer = {"optimizer_state_dict": {"state": moments, "param_groups": []}, "fp32_flat_groups": flat}
        torch.save({"optimizer_state_dict": optimizer}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        model = {
            "param_shapes": groups,
            "frozen_param_shapes": frozen_shapes,
            "frozen_param_fragments": {name: own[name] for name in frozen_shapes},
            "shared_params": {},
        }
        torch.save(model, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
    (folder / TRAINER_NAME).write_text(json.dumps(asdict(state_of(run, trained.spec, step, {}))))
    seal(folder, step=step, world_size=world_size)
    return folder


def frozen_from(start: Path) -> dict[str, Any]:
    """The record of a run that started from an export and did not train all of its encoder."""
    source = FrozenSource(
        key="encoder.init_from",
        path=str(start),
        digest=folder_digest(start),
        backbone="",
        rope_scaling="checkpoint",
        dtype="float32",
    )
    return asdict(source)


def _pieces(trained: TrainedCompressor, world_size: int) -> Piece:
    def piece(name: str, numel: int, rank: int) -> torch.Tensor:
        flat = trained.tensors[name].reshape(-1)
        return pad(flat, (0, numel * world_size - flat.numel()))[rank * numel : (rank + 1) * numel].clone()

    return piece


def seal(folder: Path, *, step: int, world_size: int) -> None:
    """Write the manifest of a checkpoint, as of its files now."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST_NAME]
    files = tuple(seal_file(folder, path) for path in paths)
    write_manifest(folder, Manifest(step=step, world_size=world_size, files=files))
