"""The default attention backend of a call: our kernels, PyTorch's FlashAttention, or plain torch."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from arc_kernels._dispatch import checked, choice_in_force, demand_triton, use_triton
from arc_kernels.attention.flash import flash_serves
from arc_kernels.attention.measured import MEASURED, Measured
from arc_kernels.attention.segments import Segments

Backend = Literal["triton", "flash", "reference"]
BACKENDS: tuple[Backend, ...] = ("triton", "flash", "reference")
AttentionChoice = Literal["auto", "triton", "flash", "reference"]
CHOICES: tuple[AttentionChoice, ...] = ("auto", *BACKENDS)

# At equal speed we prefer our own backward, which is reproducible bit by bit.
WORTHWHILE = 0.95

_forced: AttentionChoice | None = None  # not a ContextVar; see `_dispatch`


@contextmanager
def use_attention(choice: AttentionChoice) -> Iterator[None]:
    """Context that sets the backend of `attention_varlen` for calls that do not name one, on all threads.

    choice: one of
        "auto": as `arc_kernels.use`. If that is "auto" too, a GPU uses PyTorch's FlashAttention for shapes at which it
            was measured to be faster (`measured.py`), but never with a window.
        "flash": FlashAttention for every call that it supports, "auto" for the others.
        "triton", "reference": always this one.

    Outside any context the environment variable ARC_ATTENTION decides (default "auto"). Raises ValueError on any other
    choice.
    """
    global _forced
    before, _forced = _forced, checked(choice, "choice", CHOICES)
    try:
        yield
    finally:
        _forced = before


def chosen_backend(q_TNH: Tensor, segments: Segments) -> Backend:
    """The backend of a call that names none. It supports that call."""
    k_limits_T = segments.k_limits_T
    choice = _forced or checked(os.environ.get("ARC_ATTENTION") or "auto", "ARC_ATTENTION", CHOICES)
    if choice == "reference":
        return "reference"
    if choice == "triton":
        demand_triton(q_TNH)
        return "triton"
    if choice == "flash" and flash_serves(q_TNH, k_limits_T):
        return "flash"
    if not use_triton(q_TNH):
        return "reference"
    # The measurements are without a window. It changes the number of visible pairs, so they say nothing about it.
    is_measured = bool(MEASURED) and segments.window is None
    if choice == "auto" and is_measured and choice_in_force() == "auto" and flash_serves(q_TNH, k_limits_T):
        gpu = torch.cuda.get_device_properties(q_TNH.device.index).name
        shape = (gpu, str(q_TNH.dtype).removeprefix("torch."), q_TNH.shape[2], segments.causal)
        rows = [row for row in MEASURED if (row.gpu, row.dtype, row.head_dim, row.causal) == shape]
        if flash_was_faster(rows, max_seqlen_q=segments.max_seqlen_q, max_seqlen_k=segments.max_seqlen_k):
            return "flash"
    return "triton"


def flash_was_faster(rows: Sequence[Measured], *, max_seqlen_q: int, max_seqlen_k: int) -> bool:
    """Whether FlashAttention was faster at the measured lengths nearest to these (on a logarithmic scale).

    rows: measurements with this GPU, dtype, head size and mask. Without rows the result is False.
    """
    if not rows:
        return False
    nearest = min(
        rows,
        key=lambda row: (
            abs(math.log2(row.max_seqlen_q / max_seqlen_q)) + abs(math.log2(row.max_seqlen_k / max_seqlen_k))
        ),
    )
    return nearest.flash_over_ours < WORTHWHILE
