"""PyTorch's own varlen FlashAttention as a backend of `attention_varlen`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from arc_kernels.attention.segments import Segments

MAX_HEAD_DIM = 256


def attention_varlen_flash(q_TNH: Tensor, k_UKH: Tensor, v_UKH: Tensor, segments: Segments) -> Tensor:
    """See `attention_varlen`. Does not check arguments again.

    Like our kernels, FlashAttention aligns a causal mask to the end if a segment has fewer queries than keys (since
    version 2.1; PyTorch ships a later one). Its backward sums dq with atomics unless
    `torch.use_deterministic_algorithms(True)` is set. Raises ValueError if FlashAttention does not support the call.
    """
    varlen_attn = _varlen_attn()
    reason = _unsupported(q_TNH, segments.k_limits_T)
    if reason or varlen_attn is None:
        reason = reason or f"needs a torch whose varlen_attn supports windows; this is torch {torch.__version__}"
        raise ValueError(f"backend 'flash' {reason}; use 'triton' or 'reference'")
    return varlen_attn(
        q_TNH,
        k_UKH,
        v_UKH,
        segments.cu_seqlens_q,
        segments.cu_seqlens_k,
        segments.max_seqlen_q,
        segments.max_seqlen_k,
        scale=segments.scale,
        window_size=_window_size(segments),
        **_grouped(varlen_attn, is_grouped=q_TNH.shape[1] != k_UKH.shape[1]),
    )


def _window_size(segments: Segments) -> tuple[int, int]:
    """Numbers of keys that a query sees before and after its own; -1 stands for all."""
    if not segments.causal:
        return (-1, -1)
    return (-1 if segments.window is None else segments.window - 1, 0)


def flash_serves(q_TNH: Tensor, k_limits_T: Tensor | None) -> bool:
    """Whether this torch's FlashAttention supports a call."""
    return not _unsupported(q_TNH, k_limits_T) and _varlen_attn() is not None


def _unsupported(q_TNH: Tensor, k_limits_T: Tensor | None) -> str:
    """The reason why FlashAttention does not support a call, or an empty string."""
    head_dim = q_TNH.shape[2]
    if k_limits_T is not None:
        return "has no k_limits_T"
    if q_TNH.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16, not {q_TNH.dtype}"
    if head_dim % 8 or head_dim > MAX_HEAD_DIM:
        return f"supports head sizes that are multiples of 8 up to {MAX_HEAD_DIM}, not {head_dim}"
    if not q_TNH.is_cuda:
        return f"runs only on a GPU, but the tensors are on {q_TNH.device}"
    return ""


def _grouped(varlen_attn: Callable[..., Any], *, is_grouped: bool) -> dict[str, bool]:
    """The argument that newer versions need for grouped heads. torch 2.11 has none and accepts such heads."""
    return {"enable_gqa": is_grouped} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


@cache
def _varlen_attn() -> Callable[..., Any] | None:
    from torch.nn.attention.varlen import varlen_attn

    wanted = {"window_size", "scale"}
    return varlen_attn if wanted <= inspect.signature(varlen_attn).parameters.keys() else None
