"""Measured times of PyTorch's FlashAttention relative to ours, for `choice.py`.

`kernels/benchmarks/choose_attention.py --write` adds the rows of the GPU on which it runs.
"""

from __future__ import annotations

from typing import NamedTuple


class Measured(NamedTuple):
    """The measurement of one shape.

    flash_over_ours: time of FlashAttention divided by ours, forward and backward. Below 1, FlashAttention is faster.
    """

    gpu: str
    dtype: str
    head_dim: int
    causal: bool
    max_seqlen_q: int
    max_seqlen_k: int
    flash_over_ours: float


MEASURED: tuple[Measured, ...] = ()
