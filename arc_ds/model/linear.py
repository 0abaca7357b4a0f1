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
    """One or several weights, each with its bias or None, on one input.

    The matrix products accumulate the gradient of the input. Autograd would write one gradient per weight and add them
    in separate passes.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights_and_biases: Tensor | None) -> tuple[Tensor, ...]:
        weights, biases = weights_and_biases[::2], weights_and_biases[1::2]
        ctx.weights = weights
        ctx.save_for_backward(x if any(ctx.needs_input_grad[1::2]) else None)
        return tuple(_product(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        wants_x, *wants_parameters = ctx.needs_input_grad
        grad_x = None
        if wants_x:
            grad_x = grads[0] @ ctx.weights[0]
            for grad, weight in zip(grads[1:], ctx.weights[1:], strict=True):
                grad_x.addmm_(grad, weight)
        of_parameters: list[Tensor | None] = []
        for grad, wants_weight, wants_bias in zip(grads, wants_parameters[::2], wants_parameters[1::2], strict=True):
            of_parameters += [grad.T @ x if wants_weight else None, grad.sum(dim=0) if wants_bias else None]
        return grad_x, *of_parameters


def _product(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    assert weight is not None
    return x @ weight.T if bias is None else torch.addmm(bias, x, weight.T)


def joint_linear(x: Tensor, linears: Sequence[Linear]) -> tuple[Tensor, ...]:
    """`[linear(x) for linear in linears]`, with a backward that writes the gradient of x once.

    x: [rows, in].
    linears: layers with the same input size. Their own hooks do not run: under ZeRO-3 they belong to a module that is
        gathered as a whole (`Block`).
    """
    return _LinearFunction.apply(x, *(tensor for linear in linears for tensor in (linear.weight, linear.bias)))


class Linear(nn.Module):
    """y = x W' + b, x [rows, in], W [out, in]. The parameters are uninitialised until a reader fills them.

    bias: whether there is a bias b [out].
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features  # a partitioned weight loses its shape
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        (y,) = _LinearFunction.apply(x, self.weight, self.bias)
        return y

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}"


class FrozenLinear(nn.Linear):
    """Torch's linear layer with a frozen weight, which backward reads from the parameter."""

    def forward(self, x: Tensor) -> Tensor:
        (y,) = _LinearFunction.apply(x, self.weight, None)
        return y if self.bias is None else y + self.bias
