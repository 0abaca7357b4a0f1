"""Segments, heads and inputs for the tests of the attention kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from arc_kernels.attention import attention_varlen_reference

MODES = ("full", "causal", "limits")
INPUTS = ("q_TNH", "k_UKH", "v_UKH")


class Case(NamedTuple):
    """Lengths of the segments, and sizes of the heads."""

    q_lengths: tuple[int, ...]
    k_lengths: tuple[int, ...]
    group: int = 2
    num_kv_heads: int = 1
    head_dim: int = 32


RAGGED = Case((1, 7, 37, 1, 16), (1, 40, 37, 3, 33), num_kv_heads=2)


def plain_attention(spans: dict) -> Callable[..., Tensor]:
    """Attention in plain torch on the given spans, which are keywords of `ak.attention_varlen`."""
    return partial(attention_varlen_reference, **{"causal": False, "k_limits_T": None, "scale": None, **spans})


def inputs_of(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Standard normal q, k and v, by name."""
    generator = torch.Generator().manual_seed(0)
    heads = (case.num_kv_heads * case.group, case.num_kv_heads, case.num_kv_heads)
    rows = (sum(case.q_lengths), sum(case.k_lengths), sum(case.k_lengths))
    return {
        name: torch.randn(num_rows, num_heads, case.head_dim, generator=generator).to(device, dtype)
        for name, num_rows, num_heads in zip(INPUTS, rows, heads, strict=True)
    }


def spans_of(case: Case, mode: str, device: torch.device) -> dict:
    """The boundaries and the mask as keywords of `ak.attention_varlen`."""
    spans: dict = {
        "cu_seqlens_q": boundaries_of(case.q_lengths, device),
        "cu_seqlens_k": boundaries_of(case.k_lengths, device),
        "max_seqlen_q": max(case.q_lengths),
        "max_seqlen_k": max(case.k_lengths),
    }
    if mode == "causal":
        spans["causal"] = True
    if mode == "limits":
        pairs = zip(case.q_lengths, case.k_lengths, strict=True)
        limits = [1 + (5 * i + s + 2) % n for s, (m, n) in enumerate(pairs) for i in range(m)]  # not in ascending order
        spans["k_limits_T"] = torch.tensor(limits, dtype=torch.int32, device=device)
    return spans


def boundaries_of(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 [S + 1]."""
    return torch.tensor([0, *lengths]).cumsum(0).int().to(device)
