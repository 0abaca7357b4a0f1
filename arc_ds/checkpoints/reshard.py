"""The trained state of a ZeRO-3 engine: take it for a checkpoint, and restore it from one of any number of ranks.

DeepSpeed's own files are pickles, and hold frozen weights. Its universal checkpoint, which changes the number of ranks,
gives the hyperparameters and the step count of the first parameter group to all groups. So its state is read from and
written to the engine here, in memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from arc_ds.checkpoints.shards import COUNTERS, MASTER, EngineState, SavedShards
from arc_ds.errors import CheckpointError
from arc_ds.model.weights.names import Shape
from arc_ds.system import dist


def engine_state(engine: Any) -> EngineState:
    """The trained state on this rank, without a copy: the tensors are the engine's own."""
    optimizer = engine.optimizer
    tensors: dict[str, Tensor] = {}
    for idx, master in enumerate(optimizer.fp32_partitioned_groups_flat):
        states = {MASTER: master, **optimizer.optimizer.state.get(master, {})}
        tensors |= {f"{idx}.{state}": torch.as_tensor(value).detach() for state, value in states.items()}
    return EngineState(
        sub_groups=[_shapes(engine, params) for params in optimizer.fp16_groups],
        counters={name: int(getattr(engine, name)) for name in COUNTERS},
        tensors=tensors,
    )


def _shapes(engine: Any, params: Iterable[Any]) -> dict[str, Shape]:
    """Shapes of whole parameters by name."""
    return {engine.param_names[param]: tuple(param.ds_shape) for param in params}


def restore_engine(engine: Any, shards: SavedShards, source: object) -> None:
    """Restore weights, optimizer and counters of a fresh engine. Values stay bit-exact. Collective.

    Parameters in the engine's dtype are the rounded float32 weights. Frozen parameters stay as the run loaded them.

    source: the checkpoint, for messages.

    Raises CheckpointError if names or shapes of trained parameters differ.
    """
    with dist.fail_together():
        _check_same_parameters(engine, shards, source)
        masters, states = _own_state(engine, shards)
    optimizer = engine.optimizer
    optimizer.checkpoint_event_prologue()
    state = optimizer.state_dict()
    state["optimizer_state_dict"]["state"] = states
    state["fp32_flat_groups"] = masters
    # DeepSpeed reads its own rank's entry from a list over all ranks.
    of_ranks: list[Any] = [None] * dist.world_size()
    of_ranks[dist.rank()] = state
    optimizer.load_state_dict(state_dict_list=of_ranks)
    optimizer.checkpoint_event_epilogue()  # gathers persistent parameters, and drops hpZ's second shards
    for name, count in shards.counters.items():
        setattr(engine, name, count)


def _check_same_parameters(engine: Any, shards: SavedShards, source: object) -> None:
    expected = _shapes(engine, itertools.chain(*engine.optimizer.fp16_groups))
    found = {name: saved.shape for name, saved in shards.trained.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"{source} does not fit this run's model: {len(wrong)} trained parameters differ. The first is {name}: "
            f"expected shape {expected.get(name, 'none')}, found {found.get(name, 'none')}. Use the config that wrote "
            "the checkpoint, or another run_dir."
        )


def _own_state(engine: Any, shards: SavedShards) -> tuple[list[Tensor], dict[int, dict[str, Tensor]]]:
    """This rank's float32 weights by sub-group, and the optimizer's state by sub-group.

    The parameters of a sub-group have one step count, because the optimizer updates them together.
    """
    place = {"rank": dist.rank(), "world_size": dist.world_size()}
    masters, states = [], {}
    for idx, params in enumerate(engine.optimizer.fp16_groups):
        saved = [shards.trained[engine.param_names[param]] for param in params]
        flats = {state: torch.cat([each.piece(state, **place) for each in saved]) for state in saved[0].flats}
        masters.append(flats.pop(MASTER))
        scalars = {state: torch.tensor(value) for state, value in saved[0].scalars.items()}
        if flats or scalars:
            states[idx] = flats | scalars
    return masters, states
