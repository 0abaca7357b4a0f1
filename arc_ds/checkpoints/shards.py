"""The trained state in a checkpoint: float32 weights and Adam's moments, in the ZeRO-3 pieces of the ranks.

    shard_00000.safetensors ...   flat tensors of each rank: `0.master`, `0.exp_avg`, `0.exp_avg_sq`, `1.master`, ...
    shards.json                   parameters of each sub-group, its step count, DeepSpeed's counters

ZeRO-3 splits each parameter of n elements over w ranks into pieces of ceil(n / w) and pads the last one. A flat tensor
holds the pieces of a sub-group's parameters, one after another. The optimizer has no moments of a sub-group that no
step has trained. Hyperparameters are not saved: they follow from the config and the step (`PortAdamW.prepare`).

Earlier checkpoints hold DeepSpeed's own files, pickles with the same layout. They are read without running the pickle
(`torch_file.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from arc_ds.checkpoints.manifest import is_count, read_json, seal_file
from arc_ds.checkpoints.torch_file import StoredTensor, read_torch_file
from arc_ds.errors import CheckpointError, words_of
from arc_ds.model.weights.lazy_tensor import LazyTensor, write_safetensors
from arc_ds.model.weights.names import Shape
from arc_ds.system.checksums import FileEntry
from arc_ds.system.files import sync

INDEX_NAME = "shards.json"
MASTER = "master"
_MOMENTS = {"exp_avg", "exp_avg_sq", "step"}  # AdamW's states of a sub-group that a step has trained
COUNTERS = ("global_steps", "global_samples", "skipped_steps")  # attributes of DeepSpeed's engine


@dataclass(frozen=True, kw_only=True)
class EngineState:
    """The trained state of an engine on one rank.

    sub_groups: for each sub-group of parameters, which the optimizer updates together, the shapes of its whole
        parameters by name, in the order of their pieces. The same on all ranks.
    counters: DeepSpeed's counts of steps and samples.
    tensors: flat float32 tensors, and scalars such as Adam's step count, by `{sub-group}.{state}`.
    """

    sub_groups: Sequence[Mapping[str, Shape]]
    counters: Mapping[str, int]
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class SavedParameter:
    """A parameter in a checkpoint. Values are read when they are asked for.

    shape: shape of the whole parameter.
    flats: the flat tensors of all ranks, in rank order, by state (`MASTER`, `exp_avg`, `exp_avg_sq`).
    offset: where its piece begins in a flat tensor.
    scalars: states that are one number for all elements (`step`).
    """

    shape: Shape
    flats: Mapping[str, Sequence[StoredTensor]]
    offset: int = 0
    scalars: Mapping[str, float] = field(default_factory=dict)

    def read(self, start: int, stop: int, state: str = MASTER) -> Tensor:
        """Read the flat values `start` to `stop` of the whole parameter, as float32."""
        flats = self.flats[state]
        size = piece_numel(math.prod(self.shape), len(flats))
        parts = []
        for rank in range(start // size, -(-stop // size)):
            first, last = max(start - rank * size, 0), min(stop - rank * size, size)
            parts.append(flats[rank].read(self.offset + first, self.offset + last))
        values = parts[0] if len(parts) == 1 else torch.cat(parts)
        return values.float()

    def piece(self, state: str, *, rank: int, world_size: int) -> Tensor:
        """Read the piece of a rank of any world size: float32 [ceil(numel / world_size)], padded with zeros."""
        numel = math.prod(self.shape)
        size = piece_numel(numel, world_size)
        start, stop = min(rank * size, numel), min((rank + 1) * size, numel)
        result = torch.zeros(size)
        if start < stop:
            result[: stop - start] = self.read(start, stop, state)
        return result


@dataclass(frozen=True, kw_only=True)
class SavedShards:
    """The trained state of all ranks in a checkpoint.

    trained: the trained parameters by name.
    counters: see `EngineState`.
    others: frozen parameters, and further names of trained ones. Only earlier checkpoints have them.
    """

    trained: Mapping[str, SavedParameter]
    counters: Mapping[str, int]
    others: Mapping[str, SavedParameter] = field(default_factory=dict)


def piece_numel(numel: int, world_size: int) -> int:
    """Number of elements of a parameter's piece, with padding."""
    return -(-numel // world_size)


def write_shards(folder: Path, rank: int, state: EngineState) -> list[FileEntry]:
    """Write a rank's part of the state, durably, and return its files. Rank 0 also writes the index."""
    path = folder / f"shard_{rank:05d}.safetensors"
    flats = {name: _in_blocks(tensor) for name, tensor in state.tensors.items() if tensor.dim()}
    digest = write_safetensors(path, flats)
    sync(path)
    files = [FileEntry(path=path.name, size=path.stat().st_size, xxh128=digest)]
    if rank == 0:
        scalars = {name: float(tensor) for name, tensor in state.tensors.items() if not tensor.dim()}
        index = {
            "counters": dict(state.counters),
            "sub_groups": [
                {"shapes": dict(shapes), "scalars": _of_sub_group(scalars, idx)}
                for idx, shapes in enumerate(state.sub_groups)
            ],
        }
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        files.append(seal_file(folder, folder / INDEX_NAME))
    return files


def _in_blocks(flat: Tensor) -> LazyTensor:
    """A flat tensor on any device, which goes to the host in blocks."""
    return LazyTensor(shape=tuple(flat.shape), dtype=flat.dtype, read=lambda start, stop: flat[start:stop].cpu())


def open_shards(checkpoint: Path, world_size: int) -> SavedShards:
    """Open the trained state of a checkpoint. No values are read, and no pickle is run.

    world_size: number of ranks that wrote the checkpoint.

    Raises CheckpointError if a file is missing or damaged, or has another layout.
    """
    try:
        if (checkpoint / INDEX_NAME).is_file():
            return _open(checkpoint, world_size)
        return _open_deepspeed(checkpoint, world_size)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise CheckpointError(
            f"the shards in {checkpoint} do not have the layout of a ZeRO-3 engine ({words_of(error)}). Use another "
            "checkpoint of the run."
        ) from error


def _open(checkpoint: Path, world_size: int) -> SavedShards:
    index = read_json(checkpoint / INDEX_NAME)
    files = [_stored_tensors(checkpoint / f"shard_{rank:05d}.safetensors") for rank in range(world_size)]
    trained: dict[str, SavedParameter] = {}
    for idx, group in enumerate(index["sub_groups"]):
        flats = {state: [file[f"{idx}.{state}"] for file in files] for state in _of_sub_group(files[0], idx)}
        scalars = {state: float(value) for state, value in group["scalars"].items()}
        trained |= _cut(checkpoint, idx, group["shapes"], flats, scalars)
    return SavedShards(trained=trained, counters={name: int(index["counters"][name]) for name in COUNTERS})


def _stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """The float32 tensors of a safetensors file."""
    try:
        with path.open("rb") as file:
            start, end = 8 + int.from_bytes(file.read(8), "little"), path.stat().st_size
            if start > end:
                raise ValueError(f"{path.name} has a header of {start} bytes, but {end} bytes in all")
            header = json.loads(file.read(start - 8))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}. Use another checkpoint of the run.") from error
    found = {}
    for name, entry in header.items():
        shape, (first, last) = _shape(entry["shape"]), _shape(entry["data_offsets"])
        if entry["dtype"] != "F32" or last - first != 4 * math.prod(shape) or start + last > end:
            raise ValueError(f"`{name}` in {path.name} is no float32 tensor inside the file")
        found[name] = StoredTensor(path, start + first, torch.float32, shape)
    return found


def _shape(sizes: Any) -> Shape:
    """The sizes in a file as a shape. Raises ValueError if one of them is not a count."""
    shape = tuple(sizes)
    if not all(map(is_count, shape)):
        raise ValueError(f"the sizes {list(shape)} are no counts")
    return shape


def _open_deepspeed(checkpoint: Path, world_size: int) -> SavedShards:
    model_state = read_torch_file(_deepspeed_file(checkpoint, 0, "model"))
    states = [read_torch_file(_deepspeed_file(checkpoint, rank, "optim")) for rank in range(world_size)]
    optimizers = [each["optimizer_state_dict"] for each in states]
    masters = [each["fp32_flat_groups"] for each in optimizers]
    trained: dict[str, SavedParameter] = {}
    for idx, shapes in enumerate(model_state["param_shapes"]):
        per_rank = [each["optimizer_state_dict"]["state"].get(idx, {}) for each in optimizers]
        flats: dict[str, list[StoredTensor]] = {MASTER: [flat[idx] for flat in masters]}
        scalars: dict[str, float] = {}
        for state, value in per_rank[0].items():
            if isinstance(value, StoredTensor) and value.shape:
                flats[state] = [each[state] for each in per_rank]
            else:
                scalars[state] = float(value.read(0, 1)) if isinstance(value, StoredTensor) else float(value)
        trained |= _cut(checkpoint, idx, shapes, flats, scalars)
    others: dict[str, SavedParameter] = {}
    if frozen := model_state.get("frozen_param_shapes"):
        more = [read_torch_file(_deepspeed_file(checkpoint, rank, "model")) for rank in range(1, world_size)]
        for name, shape in frozen.items():
            pieces = [state["frozen_param_fragments"][name] for state in (model_state, *more)]
            if any(math.prod(piece.shape) < piece_numel(math.prod(shape), world_size) for piece in pieces):
                raise ValueError(f"the pieces of {name} are smaller than its shape {list(shape)} on {world_size} ranks")
            others[name] = SavedParameter(shape=shape, flats={MASTER: pieces})
    for name, other in (model_state.get("shared_params") or {}).items():
        others[name] = trained[other]
    counters = {name: int(model_state[name]) for name in COUNTERS if name in model_state}
    return SavedShards(trained=trained, counters=counters, others=others)


def _deepspeed_file(checkpoint: Path, rank: int, kind: Literal["model", "optim"]) -> Path:
    pattern = f"*zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt"
    files = list(checkpoint.glob(pattern))
    if len(files) != 1:
        raise CheckpointError(
            f"{checkpoint} has neither {INDEX_NAME} nor DeepSpeed's shards of ZeRO-3: it has {len(files)} files "
            f"{pattern}. Use another checkpoint of the run."
        )
    return files[0]


def _cut(
    checkpoint: Path,
    idx: int,
    shapes: Mapping[str, Sequence[int]],
    flats: Mapping[str, Sequence[StoredTensor]],
    scalars: Mapping[str, float],
) -> dict[str, SavedParameter]:
    """The parameters of a sub-group."""
    found, offset = {}, 0
    if {*flats, *scalars} - {MASTER} not in (set(), _MOMENTS) or not all(each >= 0 for each in scalars.values()):
        raise ValueError(f"sub-group {idx} has {', '.join(flats)} and {dict(scalars)}, expected the states of AdamW")
    for name, sizes in shapes.items():
        shape = _shape(sizes)
        found[name] = SavedParameter(shape=shape, flats=flats, offset=offset, scalars=scalars)
        offset += piece_numel(math.prod(shape), len(flats[MASTER]))
    for state, of_ranks in flats.items():
        numels = [math.prod(flat.shape) for flat in of_ranks]
        if any(numel != offset for numel in numels):
            raise CheckpointError(
                f"{checkpoint}: {state} of sub-group {idx} has {numels} elements on its ranks, expected {offset}. Use "
                "another checkpoint of the run."
            )
    return found


def _of_sub_group(names: Mapping[str, Any], idx: int) -> dict[str, Any]:
    """The entries of a sub-group by state."""
    prefix = f"{idx}."
    return {name.removeprefix(prefix): names[name] for name in names if name.startswith(prefix)}
