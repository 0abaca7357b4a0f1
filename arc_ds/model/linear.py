"""A linear layer that keeps as little as possible for backward.

Under ZeRO-3 a parameter's data exist only while its module runs. `F.linear` saves a view of the gathered weight and so
keeps every gathered weight alive until backward; DeepSpeed's own replacement keeps the input even of frozen weights and
is patched into the whole process (design 8.6). This one keeps the parameter itself, whose data are gathered anew for
backward, and the input only where the weight is trained.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (x,) = ctx.saved_tensors
        grad_x = grads[0] @ ctx.weight if ctx.needs_input_grad[0] else None
        grad_weight = grads[0].T @ x if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight


class Linear(nn.Module):
    """y = x W' without bias, x [rows, in], W [out, in]; the weight is left uninitialised for a reader to fill."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features  # a partitioned weight has no shape of its own
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        return _LinearFunction.apply(x, self.weight)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}"
