"""The pooling kernels as torch operators with gradients.

The launches are opaque operators (torch.library), so torch.compile does not trace into them. The gradient is an
autograd.Function over them, which saves the weight as the caller's own tensor: ZeRO-3 gathers its data again for
backward.

Shape letters: T rows, G groups, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from arc_kernels._layout import contiguous
from arc_kernels.pooling.kernels import pool_backward, pool_forward


class GroupPoolFunction(torch.autograd.Function):
    """`group_pool` with the Triton kernels."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, group_cu: Tensor, kind: str) -> Tensor:
        # Without a norm, only "fusion" needs the rows again, for their norms.
        ctx.save_for_backward(group_cu, x_TD if kind == "fusion" else None)
        ctx.num_rows, ctx.kind = x_TD.shape[0], kind
        return _group_pool(x_TD, group_cu, kind)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        group_cu, x_TD = ctx.saved_tensors
        return _group_pool_backward(grads[0], group_cu, x_TD, ctx.num_rows, ctx.kind), None, None


class PoolNormFunction(torch.autograd.Function):
    """`pool_norm` with the Triton kernels."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, group_cu: Tensor, weight_D: Tensor | None, kind: str, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        pooled_GD, normed_pooled_GD, normed_TD = _pool_norm(x_TD, group_cu, weight_D, kind, eps)
        ctx.save_for_backward(x_TD, group_cu, weight_D, pooled_GD)
        ctx.kind, ctx.eps = kind, eps
        return pooled_GD, normed_pooled_GD, normed_TD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None, None, None]:
        x_TD, group_cu, weight_D, pooled_GD = ctx.saved_tensors
        wants_x, _, wants_weight, _, _ = ctx.needs_input_grad
        dx_TD, dweight_D = _pool_norm_backward(
            *grads, x_TD, group_cu, weight_D, pooled_GD, ctx.kind, ctx.eps, wants_weight
        )
        return dx_TD if wants_x else None, None, dweight_D if wants_weight else None, None, None


@torch.library.custom_op("arc_kernels::group_pool", mutates_args=())
def _group_pool(x_TD: Tensor, group_cu: Tensor, kind: str) -> Tensor:
    return pool_forward(x_TD.contiguous(), group_cu.contiguous(), kind=kind, norm="none")[0]


@_group_pool.register_fake
def _(x_TD: Tensor, group_cu: Tensor, kind: str) -> Tensor:
    return x_TD.new_empty(group_cu.shape[0] - 1, x_TD.shape[1])


@torch.library.custom_op("arc_kernels::group_pool_backward", mutates_args=())
def _group_pool_backward(dpooled_GD: Tensor, group_cu: Tensor, x_TD: Tensor | None, num_rows: int, kind: str) -> Tensor:
    dx_TD, _ = pool_backward(
        dpooled_GD.contiguous(),
        group_cu.contiguous(),
        num_rows=num_rows,
        x_TD=contiguous(x_TD),
        kind=kind,
        norm="none",
    )
    return dx_TD


@_group_pool_backward.register_fake
def _(dpooled_GD: Tensor, group_cu: Tensor, x_TD: Tensor | None, num_rows: int, kind: str) -> Tensor:
    return dpooled_GD.new_empty(num_rows, dpooled_GD.shape[1])


@torch.library.custom_op("arc_kernels::pool_norm", mutates_args=())
def _pool_norm(
    x_TD: Tensor, group_cu: Tensor, weight_D: Tensor | None, kind: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return pool_forward(
        x_TD.contiguous(),
        group_cu.contiguous(),
        kind=kind,
        norm="layer" if weight_D is None else "rms",
        weight_D=contiguous(weight_D),
        eps=eps,
    )


@_pool_norm.register_fake
def _(x_TD: Tensor, group_cu: Tensor, weight_D: Tensor | None, kind: str, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    pooled_GD = x_TD.new_empty(group_cu.shape[0] - 1, x_TD.shape[1])
    return pooled_GD, torch.empty_like(pooled_GD), x_TD.new_empty(x_TD.shape)


@torch.library.custom_op("arc_kernels::pool_norm_backward", mutates_args=())
def _pool_norm_backward(
    dpooled_GD: Tensor,
    dnormed_pooled_GD: Tensor,
    dnormed_TD: Tensor,
    x_TD: Tensor,
    group_cu: Tensor,
    weight_D: Tensor | None,
    pooled_GD: Tensor,
    kind: str,
    eps: float,
    wants_weight: bool,
) -> tuple[Tensor, Tensor]:
    return pool_backward(
        dpooled_GD.contiguous(),
        group_cu.contiguous(),
        dnormed_pooled_GD=dnormed_pooled_GD.contiguous(),
        dnormed_TD=dnormed_TD.contiguous(),
        num_rows=x_TD.shape[0],
        x_TD=x_TD.contiguous(),
        pooled_GD=pooled_GD,
        kind=kind,
        norm="layer" if weight_D is None else "rms",
        weight_D=contiguous(weight_D),
        eps=eps,
        wants_weight=wants_weight,
    )


@_pool_norm_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    x_TD, weight_D, wants_weight = arguments[3], arguments[5], arguments[-1]
    dweight_D = x_TD.new_empty(0) if weight_D is None or not wants_weight else weight_D.new_empty(weight_D.shape)
    return x_TD.new_empty(x_TD.shape), dweight_D
