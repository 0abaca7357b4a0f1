"""Time, memory and copy bandwidth on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

COPY_BYTES = 1 << 30


def median_ms(function: Callable[[], Any]) -> float:
    """Median time of a call on the GPU, milliseconds: warmed up, caches flushed before each call (triton's do_bench).

    Calls are queued ahead of the GPU while it flushes the cache, so the host's share is hidden as long as it is the
    smaller one: cases are chosen to take more than about 100 microseconds.
    """
    from triton.testing import do_bench

    return float(do_bench(function, warmup=50, rep=200, return_mode="median"))


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written together, of a copy of 1 GiB within the GPU's memory."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / (median_ms(lambda: target.copy_(source)) * 1e-3)


def peak_extra_bytes(function: Callable[[], Any]) -> int:
    """The most memory that a call holds above what was allocated before it, its results included."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = function()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before
