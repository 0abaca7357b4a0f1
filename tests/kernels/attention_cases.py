"""Segments, heads and inputs for the tests of the attention kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import arc_kernels as ak
from arc_kernels.attention import attention_varlen_reference
from arc_kernels.attention.segments import Rotation, Segments
from arc_kernels.rotary import rotary_reference
from tests.kernels.bounds import assert_kernel_close

MODES = ("full", "causal", "limits")
INPUTS = ("q_TNH", "k_UKH", "v_UKH")
TURNED = ("rotary_q", "rotary_k")


class Case(NamedTuple):
    """Lengths of the segments, and sizes of the heads."""

    q_lengths: tuple[int, ...]
    k_lengths: tuple[int, ...]
    group: int = 2
    num_kv_heads: int = 1
    head_dim: int = 32


RAGGED = Case((1, 7, 37, 1, 16), (1, 40, 37, 3, 33), num_kv_heads=2)


def compare(
    case: Case,
    mode: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    turned: tuple[str, ...] = (),
    window: int | None = None,
    wants_grad: tuple[str, ...] = INPUTS,
) -> None:
    """Compare output and gradients of the kernels with plain torch.

    turned: "rotary_q" and "rotary_k", if attention rotates them.
    """
    spans = spans_of(case, mode, device) | {"window": window}
    angles = {name: pair for name, pair in angles_of(case, device).items() if name in turned}
    function = partial(ak.attention_varlen, **spans, **angles)
    assert_kernel_close(function, plain_attention(spans, angles), inputs_of(case, dtype, device), wants_grad=wants_grad)


def plain_attention(spans: dict, angles: Mapping[str, Rotation] | None = None) -> Callable[..., Tensor]:
    """Rotary by the given angles, then attention, in plain torch. Both take keywords of `ak.attention_varlen`."""
    angles = angles or {}

    def attend(q_TNH: Tensor, k_UKH: Tensor, v_UKH: Tensor) -> Tensor:
        q_TNH = rotary_reference(q_TNH, *angles["rotary_q"]) if "rotary_q" in angles else q_TNH
        k_UKH = rotary_reference(k_UKH, *angles["rotary_k"]) if "rotary_k" in angles else k_UKH
        segments = Segments(**{"causal": False, "k_limits_T": None, "scale": q_TNH.shape[2] ** -0.5, **spans})
        return attention_varlen_reference(q_TNH, k_UKH, v_UKH, segments)

    return attend


def angles_of(case: Case, device: torch.device) -> dict[str, Rotation]:
    """Keys at their own positions, queries like pooled ones: in the middle of their groups of 2.5 rows."""
    frequencies = 100.0 ** -torch.linspace(0, 1, case.head_dim // 2)

    def of(positions: list[float]) -> Rotation:
        angles = torch.tensor(positions)[:, None] * frequencies
        return angles.cos().to(device), angles.sin().to(device)

    return {
        "rotary_q": of([2.5 * i + 1 for length in case.q_lengths for i in range(length)]),
        "rotary_k": of([float(i) for length in case.k_lengths for i in range(length)]),
    }


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


def segments_of(case: Case, mode: str, device: torch.device) -> Segments:
    """The same for the kernels' launchers."""
    default = {"causal": False, "k_limits_T": None, "scale": case.head_dim**-0.5}
    return Segments(**default | spans_of(case, mode, device))


def boundaries_of(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 [S + 1]."""
    return torch.tensor([0, *lengths]).cumsum(0).int().to(device)
