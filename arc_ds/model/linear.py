"""A linear layer that saves as little as possible for backward.

Under ZeRO-3 the data of a parameter exist only while its module runs. `F.linear` saves a view of the gathered weight,
which keeps every gathered weight alive until backward. DeepSpeed's own replacement saves the input even if the weight
is frozen, and it patches the whole process. This layer saves the parameter itself, whose data ZeRO-3 gathers again for
backward. It saves the input only if the weight is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class _LinearFunction(torch.autograd.Function):
    """One or several weights on one input. The matrix products accumulate the gradient of the input.

    Autograd would write one gradient per weight and add them in separate passes.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.weights = weights
        ctx.save_for_backward(x if any(ctx.needs_input_grad[1:]) else None)
        return tuple(x @ weight.T for weight in weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        wants_x, *wants_weights = ctx.needs_input_grad
        grad_x = None
        if wants_x:
            grad_x = grads[0] @ ctx.weights[0]
            for grad, weight in zip(grads[1:], ctx.weights[1:], strict=True):
                grad_x.addmm_(grad, weight)
        grad_weights = (grad.T @ x if wanted else None for grad, wanted in zip(grads, wants_weights, strict=True))
        return grad_x, *grad_weights


def joint_linear(x: Tensor, linears: Sequence[Linear]) -> tuple[Tensor, ...]:
    """`[linear(x) for linear in linears]`, with a backward that writes the gradient of x once.

    x: [rows, in].
    linears: layers with the same input size. Their own hooks do not run: under ZeRO-3 they belong to a module that is
        gathered as a whole (`Block`).
    """
    return _LinearFunction.apply(x, *(linear.weight for linear in linears))


class Linear(nn.Module):
    """y = x W' without bias, x [rows, in], W [out, in]. The weight is uninitialised until a reader fills it."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features  # a partitioned weight loses its shape
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        (y,) = _LinearFunction.apply(x, self.weight)
        return y

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}"


class FrozenLinear(nn.Linear):
    """Torch's linear layer with a frozen weight, which backward reads from the parameter."""

    def forward(self, x: Tensor) -> Tensor:
        (y,) = _LinearFunction.apply(x, self.weight)
        return y if self.bias is None else y + self.bias
