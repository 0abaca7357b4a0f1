"""Load a ZeRO-3 checkpoint on another number of ranks than wrote it.

DeepSpeed offers its universal checkpoint for this, a conversion on disk. Its ZeRO-3 reader copies the hyperparameters
of the first parameter group to all groups, and the step count of the first state to all states. Both are wrong here:
parameter groups differ in weight decay, and a bridge that some steps do not use has a lower step count. This module
therefore reshards in memory.

ZeRO-3 splits each parameter of n elements over w ranks into pieces of ceil(n / w) and pads the last one. The file of a
rank holds the concatenated pieces of each sub-group.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as torch_dist
from torch import Tensor

from arc_ds.errors import CheckpointError

_MASTER = "master"


@dataclass(frozen=True, kw_only=True)
class _Place:
    """The location of a parameter in the shards.

    sub_group: index of the sub-group.
    offset: first element of the parameter's piece within the sub-group.
    numel: number of elements of the whole parameter.
    """

    sub_group: int
    offset: int
    numel: int


@dataclass(frozen=True, kw_only=True)
class _Shards:
    """The optimizer files of all ranks that wrote the checkpoint, memory-mapped."""

    per_rank: tuple[Mapping[str, Any], ...]
    places: Mapping[str, _Place]

    def pieces(self, name: str, key: str) -> list[Tensor]:
        """The pieces of one state (`_MASTER`: the fp32 weights) of a parameter on the old ranks, as unread views."""
        place = self.places[name]
        size = piece_numel(place.numel, len(self.per_rank))
        flats = (
            file["fp32_flat_groups"][place.sub_group]
            if key == _MASTER
            else file["optimizer_state_dict"]["state"][place.sub_group][key]
            for file in self.per_rank
        )
        return [flat.narrow(0, place.offset, size) for flat in flats]


def cut_anew(pieces: Sequence[Tensor], numel: int, *, rank: int, world_size: int) -> Tensor:
    """Build the piece of `rank` for a world of `world_size` ranks.

    pieces: the pieces of the old ranks, [ceil(numel / old world size)] each.

    Returns a new tensor [ceil(numel / world_size)]; padding after `numel` is zero.
    """
    old, new = piece_numel(numel, len(pieces)), piece_numel(numel, world_size)
    result = pieces[0].new_zeros(new)
    start, end = min(rank * new, numel), min((rank + 1) * new, numel)
    position = start
    while position < end:
        source, within = divmod(position, old)
        count = min(old - within, end - position)
        result[position - start :][:count] = pieces[source][within : within + count]
        position += count
    return result


def piece_numel(numel: int, world_size: int) -> int:
    return -(-numel // world_size)


def shard_file(checkpoint: Path, rank: int, kind: Literal["model", "optim"]) -> Path:
    """A file of a rank. Raises CheckpointError if it is missing."""
    pattern = f"*zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt"
    files = list(checkpoint.glob(pattern))
    if len(files) != 1:
        raise CheckpointError(f"{checkpoint} has {len(files)} files {pattern}, but a ZeRO-3 engine writes one.")
    return files[0]


def load_resharded(engine: Any, path: Path, written_by: int) -> None:
    """Load a whole ZeRO-3 checkpoint of `written_by` ranks into an engine of another world size. A collective.

    Weights and optimizer states stay bit-exact. Each parameter group keeps its own hyperparameters and step count.

    Raises CheckpointError if engine or checkpoint is not ZeRO-3, or if names, shapes or groups differ.
    """
    if engine.zero_optimization_stage() != 3:
        raise CheckpointError(
            f"{path} was written by {written_by} ranks, but this run has {torch_dist.get_world_size()}; only ZeRO "
            f"stage 3 can change the number of ranks (this engine has stage {engine.zero_optimization_stage()}). "
            f"Start {written_by} ranks, or use a stage-3 DeepSpeed config from the start."
        )
    model_states = [_read(shard_file(path, rank, "model")) for rank in range(written_by)]
    model_state = model_states[0]
    shards = _open_shards(path, written_by, model_state["param_shapes"])
    _check_same_parameters(path, engine, shards)
    optimizer = engine.optimizer
    optimizer.checkpoint_event_prologue()
    # DeepSpeed reads its own rank's entry from a list over all ranks.
    states: list[Any] = [None] * torch_dist.get_world_size()
    states[torch_dist.get_rank()] = _state_of_rank(path, engine, shards)
    optimizer.load_state_dict(state_dict_list=states)
    _load_frozen(engine, model_states)
    optimizer.checkpoint_event_epilogue()
    _load_buffers(engine, model_state)
    engine.global_steps = model_state["global_steps"]
    engine.global_samples = model_state["global_samples"]
    engine.skipped_steps = model_state["skipped_steps"]


def _open_shards(path: Path, written_by: int, param_shapes: Sequence[Mapping[str, Any]]) -> _Shards:
    """param_shapes: shapes of the parameters by name, for each sub-group."""
    files = (_read(shard_file(path, rank, "optim")) for rank in range(written_by))
    per_rank = tuple(file["optimizer_state_dict"] for file in files)
    places = {}
    for sub_group, shapes in enumerate(param_shapes):
        offset = 0
        for name, shape in shapes.items():
            numel = torch.Size(shape).numel()
            places[name] = _Place(sub_group=sub_group, offset=offset, numel=numel)
            offset += piece_numel(numel, written_by)
        found = per_rank[0]["fp32_flat_groups"][sub_group].numel()
        if found != offset:
            raise CheckpointError(f"{path}: sub-group {sub_group} has {found} elements a rank, expected {offset}.")
    return _Shards(per_rank=per_rank, places=places)


def _read(file: Path) -> Any:
    # This is a pickle. The caller has verified the folder's manifest.
    return torch.load(file, map_location="cpu", mmap=True, weights_only=False)


def _check_same_parameters(path: Path, engine: Any, shards: _Shards) -> None:
    trained = itertools.chain(*engine.optimizer.fp16_groups)
    expected = {engine.param_names[param]: param.ds_numel for param in trained}
    found = {name: place.numel for name, place in shards.places.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"{path} does not fit this run's model: {len(wrong)} trained parameters differ. The first is {name}: "
            f"expected {expected.get(name, 'none')} elements, found {found.get(name, 'none')}. Use the config that "
            "wrote the checkpoint, or another run_dir."
        )


def _state_of_rank(path: Path, engine: Any, shards: _Shards) -> dict[str, Any]:
    """The optimizer state of this rank, in the layout that DeepSpeed would have written for this world size."""
    saved = shards.per_rank[0]
    masters: list[Tensor] = []
    states: dict[int, dict[str, Any]] = {}
    for new_id, params in enumerate(engine.optimizer.fp16_groups):
        names = [engine.param_names[param] for param in params]
        masters.append(_joined(shards, names, _MASTER))
        old_id = shards.places[names[0]].sub_group
        old_state = saved["optimizer_state_dict"]["state"].get(old_id, {})
        states[new_id] = {
            key: _joined(shards, names, key) if _is_flat(value, saved, old_id) else value
            for key, value in old_state.items()
        }
    param_groups = _param_groups(path, engine, saved["optimizer_state_dict"]["param_groups"])
    return {
        **saved,
        "partition_count": torch_dist.get_world_size(),
        "optimizer_state_dict": {"state": states, "param_groups": param_groups},
        "fp32_flat_groups": masters,
    }


def _joined(shards: _Shards, names: list[str], key: str) -> Tensor:
    return torch.cat([_own_piece(shards.pieces(name, key), shards.places[name].numel) for name in names])


def _own_piece(pieces: Sequence[Tensor], numel: int) -> Tensor:
    return cut_anew(pieces, numel, rank=torch_dist.get_rank(), world_size=torch_dist.get_world_size())


def _is_flat(value: Any, saved: Mapping[str, Any], sub_group: int) -> bool:
    """Whether an optimizer state has one value per element (a moment) rather than one for all (a step count)."""
    return torch.is_tensor(value) and value.dim() > 0 and value.numel() == saved["fp32_flat_groups"][sub_group].numel()


def _param_groups(path: Path, engine: Any, saved_groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The hyperparameters of the saved groups, assigned to this engine's sub-groups."""
    group_of = engine.optimizer.sub_group_to_group_id
    num_groups = len(engine.optimizer.optimizer.param_groups)
    if num_groups != len(saved_groups):
        raise CheckpointError(f"{path} has {len(saved_groups)} parameter groups, but the optimizer has {num_groups}.")
    sub_groups = range(len(engine.optimizer.fp16_groups))
    return [
        {**group, "params": [sub_group for sub_group in sub_groups if group_of[sub_group] == index]}
        for index, group in enumerate(saved_groups)
    ]


def _load_frozen(engine: Any, model_states: Sequence[Mapping[str, Any]]) -> None:
    """Load frozen parameters. They are stored next to the module's state and are split in the same way."""
    params = {engine.param_names[param]: param for param in engine.module.parameters()}
    for name in model_states[0]["frozen_param_fragments"] or {}:
        pieces = [state["frozen_param_fragments"][name] for state in model_states]
        params[name].ds_tensor.data.copy_(_own_piece(pieces, params[name].ds_numel))


def _load_buffers(engine: Any, model_state: Mapping[str, Any]) -> None:
    buffers = dict(engine.module.named_buffers())
    for name in model_state["buffer_names"]:
        if name in buffers:
            buffers[name].copy_(model_state["module"][name])
