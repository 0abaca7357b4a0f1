"""Norms, rotary, SwiGLU and splice in plain torch against their definitions in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import arc_kernels as ak

EXACT = 1e-14  # measured worst 9e-16, values of order one


def test_rms_norm_is_torchs() -> None:
    x, weight = _random(5, 6), _random(6)
    expected = F.rms_norm(x, (6,), weight, 1e-5)
    _equal_with_gradients(ak.rms_norm(x, weight, 1e-5), expected, (x, weight))


def test_rms_norm_does_not_take_the_mean_away() -> None:
    x = torch.full((1, 6), 3.0, dtype=torch.float64)
    assert torch.allclose(ak.rms_norm(x, torch.ones(6).double(), 0.0), torch.ones(1, 6).double())


def test_add_rms_norm_returns_the_norm_of_the_sum_and_the_sum() -> None:
    x, residual, weight = _random(5, 6), _random(5, 6, seed=1), _random(6)
    normed, total = ak.add_rms_norm(x, residual, weight, 1e-5)
    _equal_with_gradients(normed, F.rms_norm(x + residual, (6,), weight, 1e-5), (x, residual, weight))
    assert torch.equal(total, x + residual)


def test_layer_norm_has_mean_variance_and_no_parameters() -> None:
    x = _random(5, 6)
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    _equal_with_gradients(ak.layer_norm(x, 1e-5), expected, (x,))


def test_statistics_of_bfloat16_rows_are_float32() -> None:
    x = _random(4, 512).detach()
    low = x.bfloat16()
    exact = F.rms_norm(low.double(), (512,), torch.ones(512).double(), 1e-5)
    ours = ak.rms_norm(low, torch.ones(512), 1e-5)
    assert ours.dtype == torch.bfloat16
    assert ((ours.double() - exact) / exact.abs().clamp(min=1e-3)).abs().max() <= 2**-8  # one rounding


def test_rotary_is_multiplication_with_a_complex_number() -> None:
    x = _random(5, 3, 8)
    angles = torch.rand(5, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 6.0
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    _equal_with_gradients(ak.rotary(x, angles.cos(), angles.sin()), expected, (x,))


def test_rotary_products_depend_on_the_difference_of_positions_alone() -> None:
    q, k = _random(1, 1, 8).detach(), _random(1, 1, 8, seed=1).detach()
    frequencies = torch.tensor([1.0, 0.1, 0.01, 0.001], dtype=torch.float64)

    def product(q_position: int, k_position: int) -> float:
        at = [(p * frequencies)[None] for p in (q_position, k_position)]
        return (ak.rotary(q, at[0].cos(), at[0].sin()) * ak.rotary(k, at[1].cos(), at[1].sin())).sum().item()

    assert abs(product(7, 4) - product(103, 100)) < 1e-12
    assert abs(product(7, 4) - product(7, 5)) > 1e-3


def test_swiglu_gates_with_the_first_argument() -> None:
    gate, up = _random(4, 6), _random(4, 6, seed=1)
    _equal_with_gradients(ak.swiglu(gate, up), gate / (1 + torch.exp(-gate)) * up, (gate, up))
    assert (ak.swiglu(gate, up) - ak.swiglu(up, gate)).abs().max() > 0.1


@given(st.permutations(range(7)), st.integers(0, 7))
def test_splice_writes_every_row_where_it_belongs(rows: list[int], num_given: int) -> None:
    text_rows, given_rows = torch.tensor(rows[num_given:]).long(), torch.tensor(rows[:num_given]).long()
    table, given = _random(9, 3), _random(num_given, 3, seed=1)
    ids = torch.arange(len(text_rows)) + 2
    out = ak.splice(table, ids, text_rows, given, given_rows)
    assert torch.equal(out[text_rows], table[ids]) and torch.equal(out[given_rows], given)
    towards = _random(7, 3, seed=2).detach()
    grad_table, grad_given = torch.autograd.grad((out * towards).sum(), (table, given), allow_unused=True)
    assert torch.equal(grad_given, towards[given_rows])
    if len(ids):
        assert torch.equal(grad_table[ids], towards[text_rows])
        assert not grad_table[:2].any()


def test_splice_of_text_alone_gathers_the_table() -> None:
    table = _random(9, 3)
    out = ak.splice(table, torch.tensor([4, 4, 0]), torch.arange(3), None, None)
    assert torch.equal(out, table[[4, 4, 0]])


def test_splice_takes_the_dtype_of_the_table() -> None:
    out = ak.splice(_random(9, 3).bfloat16(), torch.tensor([1]), torch.tensor([0]), _random(1, 3), torch.tensor([1]))
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ak.rms_norm(_random(2, 3), _random(4), 1e-5), "weight_D"),
        (lambda: ak.add_rms_norm(_random(2, 3), _random(1, 3), _random(3), 1e-5), "residual_TD"),
        (lambda: ak.rotary(_random(2, 1, 3), _random(2, 1), _random(2, 1)), "even"),
        (lambda: ak.rotary(_random(2, 1, 4), _random(3, 2), _random(3, 2)), "cos_TF"),
        (lambda: ak.swiglu(_random(2, 3), _random(3, 3)), "up_TF"),
        (lambda: ak.splice(_random(9, 3), torch.tensor([1]), torch.tensor([0]), _random(1, 3), None), "together"),
        (lambda: ak.splice(_random(9, 3), torch.tensor([1]), torch.tensor([0, 1]), None, None), "text_rows_N"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def _equal_with_gradients(ours: Tensor, expected: Tensor, inputs: tuple[Tensor, ...]) -> None:
    assert torch.allclose(ours, expected, rtol=0, atol=EXACT)
    towards = _random(*ours.shape, seed=9).detach()
    got = torch.autograd.grad((ours * towards).sum(), inputs, retain_graph=True)
    wanted = torch.autograd.grad((expected * towards).sum(), inputs, retain_graph=True)
    for one, other in zip(got, wanted, strict=True):
        assert other.abs().max() > 0
        assert torch.allclose(one, other, rtol=0, atol=EXACT)


def _random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
