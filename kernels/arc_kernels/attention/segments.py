"""The segments, mask and scale of one attention."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

Rotation = tuple[Tensor, Tensor]
"""(cos, sin), each [rows, H / 2]."""


class Segments(NamedTuple):
    """Arguments of `attention_varlen`, in the order of the operators.

    scale: the softmax scale, positive.
    window: smaller than max_seqlen_k, or None.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    k_limits_T: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    causal: bool
    scale: float
    window: int | None = None
