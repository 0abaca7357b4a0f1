"""Where PyTorch's FlashAttention and ours were timed against each other; `choice.py` reads it.

Rows are written by `kernels/benchmarks/choose_attention.py --write`, on the GPU that they are of.
"""

from __future__ import annotations

from typing import NamedTuple


class Measured(NamedTuple):
    """One shape. flash_over_ours: time of FlashAttention over ours, forward and backward; below 1 it is faster."""

    gpu: str
    dtype: str
    head_dim: int
    causal: bool
    max_seqlen_q: int
    max_seqlen_k: int
    flash_over_ours: float


MEASURED: tuple[Measured, ...] = ()
