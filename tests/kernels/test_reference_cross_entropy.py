"""linear_cross_entropy in plain torch against torch's cross-entropy on whole logits in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import arc_kernels as ak
import arc_kernels.cross_entropy.reference as reference
from tests.kernels.bounds import assert_exact

EXACT = 1e-14  # of values of order ten in float64; measured worst 2e-15


@pytest.mark.parametrize("num_rows", [1, 2, 7])
@pytest.mark.parametrize("chunk_rows", [0, 1, 2, 3, 100])  # 0: less than one row
def test_loss_and_gradient_do_not_depend_on_the_chunks(
    num_rows: int, chunk_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    h, weight, labels = _inputs(num_rows)
    monkeypatch.setattr(reference, "CHUNK_BYTES", chunk_rows * weight.shape[0] * 8)
    _compare(h, weight, labels)


def test_logits_far_beyond_exp_stay_finite() -> None:
    h, weight, labels = _inputs(4)
    _compare((h.detach() * 1e4).requires_grad_(), weight, labels, atol=1e-11)  # losses of order 1e4


def test_without_gradients_nothing_is_kept() -> None:
    h, weight, labels = _inputs(3)
    nll = ak.linear_cross_entropy(h.detach(), weight, labels)
    assert nll.grad_fn is None


def test_no_rows_give_no_losses() -> None:
    h, weight, _ = _inputs(3)
    nll = ak.linear_cross_entropy(h[:0], weight, torch.zeros(0, dtype=torch.int64))
    nll.sum().backward()
    assert nll.shape == (0,) and not h.grad.any()


def test_bfloat16_rows_give_float32_losses_and_bfloat16_gradients() -> None:
    h, weight, labels = _inputs(5)
    exact = F.cross_entropy(h @ weight.T, labels, reduction="none")
    low = h.detach().bfloat16().requires_grad_()
    nll = ak.linear_cross_entropy(low, weight.bfloat16(), labels)
    nll.sum().backward()
    assert nll.dtype == torch.float32 and low.grad.dtype == torch.bfloat16
    assert torch.allclose(nll.double(), exact, rtol=0, atol=0.05)  # inputs of 8 bits; measured 0.022


def _compare(h: Tensor, weight: Tensor, labels: Tensor, atol: float = EXACT) -> None:
    expected = F.cross_entropy(h @ weight.T, labels, reduction="none")
    assert_exact(ak.linear_cross_entropy(h, weight, labels), expected, (h,), atol=atol)


def _inputs(num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(num_rows, 6, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(11, 6, generator=generator, dtype=torch.float64)
    return h, weight, torch.randint(11, (num_rows,), generator=generator)
