"""A guard on the frozen decoders: their weights are equal on all ranks at the start, and the same after training.

A damaged weight gives finite losses and wrong gradients, so no other check of a run would show it.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from arc_ds.errors import TrainingError
from arc_ds.system import dist
from arc_ds.training.hooks import Hook
from arc_ds.training.memory import held_tensors
from arc_ds.training.run import Run

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# torch converts a tensor to int64 before it sums, so pieces of this many values take 128 MiB at most.
_PIECE = 1 << 24


def frozen_digest(module: nn.Module) -> int:
    """A digest of the weights of a module that this rank holds: whole ones, or its shards. Synchronizes once.

    It is the sum of the weights' bits as integers, weighted by the parameter. Any single changed value changes it.
    """
    held = [tensor for parameter in module.parameters() for tensor in held_tensors(parameter) if tensor.numel()]
    if not held:
        return 0
    sums = torch.stack([_sum_of_bits(tensor) for tensor in held])
    return sum((idx + 1) * value for idx, value in enumerate(sums.tolist())) % (1 << 64)


def _sum_of_bits(tensor: Tensor) -> Tensor:
    pieces = tensor.flatten().view(_INTEGERS[tensor.element_size()]).split(_PIECE)
    return torch.stack([piece.sum(dtype=torch.int64) for piece in pieces]).sum()


class FrozenGuard(Hook):
    """Checks the frozen decoders at the start and at the end of a run.

    A replicated decoder must have the same digest on all ranks at the start. Every rank's part must keep its digest.
    The last check runs after the last checkpoint is saved, so that nothing is lost.
    """

    priority = 35

    def __init__(self) -> None:
        self._before: dict[str, int] = {}
        self._start = 0

    def on_start(self, run: Run) -> None:
        self._before, self._start = _digests(run), run.step
        faults = {}
        by_rank = dist.gather_objects(self._before)
        for name, decoder in zip(run.decoder_names, run.decoders, strict=True):
            usual, _ = Counter(digests[name] for digests in by_rank).most_common(1)[0]
            if decoder.engine is None and self._before[name] != usual:
                faults[name] = "differs from the other ranks"
        _raise_together(faults, "Compare the decoder's files on the hosts, then test the memory of that host.")

    def on_end(self, run: Run) -> None:
        faults = {n: "changed during training" for n, digest in _digests(run).items() if digest != self._before[n]}
        _raise_together(
            faults,
            f"Checkpoints after step {self._start} may come from wrong gradients. Test the memory of that host, leave "
            "it out, and start again from an earlier checkpoint.",
        )


def _digests(run: Run) -> dict[str, int]:
    pairs = zip(run.decoder_names, run.decoders, strict=True)
    return {name: frozen_digest(decoder.module) for name, decoder in pairs}


def _raise_together(faults: Mapping[str, str], remedy: str) -> None:
    """Raise one TrainingError on all ranks if one of them has a fault. Collective.

    faults: of this rank, by decoder.
    """
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
