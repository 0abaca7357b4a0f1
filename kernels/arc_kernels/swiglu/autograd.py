"""SwiGLU as opaque operators with gradients, for torch.compile and autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from arc_kernels._layout import rows, unit_stride
from arc_kernels.swiglu import kernels

swiglu_forward = torch.library.custom_op("arc_kernels::swiglu_forward", kernels.swiglu_forward, mutates_args=())


@swiglu_forward.register_fake
def _(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    return gate_TF.new_empty(gate_TF.shape)


@torch.library.custom_op("arc_kernels::swiglu_backward", mutates_args=())
def swiglu_backward(dy_TF: Tensor, gate_TF: Tensor, up_TF: Tensor) -> tuple[Tensor, Tensor]:
    """See `kernels.swiglu_backward`."""
    return kernels.swiglu_backward(unit_stride(dy_TF), gate_TF, up_TF)


@swiglu_backward.register_fake
def _(dy_TF: Tensor, gate_TF: Tensor, up_TF: Tensor) -> tuple[Tensor, Tensor]:
    return gate_TF.new_empty(gate_TF.shape), up_TF.new_empty(up_TF.shape)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_TF: Tensor, up_TF: Tensor) -> Tensor:
        ctx.save_for_backward(gate_TF, up_TF)
        return swiglu_forward(gate_TF, up_TF)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        wants_gate, wants_up = ctx.needs_input_grad
        # One pass computes both gradients. A graph with only gate or only up does not justify a second kernel.
        dgate_TF, dup_TF = swiglu_backward(grads[0], *ctx.saved_tensors)
        return dgate_TF if wants_gate else None, dup_TF if wants_up else None


def swiglu_triton(gate: Tensor, up: Tensor) -> Tensor:
    """See `swiglu`."""
    return _SwiGLU.apply(rows(gate), rows(up)).view(gate.shape)
