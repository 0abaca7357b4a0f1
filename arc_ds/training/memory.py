"""Memory of the engines on this rank, and gathered parameters that ZeRO-3 did not release.

Everything here reads sizes and flags on the host; nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class EngineMemory(NamedTuple):
    """Bytes of one engine in the memory of this rank's device, by storage: tensors that share one count once.

    parameters: this rank's shards, including hpZ's second ones, or the whole module if it is replicated.
    gathered: full copies of sharded parameters at this moment.
    gradients: the buffer that accumulates the gradients of this rank's shards.
    optimizer: master weights, unless they share the parameters' storage, and moments.
    """

    parameters: int
    gathered: int
    gradients: int
    optimizer: int


def engine_memory(module: nn.Module, engine: DeepSpeedEngine | None, device: torch.device) -> EngineMemory:
    """Measure one engine. DeepSpeed's communication buffers and memory that is offloaded are not included.

    engine: the engine that trains the module; None for a frozen module.
    device: device of this rank.
    """
    params = list(module.parameters())
    gradients: list[Tensor] = []
    states: list[Tensor] = []
    if engine is not None:
        zero = engine.optimizer
        gradients = [zero.grad_partitions_flat_buffer] if zero.grad_partitions_flat_buffer is not None else []
        states = [*zero.fp32_partitioned_groups_flat]
        states += [
            value for state in zero.optimizer.state.values() for value in state.values() if torch.is_tensor(value)
        ]
    counted: set[int] = set()
    return EngineMemory(
        parameters=_bytes((tensor for param in params for tensor in held_tensors(param)), device, counted),
        gathered=_bytes((param for param in params if hasattr(param, "ds_tensor")), device, counted),
        gradients=_bytes(gradients, device, counted),
        optimizer=_bytes(states, device, counted),
    )


def held_tensors(parameter: Any) -> list[Tensor]:
    """The tensors of a parameter that this rank keeps: all of it, or its shard, and with hpZ a second one."""
    if not hasattr(parameter, "ds_tensor"):
        return [parameter.detach()]
    shards = (parameter.ds_tensor, parameter.ds_secondary_tensor)
    return [shard.detach() for shard in shards if shard is not None]


def leaked_parameters(module: nn.Module) -> list[str]:
    """Names of the sharded parameters that are still gathered although they are not persistent.

    Call it between steps: during a pass, gathered parameters are in use. A leak costs memory that grows from step to
    step (DeepSpeed #8481).
    """
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    params: Iterable[tuple[str, Any]] = module.named_parameters()
    return [
        name
        for name, param in params
        if hasattr(param, "ds_status") and param.ds_status != ZeroParamStatus.NOT_AVAILABLE and not param.ds_persist
    ]


def _bytes(tensors: Iterable[Tensor], device: torch.device, counted: set[int]) -> int:
    """Bytes of the storages on the device that are not in `counted`; adds them to it."""
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if tensor.device.type == device.type and storage.data_ptr() not in counted:
            counted.add(storage.data_ptr())
            total += storage.nbytes()
    return total
