"""A guard on the frozen decoders: their weights are equal on all ranks at the start, and the same after training.

A damaged weight gives finite losses and wrong gradients, so no other check of a run would show it.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from arc_ds.errors import TrainingError
from arc_ds.system import dist
from arc_ds.training.hooks import Hook
from arc_ds.training.run import Run

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def frozen_digest(module: nn.Module) -> int:
    """A digest of the weights of a module that this rank holds: whole ones, or its shards. Synchronizes once.

    It is the sum of the weights' bits as integers, weighted by the parameter. Any single changed value changes it. It
    reads the weights once and takes no memory.
    """
    held = [tensor for parameter in module.parameters() for tensor in _held(parameter) if tensor.numel()]
    if not held:
        return 0
    sums = torch.stack([tensor.view(_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64) for tensor in held])
    return sum((idx + 1) * value for idx, value in enumerate(sums.tolist())) % (1 << 64)


def _held(parameter: Any) -> list[Tensor]:
    """The tensors of a parameter on this rank. With hpZ there are two shards."""
    if not hasattr(parameter, "ds_tensor"):
        return [parameter.detach()]
    secondary = getattr(parameter, "ds_secondary_tensor", None)
    return [parameter.ds_tensor.detach(), *([] if secondary is None else [secondary.detach()])]


class FrozenGuard(Hook):
    """Checks the frozen decoders at the start and at the end of a run.

    A replicated decoder must have the same digest on all ranks. Every rank's part must keep its digest. The guard runs
    after the last checkpoint is saved, so that nothing is lost.
    """

    priority = 35

    def __init__(self) -> None:
        self._before: list[int] = []
        self._start = 0

    def on_start(self, run: Run) -> None:
        self._before, self._start = _digests(run), run.step
        remedy = "Compare the decoder's files on the hosts, then test the memory of that host."
        _raise_together(_unequal(run, self._before), remedy)

    def on_end(self, run: Run) -> None:
        after = _digests(run)
        names = [name for name, a, b in zip(run.decoder_names, self._before, after, strict=True) if a != b]
        found = {name: "changed during training" for name in names} or _unequal(run, after)
        _raise_together(
            found,
            f"Checkpoints after step {self._start} may come from wrong gradients. Test the memory of that host, leave "
            "it out, and start again from an earlier checkpoint.",
        )


def _digests(run: Run) -> list[int]:
    return [frozen_digest(decoder.module) for decoder in run.decoders]


def _unequal(run: Run, digests: Sequence[int]) -> dict[str, str]:
    """Faults of the replicated decoders whose digest here differs from that of most ranks, by name. Collective."""
    by_rank = dist.gather_objects(list(digests))
    found = {}
    for idx, (name, decoder) in enumerate(zip(run.decoder_names, run.decoders, strict=True)):
        usual, _ = Counter(theirs[idx] for theirs in by_rank).most_common(1)[0]
        if decoder.engine is None and digests[idx] != usual:
            found[name] = "differs from the other ranks"
    return found


def _raise_together(faults: dict[str, str], remedy: str) -> None:
    """Raise one TrainingError on all ranks if one of them has a fault. Collective."""
    by_rank = dist.gather_objects((socket.gethostname(), faults))
    found = [
        f"decoder {name} {fault} on rank {rank} ({host})"
        for rank, (host, theirs) in enumerate(by_rank)
        for name, fault in theirs.items()
    ]
    if found:
        raise TrainingError(
            f"{len(found)} frozen decoder part(s) do not have the weights that they should have: "
            f"{'; '.join(found[:8])}. {remedy}"
        )
