"""Linear cross-entropy as torch operators with a gradient.

Forward computes the gradient of the rows and backward only scales it, so neither logits nor weight are saved.

Shape letters: L rows, V vocabulary, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from arc_kernels.cross_entropy.kernels import losses_and_gradient, scale_rows


def linear_cross_entropy_triton(h_LD: Tensor, weight_VD: Tensor, labels_L: Tensor) -> Tensor:
    """See `linear_cross_entropy`."""
    # Decide this here: gradients are disabled inside the Function, and requires_grad is also True under no_grad.
    wants_grad = torch.is_grad_enabled() and h_LD.requires_grad
    return _LinearCrossEntropy.apply(h_LD, weight_VD, labels_L, wants_grad)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_LD: Tensor, weight_VD: Tensor, labels_L: Tensor, wants_grad: bool) -> Tensor:
        nll_L, grad_LD = _losses_and_gradient(h_LD, weight_VD, labels_L, wants_grad)
        ctx.save_for_backward(grad_LD)
        return nll_L

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad_LD,) = ctx.saved_tensors
        return _scale_rows(grad_LD, grads[0]), None, None, None


@torch.library.custom_op("arc_kernels::linear_cross_entropy", mutates_args=())
def _losses_and_gradient(h_LD: Tensor, weight_VD: Tensor, labels_L: Tensor, wants_grad: bool) -> tuple[Tensor, Tensor]:
    return losses_and_gradient(h_LD.contiguous(), weight_VD, labels_L.contiguous(), wants_grad=wants_grad)


@_losses_and_gradient.register_fake
def _(h_LD: Tensor, weight_VD: Tensor, labels_L: Tensor, wants_grad: bool) -> tuple[Tensor, Tensor]:
    num_rows, width = h_LD.shape
    return h_LD.new_empty(num_rows, dtype=torch.float32), h_LD.new_empty(num_rows if wants_grad else 0, width)


@torch.library.custom_op("arc_kernels::scale_rows", mutates_args=())
def _scale_rows(x_LD: Tensor, scale_L: Tensor) -> Tensor:
    return scale_rows(x_LD.contiguous(), scale_L.contiguous())


@_scale_rows.register_fake
def _(x_LD: Tensor, scale_L: Tensor) -> Tensor:
    return x_LD.new_empty(x_LD.shape)
