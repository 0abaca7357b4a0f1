"""Memory of a rank and traffic of a step under ZeRO-3, from the sizes of parameters (DeepSpeed 0.19.8).

The gathers follow DeepSpeed's own rules (`runtime/zero/partitioned_param_coordinator.py`): a module's missing
parameters are fetched before it runs, the next ones are prefetched, and a parameter is released after its module unless
it is used again soon. `tests/distributed/test_plan.py` compares memory and bytes with real steps.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from arc_ds.errors import ConfigError
from arc_ds.model.backbone import Block


@dataclass(frozen=True, kw_only=True)
class ZeroSettings:
    """The keys of DeepSpeed's JSON that a plan needs, with DeepSpeed's defaults. Numbers are elements.

    hpz_ranks: ranks that share a second copy of the shards (`zero_hpz_partition_size`); 1 if there is none.
    offload_optimizer, offload_parameters: whether these states are in host memory.
    """

    prefetch_bucket: int = 50_000_000
    persistence_threshold: int = 100_000
    max_live: int = 1_000_000_000
    max_reuse_distance: int = 1_000_000_000
    reduce_bucket: int = 500_000_000
    sub_group: int = 1_000_000_000
    overlap: bool = True
    hpz_ranks: int = 1
    offload_optimizer: bool = False
    offload_parameters: bool = False

    @staticmethod
    def of(zero: Mapping[str, Any], name: str) -> ZeroSettings:
        """Read the section `zero_optimization` of a filled JSON. DeepSpeed's own checks are left to `arc-ds train`.

        name: of the file. Raises ConfigError on a value that is no number.
        """
        numbers = {
            "prefetch_bucket": "stage3_prefetch_bucket_size",
            "persistence_threshold": "stage3_param_persistence_threshold",
            "max_live": "stage3_max_live_parameters",
            "max_reuse_distance": "stage3_max_reuse_distance",
            "reduce_bucket": "reduce_bucket_size",
            "sub_group": "sub_group_size",
            "hpz_ranks": "zero_hpz_partition_size",
        }
        given: dict[str, Any] = {}
        for field, key in numbers.items():
            value = zero.get(key, getattr(ZeroSettings, field))
            if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
                raise ConfigError(f"{name}: zero_optimization.{key} is {value!r}; expected a number from 0 on.")
            given[field] = int(value)
        return ZeroSettings(
            **given,
            overlap=bool(zero.get("overlap_comm", True)),
            offload_optimizer=_is_offloaded(zero, "offload_optimizer"),
            offload_parameters=_is_offloaded(zero, "offload_param"),
        )


def _is_offloaded(zero: Mapping[str, Any], key: str) -> bool:
    return (zero.get(key) or {}).get("device", "none") != "none"


class Weights(NamedTuple):
    """The parameters of an engine.

    sizes: elements of each.
    is_trained: whether each is trained.
    forward: the parameters of each module that ZeRO-3 gathers as one, in the order of forward. Modules whose children
        have the parameters have none here, but count as steps.
    backward: the same for backward, which starts with the first module that has a trained one before or in it.
    """

    sizes: tuple[int, ...]
    is_trained: tuple[bool, ...]
    forward: tuple[tuple[int, ...], ...]
    backward: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(module: nn.Module) -> Weights:
        """The parameters of a compressor or decoder. Its modules are defined in the order in which they run."""
        parameters = list(module.parameters())
        places = {parameter: place for place, parameter in enumerate(parameters)}
        forward = list(_turns(module, 1))
        reached = _reached(forward)
        backward = [turn for each, turn in _turns(module, -1) if id(each) in reached]
        return Weights(
            sizes=tuple(parameter.numel() for parameter in parameters),
            is_trained=tuple(parameter.requires_grad for parameter in parameters),
            forward=tuple(tuple(places[p] for p in turn) for _, turn in forward),
            backward=tuple(tuple(places[p] for p in turn) for turn in backward),
        )

    @property
    def num_trained(self) -> int:
        """Elements of the trained parameters."""
        return sum(size for size, is_trained in zip(self.sizes, self.is_trained, strict=True) if is_trained)

    def shard(self, num_ranks: int, *, trained_only: bool = False) -> int:
        """Elements of one rank's shards. Every parameter is padded to a multiple of the ranks."""
        return sum(
            math.ceil(size / num_ranks)
            for size, is_trained in zip(self.sizes, self.is_trained, strict=True)
            if is_trained or not trained_only
        )


def count_reductions(weights: Weights, bucket: int) -> int:
    """Reduce-scatters of one micro-batch: a gradient that does not fit the bucket sends what is in it."""
    number, elements = 0, 0
    for parameter in (p for turn in weights.backward for p in reversed(turn) if weights.is_trained[p]):
        if elements and elements + weights.sizes[parameter] > bucket:
            number, elements = number + 1, 0
        elements += weights.sizes[parameter]
    return number + (elements > 0)


Turn = tuple[nn.Module, list[nn.Parameter]]


def _turns(module: nn.Module, direction: int) -> Iterator[Turn]:
    """The modules that hooks of ZeRO-3 see, parents first, and their parameters. direction: -1 reverses children."""
    is_leaf = isinstance(module, Block)
    if not isinstance(module, nn.ModuleList):  # nobody calls a list
        yield module, list(dict.fromkeys(module.parameters(recurse=is_leaf)))
    for child in () if is_leaf else list(module.children())[::direction]:
        yield from _turns(child, direction)


def _reached(forward: Sequence[Turn]) -> set[int]:
    """Ids of the modules that backward reaches: those from the first trained parameter on, and their parents.

    Gradients pass through all modules of a frozen decoder.
    """
    first = next((place for place, (_, turn) in enumerate(forward) if any(p.requires_grad for p in turn)), 0)
    return {id(module) for place, (module, turn) in enumerate(forward) if place >= first or not turn}


class Gathers(NamedTuple):
    """The gathers of one forward and backward of an engine.

    sizes: elements of each all-gather, without padding.
    is_first: for each of them, whether this is the pass's first gather of a trained parameter.
    peak: most elements that are gathered at a time, parameters that are never released included.
    """

    sizes: tuple[tuple[int, ...], ...]
    is_first: tuple[tuple[bool, ...], ...]
    peak: int

    def elements(self, num_ranks: int) -> int:
        """Elements of all gathered tensors, with their padding for this number of ranks."""
        return sum(math.ceil(size / num_ranks) * num_ranks for gather in self.sizes for size in gather)

    def part(self, *, is_first: bool) -> Gathers:
        """The gathers of those elements alone."""
        pairs = [[*zip(*gather, strict=True)] for gather in zip(self.sizes, self.is_first, strict=True)]
        sizes = [tuple(size for size, first in gather if first == is_first) for gather in pairs]
        kept = tuple(filter(None, sizes))
        return Gathers(kept, tuple((is_first,) * len(gather) for gather in kept), self.peak)


def simulate_gathers(weights: Weights, settings: ZeroSettings) -> Gathers:
    """The gathers of one micro-batch after the first steps, in which DeepSpeed records the order."""
    order = [*weights.forward, *weights.backward]
    persistent = {p for p, size in enumerate(weights.sizes) if size <= settings.persistence_threshold}
    queue = deque((parameter, step) for step, turn in enumerate(order) for parameter in sorted(turn))
    fetched_for = dict.fromkeys(range(len(weights.sizes)), -1)
    available: set[int] = set()
    gathers: list[list[int]] = []
    peak = 0

    def gather(parameters: set[int]) -> None:
        missing = sorted(p for p in parameters if p not in available and p not in persistent)
        available.update(missing)
        if missing:
            gathers.append(missing)

    for step, turn in enumerate(order):
        gather(set(turn))
        wanted = {p for p in turn if fetched_for[p] < step}
        taken: set[int] = set()
        while queue and len(taken) < len(wanted):
            parameter, fetched_for[parameter] = queue.popleft()
            taken.add(parameter)
        room = min(settings.max_live - sum(weights.sizes[p] for p in available), settings.prefetch_bucket)
        ahead: set[int] = set()
        while queue and sum(weights.sizes[p] for p in ahead) < room:
            parameter, used_at = queue.popleft()
            fetched_for[parameter] = max(fetched_for[parameter], used_at)
            if parameter not in available and parameter not in persistent:
                ahead.add(parameter)
        gather(ahead)
        peak = max(peak, sum(weights.sizes[p] for p in available))
        available -= _released(weights, order, step + 1, turn, fetched_for, settings.max_reuse_distance)
    known = {p for p, is_trained in enumerate(weights.is_trained) if not is_trained}
    is_first = []
    for gathered in gathers:
        is_first.append(tuple(p not in known for p in gathered))
        known.update(gathered)
    sizes = tuple(tuple(weights.sizes[p] for p in gathered) for gathered in gathers)
    return Gathers(sizes, tuple(is_first), peak + sum(weights.sizes[p] for p in persistent))


def _released(
    weights: Weights,
    order: Sequence[tuple[int, ...]],
    next_step: int,
    turn: tuple[int, ...],
    fetched_for: Mapping[int, int],
    max_distance: int,
) -> set[int]:
    """The parameters that are released after a module: all but those that were skipped by a prefetch or come soon."""
    released = {p for p in turn if fetched_for[p] <= next_step}
    distance = 0
    for later in order[next_step:]:
        if distance >= max_distance:
            break
        released -= set(later)
        distance += sum(weights.sizes[p] for p in later)
    return released
