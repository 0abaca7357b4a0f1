"""Deal the samples of a global batch to ranks and micro-batches."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from arc_ds.errors import ConfigError


def deal(costs: Sequence[float], num_bins: int) -> tuple[tuple[int, ...], ...]:
    """Deal samples to `num_bins` bins of equal size and about equal cost. Returns the samples of each bin, ascending.

    Greedy: the costliest sample goes to the cheapest bin that still has room. It is deterministic, so all ranks compute
    the same bins. Raises ConfigError if the number of samples is not a multiple of `num_bins`.
    """
    if num_bins < 1 or len(costs) % num_bins:
        raise ConfigError(
            f"a global batch of {len(costs)} sequences cannot be dealt evenly to {num_bins} micro-batches (ranks × "
            "micro-batches a step). Make data.batch_size a multiple of their product, or change the number of ranks."
        )
    room = len(costs) // num_bins
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    cheapest = [(0.0, bin_idx) for bin_idx in range(num_bins)]  # a heap already: equal costs, ascending indices
    for sample in sorted(range(len(costs)), key=lambda idx: (-costs[idx], idx)):
        total, bin_idx = cheapest[0]
        bins[bin_idx].append(sample)
        if len(bins[bin_idx]) < room:
            heapq.heapreplace(cheapest, (total + costs[sample], bin_idx))
        else:
            heapq.heappop(cheapest)
    return tuple(tuple(sorted(samples)) for samples in bins)
