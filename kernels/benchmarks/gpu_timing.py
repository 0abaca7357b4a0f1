"""Time, memory, copy bandwidth and matrix rate of a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

COPY_BYTES = 1 << 30
MATRIX_SIZE = 8192
FLUSH_BYTES = 1 << 28
"""More than four times the L2 cache of an H200 (60 MB)."""

MIN_ROUNDS, MAX_ROUNDS = 5, 100

CYCLES_PER_MS = 2_000_000
"""Of an H200 at its highest clock; at a lower one the GPU waits longer, which does no harm."""

MAX_HEAD_START_MS = 5.0
"""Only calls that wait for the GPU themselves would need more, and these cannot be queued ahead."""


class Timing(NamedTuple):
    """Times of one function over the rounds.

    median_ms: their median.
    spread_ms: half the distance between their quartiles.
    rounds: their number.
    """

    median_ms: float
    spread_ms: float
    rounds: int


class Ceilings(NamedTuple):
    """Peak rates of the device, measured in the same run.

    copy: bytes per second (read plus written) of a copy within its memory.
    matrix: FLOP per second of a bfloat16 matrix product on random numbers.
    """

    copy: float
    matrix: float


def interleaved(
    functions: Sequence[Callable[[], Any]],
    device: torch.device,
    *,
    budget_ms: float = 250.0,
    max_rounds: int = MAX_ROUNDS,
) -> list[Timing]:
    """Time all functions in turn, round after round, so that a drift of the clocks affects all of them.

    The L2 cache is overwritten before each call. On a GPU the time is that of the kernels alone: before each call the
    GPU idles for longer than the host takes to queue the call. Otherwise a norm of 25 microseconds would seem to take
    the 100 that Python needs to launch it.

    functions: each is called with no arguments.
    device: the device of their work; the host's clock times the CPU.
    budget_ms: about how long one function is timed, in at least 5 rounds.
    max_rounds: the largest number of rounds, at least 2. Below 5, as in a rehearsal, there is no warm-up either.
    """
    clock = partial(_gpu_times, _head_starts(functions)) if device.type == "cuda" else _cpu_times
    rounds = max_rounds
    if max_rounds >= MIN_ROUNDS:
        if device.type != "cuda":
            clock(functions, 2, device)  # compiles and tunes, as `_head_starts` has done on a GPU
        longest_ms = max(statistics.median(times) for times in clock(functions, 3, device))
        rounds = min(max_rounds, max(MIN_ROUNDS, int(budget_ms / max(longest_ms, 1e-3))))
    return [timing(times) for times in clock(functions, rounds, device)]


def measure_ceilings(device: torch.device, *, copy_bytes: int = COPY_BYTES, matrix_size: int = MATRIX_SIZE) -> Ceilings:
    """The device's copy bandwidth and matrix rate. The matrices are random, because zeros run faster than data."""
    source = torch.zeros(copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(matrix_size, matrix_size, device=device, dtype=torch.bfloat16) for _ in range(2))
    copy, matrix = interleaved([lambda: target.copy_(source), lambda: a @ b], device)
    return Ceilings(2 * copy_bytes / (copy.median_ms * 1e-3), 2 * matrix_size**3 / (matrix.median_ms * 1e-3))


def peak_extra_bytes(function: Callable[[], Any]) -> int:
    """The most GPU memory that a call holds above what was allocated before it, its results included."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = function()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def _head_starts(functions: Sequence[Callable[[], Any]]) -> list[int]:
    """For each function, the cycles in which the host certainly queues it. The first call compiles and tunes."""
    cycles = []
    for function in functions:
        times_ms = []
        for _ in range(3):
            torch.cuda.synchronize()
            started = time.perf_counter()
            function()
            times_ms.append(1e3 * (time.perf_counter() - started))
        cycles.append(int(CYCLES_PER_MS * min(1.5 * min(times_ms) + 0.05, MAX_HEAD_START_MS)))
    torch.cuda.synchronize()
    return cycles


def _gpu_times(
    head_starts: Sequence[int], functions: Sequence[Callable[[], Any]], rounds: int, device: torch.device
) -> list[list[float]]:
    """Milliseconds of each function in each round.

    head_starts: of each function, the cycles for which the GPU waits before it.
    """
    cache = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    events = []
    for _ in range(rounds):
        for function, cycles in zip(functions, head_starts, strict=True):
            torch.cuda._sleep(cycles)
            cache.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            events.append((start, end))
    torch.cuda.synchronize(device)
    times = [start.elapsed_time(end) for start, end in events]
    return [times[idx :: len(functions)] for idx in range(len(functions))]


def _cpu_times(functions: Sequence[Callable[[], Any]], rounds: int, _: torch.device) -> list[list[float]]:
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for mine, function in zip(times, functions, strict=True):
            started = time.perf_counter()
            function()
            mine.append(1e3 * (time.perf_counter() - started))
    return times


def timing(times_ms: Sequence[float]) -> Timing:
    """Median and spread of the times of one function, in milliseconds; at least 2."""
    low, _, high = statistics.quantiles(times_ms, n=4)
    return Timing(statistics.median(times_ms), (high - low) / 2, len(times_ms))
