"""The trained and frozen parameters in the ZeRO-3 shards of any number of ranks, read in blocks by one process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arc_ds.checkpoints.checkpoint import reading
from arc_ds.checkpoints.reshard import piece_numel, shard_file
from arc_ds.checkpoints.torch_file import StoredTensor, read_torch_file
from arc_ds.errors import CheckpointError, words_of
from arc_ds.model.weights.lazy_tensor import LazyTensor


def open_parameters(checkpoint: Path, world_size: int) -> dict[str, LazyTensor]:
    """The parameters of a ZeRO-3 checkpoint by name, as float32. No values are read.

    Trained parameters are the optimizer's float32 weights. Frozen ones are those of the model. A parameter with several
    names, such as a tied head, appears under each of them.

    world_size: number of ranks that wrote the checkpoint.

    Raises CheckpointError if a file is missing or damaged, or if it is not of ZeRO-3. Reading a tensor raises
    CheckpointRemoved if the checkpoint has vanished.
    """
    try:
        return _parameters(checkpoint, world_size)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"the shards in {checkpoint} do not have the layout of a ZeRO-3 engine ({words_of(error)}). Export another "
            "checkpoint of the run."
        ) from error


def _parameters(checkpoint: Path, world_size: int) -> dict[str, LazyTensor]:
    model_states = [read_torch_file(shard_file(checkpoint, rank, "model")) for rank in range(world_size)]
    flat_groups = [_flat_groups(checkpoint, rank) for rank in range(world_size)]
    parameters: dict[str, LazyTensor] = {}
    for idx, shapes in enumerate(_entry(checkpoint, model_states[0], "param_shapes")):
        offset, groups = 0, [groups[idx] for groups in flat_groups]
        for name, shape in shapes.items():
            parameters[name] = _joined(checkpoint, groups, offset, shape)
            offset += piece_numel(math.prod(shape), world_size)
        if any(math.prod(group.shape) != offset for group in groups):
            sizes = [math.prod(group.shape) for group in groups]
            raise CheckpointError(
                f"{checkpoint}: sub-group {idx} has {sizes} elements on its ranks, expected {offset}."
            )
    for name, shape in (model_states[0].get("frozen_param_shapes") or {}).items():
        pieces = [state["frozen_param_fragments"][name] for state in model_states]
        if any(math.prod(piece.shape) < piece_numel(math.prod(shape), world_size) for piece in pieces):
            raise ValueError(f"the pieces of {name} are smaller than its shape {list(shape)} on {world_size} ranks")
        parameters[name] = _joined(checkpoint, pieces, 0, shape)
    for name, other in (model_states[0].get("shared_params") or {}).items():
        parameters[name] = parameters[other]
    return parameters


def _joined(checkpoint: Path, pieces: Sequence[StoredTensor], offset: int, shape: Sequence[int]) -> LazyTensor:
    """A parameter from its pieces on all ranks. Each piece begins at `offset` of its tensor."""
    size = piece_numel(math.prod(shape), len(pieces))

    def read(start: int, stop: int) -> Tensor:
        parts = []
        with reading(checkpoint):
            for rank in range(start // size, -(-stop // size)):
                first, last = max(start - rank * size, 0), min(stop - rank * size, size)
                parts.append(pieces[rank].read(offset + first, offset + last))
        values = parts[0] if len(parts) == 1 else torch.cat(parts)
        return values.float()

    return LazyTensor(shape=tuple(shape), dtype=torch.float32, read=read)


def _flat_groups(checkpoint: Path, rank: int) -> Sequence[StoredTensor]:
    """The float32 weights of a rank, one flat tensor for each sub-group."""
    states = read_torch_file(shard_file(checkpoint, rank, "optim"))
    return _entry(checkpoint, _entry(checkpoint, states, "optimizer_state_dict"), "fp32_flat_groups")


def _entry(checkpoint: Path, states: Any, key: str) -> Any:
    if key not in states:
        raise CheckpointError(f"{checkpoint} lacks {key!r}: it was not written by a ZeRO-3 engine.")
    return states[key]
