"""The linear layer: same gradients as torch, and no unneeded tensors saved for backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from arc_ds.model.linear import Linear, joint_linear


def test_output_and_gradients_are_those_of_torchs_linear() -> None:
    x, linear = _inputs()
    towards = torch.randn(5, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ours = torch.autograd.grad((linear(x) * towards).sum(), (x, linear.weight))
    torchs = torch.autograd.grad((F.linear(x, linear.weight) * towards).sum(), (x, linear.weight))
    for got, wanted in zip(ours, torchs, strict=True):
        assert wanted.abs().max() > 0
        assert torch.equal(got, wanted)


@pytest.mark.parametrize(("trained", "kept"), [(True, 1), (False, 0)])
def test_the_input_is_kept_only_for_a_trained_weight(trained: bool, kept: int) -> None:
    x, linear = _inputs()
    linear.requires_grad_(trained)
    packed: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        y = linear(x)
    assert [t.shape for t in packed] == [x.shape] * kept  # the weight is never saved
    y.sum().backward()
    assert x.grad is not None and (linear.weight.grad is not None) == trained


def test_an_input_without_gradient_gets_none_and_makes_no_graph_if_the_layer_is_frozen() -> None:
    x, linear = _inputs()
    linear(x.detach()).sum().backward()
    assert x.grad is None and linear.weight.grad.abs().max() > 0
    assert not linear.requires_grad_(False)(x.detach()).requires_grad


def test_no_rows_give_no_rows_and_a_zero_gradient() -> None:
    _, linear = _inputs()
    y = linear(torch.zeros(0, 4, dtype=torch.float64))
    y.sum().backward()
    assert y.shape == (0, 3) and not linear.weight.grad.any()


def test_joint_linears_are_the_single_ones() -> None:
    """Compare outputs and gradients. An implementation that omits one product would halve the input's gradient."""
    x, first = _inputs()
    second = Linear(4, 2).double()
    second.weight.data = first.weight.detach()[:2] * 3.0 + 1.0
    towards = [torch.randn(5, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (3, 2)]

    def gradients(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        loss = sum((y * t).sum() for y, t in zip(outputs, towards, strict=True))
        return torch.autograd.grad(loss, (x, first.weight, second.weight))

    apart, joint = (first(x), second(x)), joint_linear(x, (first, second))
    assert all(torch.equal(got, wanted) for got, wanted in zip(joint, apart, strict=True))
    wanted = gradients(apart)
    for got, expected in zip(gradients(joint), wanted, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)
    alone = torch.autograd.grad((first(x) * towards[0]).sum(), x)[0]
    assert not torch.allclose(wanted[0], alone)


def test_joint_linears_of_which_one_is_frozen_or_unused() -> None:
    x, first = _inputs()
    second = Linear(4, 2).double()
    second.weight.data = torch.ones(2, 4, dtype=torch.float64)
    second.requires_grad_(False)
    y, unused = joint_linear(x, (first, second))
    y.sum().backward()
    assert unused.requires_grad and second.weight.grad is None
    assert torch.equal(x.grad, torch.ones(5, 3, dtype=torch.float64) @ first.weight)


def test_biases_have_the_output_and_the_gradients_of_torchs_linear() -> None:
    """Also jointly with a linear without bias, and without a trained weight, which needs no input."""
    x, plain = _inputs()
    biased = Linear(4, 3, bias=True).double()
    biased.weight.data = plain.weight.detach() * 2.0 + 1.0
    biased.bias.data = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    towards = torch.randn(5, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    inputs = (x, biased.weight, biased.bias)
    ours = torch.autograd.grad((biased(x) * towards).sum(), inputs)
    torchs = torch.autograd.grad((F.linear(x, biased.weight, biased.bias) * towards).sum(), inputs)
    for got, wanted in zip(ours, torchs, strict=True):
        assert wanted.abs().max() > 0
        torch.testing.assert_close(got, wanted, rtol=1e-14, atol=1e-14)
    joint = joint_linear(x, (plain, biased))
    assert torch.equal(joint[0], plain(x)) and torch.equal(joint[1], biased(x))
    biased.weight.requires_grad_(False)
    (of_bias,) = torch.autograd.grad((biased(x.detach()) * towards).sum(), biased.bias)
    assert torch.equal(of_bias, ours[2])


def _inputs() -> tuple[Tensor, Linear]:
    generator = torch.Generator().manual_seed(0)
    linear = Linear(4, 3).double()
    linear.weight.data = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    return torch.randn(5, 4, generator=generator, dtype=torch.float64).requires_grad_(), linear
