"""Meters: work of all ranks since the last report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
import torch.distributed
from torch import Tensor

from arc_ds.data.loading.step_batch import StepBatch
from arc_ds.data.tasks import TaskCounts
from arc_ds.system import dist
from arc_ds.training.run import DataClock

_SIZES = ("encoder_tokens", "decoder_rows", "labels", "micro_batches")
# `over_limit` counts samples, `remade` counts batches, all others count records. Each one is a separate metric.
COUNTS = ("skipped", "over_limit", "remade", *(one.name for one in fields(TaskCounts)))


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Totals over all ranks.

    flops: operations of the steps.
    balance: work of the slowest rank divided by the mean over ranks, 1 at best. It is computed per pass because ranks
        wait for each other in every pass.
    waited_s: seconds that the slowest rank waited for data.
    peak_bytes: largest peak of device memory.
    peak_rank: lowest rank with this peak.
    largest: maximum of each of the ranks' own figures, by name.
    sums: encoder_tokens, decoder_rows, labels, micro_batches, and the `COUNTS`.
    """

    num_steps: int
    flops: float
    balance: float
    waited_s: float
    peak_bytes: int
    peak_rank: int
    largest: Mapping[str, float]
    sums: Mapping[str, int]


class Meter:
    """Adds up this rank's steps. All ranks must call `read` at the same step."""

    def __init__(self) -> None:
        self._num_steps = 0
        self._sums = Counter[str]()
        self._flops: list[int] = []

    def add(self, batch: StepBatch, flops: Sequence[int]) -> None:
        """Add one step of this rank. flops: operations of each micro-batch."""
        self._num_steps += 1
        self._flops += flops
        self._sums.update(
            encoder_tokens=sum(micro.batch.num_encoder_tokens for micro in batch.micro_batches),
            decoder_rows=sum(micro.batch.num_decoder_rows for micro in batch.micro_batches),
            labels=batch.num_labels,
            micro_batches=len(batch.micro_batches),
            skipped=batch.skipped,
            over_limit=batch.over_limit,
            **{one.name: getattr(batch.counts, one.name) for one in fields(TaskCounts)},
        )

    def read(self, clock: DataClock, device: torch.device, *, peak_bytes: int, own: Mapping[str, float]) -> Totals:
        """Return the totals since the last call, and reset them and the clock. Collective.

        peak_bytes: peak of this rank's device memory.
        own: other figures of this rank; the same names on all ranks.
        """
        waited_s, self._sums["remade"] = clock.read()
        names = (*_SIZES, *COUNTS)
        sums = [self._sums[name] for name in names]
        summed = _reduced([*sums, *self._flops], device, torch.distributed.ReduceOp.SUM)
        # One number holds the peak and its rank. It is exact in float64: bytes times ranks are below 2**53.
        world_size = dist.world_size()
        peak = peak_bytes * world_size + world_size - 1 - dist.rank()
        maxima = _reduced([waited_s, peak, *own.values(), *self._flops], device, torch.distributed.ReduceOp.MAX)
        waited_s, peak_of_all, *others = maxima
        peak_bytes, from_last = divmod(int(peak_of_all), world_size)
        flops, largest = sum(summed[len(names) :]), others[len(own) :]
        totals = Totals(
            num_steps=self._num_steps,
            flops=flops,
            balance=sum(largest) * world_size / flops if flops else 1.0,
            waited_s=waited_s,
            peak_bytes=peak_bytes,
            peak_rank=world_size - 1 - from_last,
            largest=dict(zip(own, others, strict=False)),
            sums=dict(zip(names, map(int, summed), strict=False)),
        )
        self._num_steps, self._sums, self._flops = 0, Counter(), []
        return totals


def _reduced(own: Sequence[float], device: torch.device, how: torch.distributed.ReduceOp.RedOpType) -> list[float]:
    """Sum or maximum of each number over the ranks."""
    reduced: Tensor = torch.tensor(own, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(reduced, op=how)
    return reduced.tolist()
