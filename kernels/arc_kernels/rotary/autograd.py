"""Rotary as an opaque operator with a gradient, for torch.compile and autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from arc_kernels._layout import unit_stride
from arc_kernels.rotary import kernels


@torch.library.custom_op("arc_kernels::rotary", mutates_args=())
def rotate(x_TNH: Tensor, cos_TF: Tensor, sin_TF: Tensor, inverse: bool) -> Tensor:
    """See `kernels.rotate`."""
    return kernels.rotate(unit_stride(x_TNH), cos_TF, sin_TF, inverse=inverse)


@rotate.register_fake
def _(x_TNH: Tensor, cos_TF: Tensor, sin_TF: Tensor, inverse: bool) -> Tensor:
    return x_TNH.new_empty(x_TNH.shape)


class RotaryFunction(torch.autograd.Function):
    """`rotary` with the Triton kernel. The angles are contiguous."""

    @staticmethod
    def forward(ctx: Any, x_TNH: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TF, sin_TF)
        return rotate(x_TNH, cos_TF, sin_TF, False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return rotate(grads[0], *ctx.saved_tensors, True), None, None
