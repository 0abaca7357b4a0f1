"""Varlen attention as opaque operators with their gradient: what torch.compile and checkpointing see of the kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from arc_kernels.attention import kernels
from arc_kernels.attention.configs import MAX_HEAD_DIM


@torch.library.custom_op("arc_kernels::attention_forward", mutates_args=())
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    k_limits: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention [T, N, H] and its log-sum-exp [T, N]; see `kernels.forward`."""
    spans = kernels.Spans(cu_seqlens_q, cu_seqlens_k, k_limits, max_seqlen_q, max_seqlen_k, causal, scale)
    return kernels.forward(q, k, v, spans)


@attention_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    k_limits: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.custom_op("arc_kernels::attention_backward", mutates_args=())
def attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    do: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    k_limits: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float,
    wants_q: bool,
    wants_kv: bool,
) -> list[Tensor]:
    """The gradients of q, if wanted, then those of k and v, if wanted; o and do contiguous."""
    spans = kernels.Spans(cu_seqlens_q, cu_seqlens_k, k_limits, max_seqlen_q, max_seqlen_k, causal, scale)
    delta = kernels.delta(o, do)
    gradients = [kernels.dq(q, k, v, do, lse, delta, spans)] if wants_q else []
    return [*gradients, *kernels.dkv(q, k, v, do, lse, delta, spans)] if wants_kv else gradients


@attention_backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    do: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    k_limits: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float,
    wants_q: bool,
    wants_kv: bool,
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in ((q,) if wants_q else ()) + ((k, v) if wants_kv else ())]


class Attention(torch.autograd.Function):
    """attention_varlen by the kernels; arguments of `apply` as those of `attention_forward`."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        k_limits: Tensor | None,
        max_seqlen_q: int,
        max_seqlen_k: int,
        causal: bool,
        scale: float,
    ) -> Tensor:
        settings = (max_seqlen_q, max_seqlen_k, causal, scale)
        o, lse = attention_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, k_limits, *settings)
        ctx.save_for_backward(q, k, v, o, lse, cu_seqlens_q, cu_seqlens_k, k_limits)
        ctx.settings = settings
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, o, lse, cu_seqlens_q, cu_seqlens_k, k_limits = ctx.saved_tensors
        wants_q, wants_kv = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3])
        spans = (cu_seqlens_q, cu_seqlens_k, k_limits, *ctx.settings)
        gradients = attention_backward(q, k, v, o, do.contiguous(), lse, *spans, wants_q, wants_kv)
        dq = gradients[0] if wants_q else None
        dk, dv = gradients[-2:] if wants_kv else (None, None)
        return dq, dk, dv, None, None, None, None, None, None, None


def attention_varlen_triton(
    q_TNH: Tensor,
    k_UKH: Tensor,
    v_UKH: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    k_limits_T: Tensor | None,
    scale: float,
) -> Tensor:
    """See `attention_varlen`; arguments are taken as checked.

    Rows of q, k and v may lie at any distance (a slice of a fused projection is read in place) as long as each row is
    contiguous; anything else is copied. ValueError on a head size of 0 or above 256.
    """
    if not 1 <= q_TNH.shape[2] <= MAX_HEAD_DIM:
        raise ValueError(
            f"the head size of q_TNH is {q_TNH.shape[2]}; the Triton kernels take 1 … {MAX_HEAD_DIM}: call under "
            "arc_kernels.use('reference'), or with backend='reference'"
        )
    q_TNH, k_UKH, v_UKH = (x if _rows_are_contiguous(x) else x.contiguous() for x in (q_TNH, k_UKH, v_UKH))
    cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    k_limits_T = None if k_limits_T is None else k_limits_T.contiguous()
    return Attention.apply(
        q_TNH, k_UKH, v_UKH, cu_seqlens_q, cu_seqlens_k, k_limits_T, max_seqlen_q, max_seqlen_k, causal, scale
    )


def _rows_are_contiguous(x: Tensor) -> bool:
    return x.stride(2) == 1 and x.stride(1) == x.shape[2]
