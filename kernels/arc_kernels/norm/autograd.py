"""The norms as opaque operators with gradients, for torch.compile and autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from arc_kernels._layout import contiguous, rows, unit_stride
from arc_kernels.norm import kernels

norm_forward = torch.library.custom_op("arc_kernels::norm_forward", kernels.norm_forward, mutates_args=())


@norm_forward.register_fake
def _(
    x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_rows, width = x_TD.shape
    return (
        x_TD.new_empty(num_rows, width),
        x_TD.new_empty(0) if residual_TD is None else x_TD.new_empty(num_rows, width),
        x_TD.new_empty(num_rows if weight_D is None else 0, dtype=torch.float32),
        x_TD.new_empty(num_rows, dtype=torch.float32),
    )


@torch.library.custom_op("arc_kernels::norm_backward", mutates_args=())
def norm_backward(
    dnormed_TD: Tensor,
    dtotal_TD: Tensor | None,
    x_TD: Tensor,
    weight_D: Tensor | None,
    mean_T: Tensor,
    rstd_T: Tensor,
    wants_weight: bool,
) -> tuple[Tensor, Tensor]:
    """See `kernels.norm_backward`."""
    return kernels.norm_backward(
        unit_stride(dnormed_TD),
        None if dtotal_TD is None else unit_stride(dtotal_TD),
        x_TD,
        weight_D,
        mean_T,
        rstd_T,
        wants_weight=wants_weight,
    )


@norm_backward.register_fake
def _(
    dnormed_TD: Tensor, dtotal_TD: Tensor | None, x_TD: Tensor, weight_D: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor]:
    *_, wants_weight = others
    dweight_D = weight_D.new_empty(x_TD.shape[1]) if wants_weight and weight_D is not None else x_TD.new_empty(0)
    return x_TD.new_empty(x_TD.shape), dweight_D


class _Norm(torch.autograd.Function):
    """RMSNorm (LayerNorm if the weight is None) of x, or of a sum and also that sum, which is empty without a residual.

    One backward handles the gradients of both outputs.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        normed_TD, total_TD, mean_T, rstd_T = norm_forward(x_TD, residual_TD, weight_D, eps)
        ctx.adds = residual_TD is not None
        ctx.save_for_backward(total_TD if ctx.adds else x_TD, weight_D, mean_T, rstd_T)
        return normed_TD, total_TD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        wants_x, wants_residual, wants_weight, _ = ctx.needs_input_grad
        dtotal_TD = grads[1] if ctx.adds else None
        dx_TD, dweight_D = norm_backward(grads[0], dtotal_TD, *ctx.saved_tensors, wants_weight)
        return (
            dx_TD if wants_x else None,
            dx_TD if wants_residual else None,
            dweight_D if wants_weight else None,
            None,
        )


def norm_triton(x: Tensor, residual: Tensor | None, weight_D: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """See `add_rms_norm`, or `add_layer_norm` if the weight is None. The sum is empty without a residual."""
    normed_TD, total_TD = _Norm.apply(rows(x), None if residual is None else rows(residual), contiguous(weight_D), eps)
    return normed_TD.view(x.shape), total_TD if residual is None else total_TD.view(x.shape)
