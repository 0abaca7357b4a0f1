"""A linear layer that saves as little as possible for backward.

Under ZeRO-3 the data of a parameter exist only while its module runs. `F.linear` saves a view of the gathered weight,
which keeps every gathered weight alive until backward. DeepSpeed's own replacement saves the input even if the weight
is frozen, and it patches the whole process. This layer saves the parameter itself, whose data ZeRO-3 gathers again for
backward. It saves the input only if the weight is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Recomputed(NamedTuple):
    """The input of linears as a function of other tensors. Backward calls it again instead of keeping the input.

    recipe: the function. Parameters that it reads beyond `params` must be frozen.
    inputs: its arguments, which backward keeps.
    params: the parameters that it reads and whose gradients are wanted.
    """

    recipe: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    params: tuple[nn.Parameter, ...] = ()


class LoraAdapter(nn.Module):
    """B A x * scale, the trained addition to a frozen linear (Hu et al., arXiv 2106.09685). Uninitialised.

    rank: rows of A [rank, in] and columns of B [out, rank].
    scale: alpha / rank.
    """

    def __init__(self, in_features: int, out_features: int, *, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.a = nn.Parameter(torch.empty(rank, in_features))
        self.b = nn.Parameter(torch.empty(out_features, rank))


class GivenAdapter(NamedTuple):
    """An adapter of a decoder's linear, see `LoraAdapter`. Its matrices are results of another module."""

    a: Tensor
    b: Tensor
    scale: float


def _expand(adapter: LoraAdapter | GivenAdapter, low_TR: Tensor) -> Tensor:
    """The addition of an adapter, from the product with A."""
    (y,) = _LinearFunction.apply(low_TR * adapter.scale, adapter.b, None)
    return y


class _LinearFunction(torch.autograd.Function):
    """One or several weights, each with its bias or None, on one input.

    The matrix products accumulate the gradient of the input. Autograd would write one gradient per weight and add them
    in separate passes.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights_and_biases: Tensor | None) -> tuple[Tensor, ...]:
        ctx.weights = weights_and_biases[::2]
        ctx.save_for_backward(x if any(ctx.needs_input_grad[1::2]) else None)
        return _products(x, weights_and_biases)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        wants_x, *wants_parameters = ctx.needs_input_grad
        grad_x = _input_gradient(ctx.weights, grads) if wants_x else None
        return grad_x, *_parameter_gradients(x, grads, wants_parameters)


class _RecomputingLinearFunction(torch.autograd.Function):
    """`_LinearFunction` on the result of a recipe (`Recomputed`).

    The backward of the recipe is a graph of its own. No gradient hook of a parameter runs in it, unlike in reentrant
    checkpointing, so ZeRO-3 sees each gradient once.
    """

    @staticmethod
    def forward(ctx: Any, given: Recomputed, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        num_inputs, num_given = len(given.inputs), len(given.inputs) + len(given.params)
        inputs, weights_and_biases = tensors[:num_inputs], tensors[num_given:]
        ctx.recipe, ctx.params = given.recipe, given.params
        ctx.weights = weights_and_biases[::2]
        ctx.save_for_backward(*inputs)
        return _products(given.recipe(*inputs), weights_and_biases)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        num_given = len(inputs) + len(ctx.params)
        wants_given, wants_parameters = ctx.needs_input_grad[1 : 1 + num_given], ctx.needs_input_grad[1 + num_given :]
        with torch.enable_grad():
            pairs = zip(inputs, wants_given, strict=False)
            leaves = [tensor.detach().requires_grad_(wants) for tensor, wants in pairs]
            x = ctx.recipe(*leaves)
        given = [*leaves, *ctx.params]
        of_given: list[Tensor | None] = [None] * num_given
        if wanted := [idx for idx, wants in enumerate(wants_given) if wants]:
            grad_x = _input_gradient(ctx.weights, grads)
            found = torch.autograd.grad(x, [given[idx] for idx in wanted], grad_x)
            for idx, grad in zip(wanted, found, strict=True):
                of_given[idx] = grad
        return None, *of_given, *_parameter_gradients(x.detach(), grads, wants_parameters)


def _products(x: Tensor, weights_and_biases: Sequence[Any]) -> tuple[Tensor, ...]:
    pairs = zip(weights_and_biases[::2], weights_and_biases[1::2], strict=True)
    return tuple(x @ weight.T if bias is None else torch.addmm(bias, x, weight.T) for weight, bias in pairs)


def _input_gradient(weights: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    grad_x = grads[0] @ weights[0]
    for grad, weight in zip(grads[1:], weights[1:], strict=True):
        grad_x.addmm_(grad, weight)
    return grad_x


def _parameter_gradients(x: Tensor | None, grads: Sequence[Tensor], wants: Sequence[bool]) -> list[Tensor | None]:
    """Gradients of each weight and bias, in their order. x may be None if no weight is trained."""
    found: list[Tensor | None] = []
    for grad, wants_weight, wants_bias in zip(grads, wants[::2], wants[1::2], strict=True):
        of_weight = grad.T @ x if wants_weight and x is not None else None
        found += [of_weight, grad.sum(dim=0) if wants_bias else None]
    return found


def joint_linear(x: Tensor | Recomputed, linears: Sequence[Linear]) -> tuple[Tensor, ...]:
    """`[linear(x) for linear in linears]`, with a backward that writes the gradient of x once.

    x: [rows, in], or how backward computes it again.
    linears: layers with the same input size. Their own hooks do not run: under ZeRO-3 they belong to a module that is
        gathered as a whole (`Block`).
    """
    adapters = [linear.adapter for linear in linears if linear.adapter is not None]
    tensors: list[Tensor | None] = [tensor for linear in linears for tensor in (linear.weight, linear.bias)]
    tensors += [tensor for adapter in adapters for tensor in (adapter.a, None)]
    if isinstance(x, Recomputed):
        products = _RecomputingLinearFunction.apply(x, *x.inputs, *x.params, *tensors)
    else:
        products = _LinearFunction.apply(x, *tensors)
    if not adapters:
        return products
    low = iter(products[len(linears) :])
    return tuple(
        y if linear.adapter is None else y + _expand(linear.adapter, next(low))
        for y, linear in zip(products, linears, strict=False)
    )


class Linear(nn.Module):
    """y = x W' + b, x [rows, in], W [out, in]. The parameters are uninitialised until a reader fills them.

    bias: whether there is a bias b [out].
    adapter: a trained addition (`lora.add_adapters`, `decoder_adapters.give_adapters`); None for none.
    """

    adapter: LoraAdapter | GivenAdapter | None

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features  # a partitioned weight loses its shape
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.adapter = None

    def forward(self, x: Tensor | Recomputed) -> Tensor:
        (y,) = joint_linear(x, (self,))
        return y

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}"


class FrozenLinear(nn.Linear):
    """Torch's linear layer [..., in] with frozen parameters. Backward reads the weight from the parameter."""

    def forward(self, x: Tensor) -> Tensor:
        (y,) = _LinearFunction.apply(x.flatten(0, -2), self.weight, self.bias)
        return y.unflatten(0, x.shape[:-1])
