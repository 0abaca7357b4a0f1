"""Varlen attention as opaque operators with their gradient: what torch.compile and checkpointing see of the kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from arc_kernels.attention import kernels


@torch.library.custom_op("arc_kernels::attention_forward", mutates_args=())
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    k_limits: Tensor | None,
    max_seqlen_q: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention [T, N, H] and its log-sum-exp [T, N]; see `kernels.forward`."""
    return kernels.forward(q, k, v, _spans(cu_seqlens_q, cu_seqlens_k, k_limits, max_seqlen_q, causal, scale))


@attention_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    k_limits: Tensor | None,
    max_seqlen_q: int,
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
    causal: bool,
    scale: float,
    wants_q: bool,
    wants_kv: bool,
) -> list[Tensor]:
    """The gradients of q, if wanted, then those of k and v, if wanted; o and do contiguous."""
    spans = _spans(cu_seqlens_q, cu_seqlens_k, k_limits, max_seqlen_q, causal, scale)
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
        causal: bool,
        scale: float,
    ) -> Tensor:
        o, lse = attention_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, k_limits, max_seqlen_q, causal, scale)
        ctx.save_for_backward(q, k, v, o, lse, cu_seqlens_q, cu_seqlens_k, k_limits)
        ctx.settings = (max_seqlen_q, causal, scale)
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, o, lse, cu_seqlens_q, cu_seqlens_k, k_limits = ctx.saved_tensors
        wants_q, wants_kv = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3])
        spans = (cu_seqlens_q, cu_seqlens_k, k_limits, *ctx.settings)
        gradients = attention_backward(q, k, v, o, do.contiguous(), lse, *spans, wants_q, wants_kv)
        dq = gradients[0] if wants_q else None
        dk, dv = gradients[-2:] if wants_kv else (None, None)
        return dq, dk, dv, None, None, None, None, None, None


def _spans(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, k_limits: Tensor | None, max_seqlen_q: int, causal: bool, scale: float
) -> kernels.Spans:
    return kernels.Spans(
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        k_limits=k_limits,
        max_seqlen_q=max_seqlen_q,
        causal=causal,
        scale=scale,
    )
