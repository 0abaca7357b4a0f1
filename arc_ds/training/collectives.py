"""Bytes that this rank moves in collectives, by engine, without synchronizing with the device.

Every collective of torch, and thus of DeepSpeed, ends in a method of `ProcessGroup`. This module wraps these methods:

    with counting_collectives({name: decoder_engine}) as counter:
        train_step(...)
        full_bytes = counter.read()  # {Collective("encoder", "all_gather", 8): 4096, …}

DeepSpeed has a communication logger, but it synchronizes with the device after every collective.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor
from torch.distributed import ProcessGroup

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

ENCODER = "encoder"

# Methods of `ProcessGroup` by collective. Names differ between versions of torch; missing ones are skipped.
_METHODS = {
    "all_gather": (
        *("allgather", "_allgather_base", "all_gather_single", "allgather_coalesced"),
        *("allgather_into_tensor_coalesced", "all_gather_single_coalesced"),
    ),
    "reduce_scatter": (
        *("reduce_scatter", "_reduce_scatter_base", "reduce_scatter_single"),
        *("reduce_scatter_tensor_coalesced", "reduce_scatter_single_coalesced"),
    ),
    "all_reduce": ("allreduce", "allreduce_coalesced"),
    "all_to_all": ("alltoall", "alltoall_base", "all_to_all_single"),
    "broadcast": ("broadcast",),
    "reduce": ("reduce",),
    "gather": ("gather",),
    "scatter": ("scatter",),
}
# Bytes that a rank sends, as multiples of the full tensor's bytes times (n - 1) / n, for n ranks in a ring.
_PASSES = {"all_reduce": 2}


class Collective(NamedTuple):
    """A kind of collective.

    engine: the decoder whose weights it gathered, by name; `ENCODER` for all others, including the step's own exchange
        of label counts and losses.
    op: all_gather, reduce_scatter, all_reduce, all_to_all, broadcast, reduce, gather or scatter.
    num_ranks: size of its group.
    """

    engine: str
    op: str
    num_ranks: int


def sent_bytes(kind: Collective, full_bytes: int) -> float:
    """Bytes that each rank sends (and receives) if the collective runs as a ring.

    That is full_bytes * (n - 1) / n on n ranks, and twice as much for an all-reduce. NCCL may use other algorithms.
    """
    return full_bytes * _PASSES.get(kind.op, 1) * (kind.num_ranks - 1) / kind.num_ranks


class CollectiveCounter:
    """Bytes of the full tensors of this rank's collectives since the last `read`.

    The full tensor is the output of an all-gather (all shards, with their padding), the input of a reduce-scatter, the
    tensor of an all-reduce or a broadcast. It is the same on every rank.

    engine: the engine to which collectives are attributed now.
    """

    def __init__(self) -> None:
        self.engine = ENCODER
        self._full_bytes = Counter[Collective]()

    def add(self, op: str, num_ranks: int, full_bytes: int) -> None:
        """Count one collective."""
        self._full_bytes[Collective(self.engine, op, num_ranks)] += full_bytes

    def read(self) -> Counter[Collective]:
        """Return the bytes by kind of collective since the last call, and reset them."""
        found, self._full_bytes = self._full_bytes, Counter()
        return found


@contextmanager
def counting_collectives(decoders: Mapping[str, DeepSpeedEngine]) -> Iterator[CollectiveCounter]:
    """Context in which this process counts its collectives. Contexts may be nested.

    decoders: engines of the sharded decoders, by name.
    """
    counter = CollectiveCounter()
    ops = {name: op for op, names in _METHODS.items() for name in names if name in vars(ProcessGroup)}
    originals = {name: vars(ProcessGroup)[name] for name in ops}
    coordinators = {name: engine.optimizer.get_param_coordinator() for name, engine in decoders.items()}
    try:
        for name, op in ops.items():
            setattr(ProcessGroup, name, _counted(originals[name], op, counter))
        for name, coordinator in coordinators.items():
            coordinator.fetch_sub_module = _attributed(coordinator.fetch_sub_module, name, counter)
        yield counter
    finally:
        for name, original in originals.items():
            setattr(ProcessGroup, name, original)
        for coordinator in coordinators.values():
            del coordinator.fetch_sub_module


def _counted(method: Callable[..., Any], op: str, counter: CollectiveCounter) -> Callable[..., Any]:
    def counted(group: ProcessGroup, *args: Any, **options: Any) -> Any:
        # The full tensor is the larger one of output and input; other arguments contain no tensors.
        counter.add(op, group.size(), max(map(_num_bytes, args)))
        return method(group, *args, **options)

    return counted


def _attributed(fetch: Callable[..., Any], name: str, counter: CollectiveCounter) -> Callable[..., Any]:
    def attributed(*args: Any, **options: Any) -> Any:
        before, counter.engine = counter.engine, name
        try:
            return fetch(*args, **options)
        finally:
            counter.engine = before

    return attributed


def _num_bytes(tensors: Any) -> int:
    """Bytes of a tensor or of nested lists of tensors; 0 for anything else."""
    if isinstance(tensors, Tensor):
        return tensors.nbytes
    return sum(map(_num_bytes, tensors)) if isinstance(tensors, list) else 0
