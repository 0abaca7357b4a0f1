"""Varlen attention as opaque operators with gradients, for torch.compile and activation checkpointing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from arc_kernels._layout import contiguous
from arc_kernels.attention import kernels
from arc_kernels.attention.configs import MAX_HEAD_DIM
from arc_kernels.attention.segments import Rotation, Segments
from arc_kernels.rotary.autograd import rotate


@torch.library.custom_op("arc_kernels::attention_forward", mutates_args=())
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_q: Tensor | None,
    sin_q: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    k_limits: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float,
    window: int | None,
    keeps_turned: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention [T, N, H], its log-sum-exp [T, N], and the rotated queries if requested; see `kernels.forward`."""
    segments = Segments(cu_seqlens_q, cu_seqlens_k, k_limits, max_seqlen_q, max_seqlen_k, causal, scale, window)
    return kernels.forward(q, k, v, segments, angles=_angles(cos_q, sin_q), keeps_turned=keeps_turned)


@attention_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cos_q: Tensor | None, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, keeps_turned = others
    q_turned = q.new_empty(q.shape) if keeps_turned and cos_q is not None else q.new_empty(0)
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32), q_turned


@torch.library.custom_op("arc_kernels::attention_backward", mutates_args=())
def attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    do: Tensor,
    lse: Tensor,
    cos_q: Tensor | None,
    sin_q: Tensor | None,
    cos_k: Tensor | None,
    sin_k: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    k_limits: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float,
    window: int | None,
    wants_q: bool,
    wants_kv: bool,
) -> list[Tensor]:
    """The requested gradients: of q, then of k and v. o and do are contiguous; q and k are rotated."""
    segments = Segments(cu_seqlens_q, cu_seqlens_k, k_limits, max_seqlen_q, max_seqlen_k, causal, scale, window)
    delta = kernels.delta(o, do)
    gradients = [kernels.dq(q, k, v, do, lse, delta, segments, angles=_angles(cos_q, sin_q))] if wants_q else []
    if wants_kv:
        gradients += kernels.dkv(q, k, v, do, lse, delta, segments, angles=_angles(cos_k, sin_k))
    return gradients


@attention_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> list[Tensor]:
    *_, wants_q, wants_kv = others
    return [x.new_empty(x.shape) for x in ((q,) if wants_q else ()) + ((k, v) if wants_kv else ())]


class Attention(torch.autograd.Function):
    """attention_varlen with the Triton kernels.

    settings: the arguments of the operators that are neither tensors nor flags: max_seqlen_q, max_seqlen_k, causal,
        scale and window.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos_q: Tensor | None,
        sin_q: Tensor | None,
        cos_k: Tensor | None,
        sin_k: Tensor | None,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        k_limits: Tensor | None,
        settings: tuple[int, int, bool, float, int | None],
        wants_grad: bool,
    ) -> Tensor:
        if cos_k is not None and sin_k is not None:
            k = rotate(k, cos_k, sin_k, False)
        segments = (cu_seqlens_q, cu_seqlens_k, k_limits)
        o, lse, q_turned = attention_forward(q, k, v, cos_q, sin_q, *segments, *settings, wants_grad)
        # Backward reads the rotated queries and keys, so the original ones are not saved.
        q = q if cos_q is None else q_turned
        ctx.save_for_backward(q, k, v, o, lse, cos_q, sin_q, cos_k, sin_k, *segments)
        ctx.settings = settings
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, o, lse, *others = ctx.saved_tensors
        wants_q, wants_kv = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3])
        gradients = attention_backward(q, k, v, o, do.contiguous(), lse, *others, *ctx.settings, wants_q, wants_kv)
        dq = gradients[0] if wants_q else None
        dk, dv = gradients[-2:] if wants_kv else (None, None)
        return dq, dk, dv, *(None,) * 9


def attention_varlen_triton(
    q_TNH: Tensor,
    k_UKH: Tensor,
    v_UKH: Tensor,
    segments: Segments,
    *,
    rotary_q: Rotation | None = None,
    rotary_k: Rotation | None = None,
) -> Tensor:
    """See `attention_varlen`. Does not check arguments again.

    Rows of q, k and v may have any stride if each row is contiguous: a slice of a fused projection is read in place.
    Other layouts are copied. Raises ValueError on a head size of 0 or above 256.
    """
    if not 1 <= q_TNH.shape[2] <= MAX_HEAD_DIM:
        raise ValueError(
            f"the head size of q_TNH is {q_TNH.shape[2]}; the Triton kernels support 1 … {MAX_HEAD_DIM}: call under "
            "arc_kernels.use('reference'), or with backend='reference'"
        )
    inputs = tuple(x if _rows_are_contiguous(x) else x.contiguous() for x in (q_TNH, k_UKH, v_UKH))
    # Decide this here: gradients are disabled inside the Function, and requires_grad is also True under no_grad.
    wants_grad = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    return Attention.apply(
        *inputs,
        *map(contiguous, (*(rotary_q or (None, None)), *(rotary_k or (None, None)))),
        *map(contiguous, segments[:3]),
        segments[3:],
        wants_grad,
    )


def _angles(cos: Tensor | None, sin: Tensor | None) -> Rotation | None:
    return None if cos is None or sin is None else (cos, sin)


def _rows_are_contiguous(x: Tensor) -> bool:
    return x.stride(2) == 1 and x.stride(1) == x.shape[2]
