"""Norms, rotary, SwiGLU and splice in plain torch against their definitions in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import arc_kernels as ak
from tests.kernels.bounds import assert_exact

EXACT = 1e-14  # measured worst 9e-16, values of order one


def test_rms_norm_is_torchs() -> None:
    x, weight = _random(5, 6), _random(6)
    expected = F.rms_norm(x, (6,), weight, 1e-5)
    assert_exact(ak.rms_norm(x, weight, 1e-5), expected, (x, weight), atol=EXACT)


def test_add_rms_norm_returns_the_norm_of_the_sum_and_the_sum() -> None:
    x, residual, weight = _random(5, 6), _random(5, 6, seed=1), _random(6)
    normed, total = ak.add_rms_norm(x, residual, weight, 1e-5)
    assert_exact(normed, F.rms_norm(x + residual, (6,), weight, 1e-5), (x, residual, weight), atol=EXACT)
    assert torch.equal(total, x + residual)


def test_layer_norm_has_mean_variance_and_no_parameters() -> None:
    x = _random(5, 6)
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert_exact(ak.layer_norm(x, 1e-5), expected, (x,), atol=EXACT)


def test_statistics_of_bfloat16_rows_are_float32() -> None:
    x = _random(4, 512).detach()
    low = x.bfloat16()
    exact = F.rms_norm(low.double(), (512,), torch.ones(512).double(), 1e-5)
    ours = ak.rms_norm(low, torch.ones(512), 1e-5)
    assert ours.dtype == torch.bfloat16
    assert ((ours.double() - exact) / exact.abs().clamp(min=1e-3)).abs().max() <= 2**-8  # one rounding


@pytest.mark.parametrize("factor", [1.0, 1.3])
def test_rotary_is_multiplication_with_a_complex_number_of_any_size(factor: float) -> None:
    x = _random(5, 3, 8)
    angles = torch.rand(5, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 6.0
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.full_like(angles, factor), angles)[:, None]
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    assert_exact(ak.rotary(x, factor * angles.cos(), factor * angles.sin()), expected, (x,), atol=EXACT)


def test_swiglu_gates_with_the_first_argument() -> None:
    gate, up = _random(4, 6), _random(4, 6, seed=1)
    assert_exact(ak.swiglu(gate, up), gate / (1 + torch.exp(-gate)) * up, (gate, up), atol=EXACT)
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


def _random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
