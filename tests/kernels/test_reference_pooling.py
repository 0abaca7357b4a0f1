"""group_pool and pool_norm in plain torch against a loop over groups in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import arc_kernels as ak
from tests.kernels.bounds import assert_exact

EXACT = 1e-14  # measured worst 9e-16, values of order one
SIZES = [[1], [3, 1, 2], [8, 7, 1, 1, 5]]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("kind", ak.POOL_KINDS)
def test_groups_and_their_gradient_equal_the_loop(sizes: list[int], kind: str) -> None:
    x = _rows(sum(sizes))
    assert_exact(ak.group_pool(x, _cu(sizes), kind, len(sizes)), _loop(x, sizes, kind), (x,), atol=EXACT)


def test_bfloat16_rows_are_summed_in_float32() -> None:
    x = torch.full((257, 2), 1.0, dtype=torch.bfloat16)
    pooled = ak.group_pool(x, _cu([257]), "mean", 1)
    assert pooled.dtype == torch.bfloat16
    assert pooled.tolist() == [[1.0, 1.0]]  # a sum in bfloat16 stops at 256


@pytest.mark.parametrize("weight", [None, torch.linspace(0.5, 1.5, 6, dtype=torch.float64)])
@pytest.mark.parametrize("kind", ak.POOL_KINDS)
def test_pool_norm_is_pooling_and_two_norms(kind: str, weight: Tensor | None) -> None:
    x, cu = _rows(6), _cu([3, 1, 2])
    out = ak.pool_norm(x, cu, kind, 3, weight_D=weight, eps=1e-5)
    pooled = ak.group_pool(x, cu, kind, 3)
    assert torch.equal(out.pooled_GD, pooled)
    for normed, rows in ((out.normed_pooled_GD, pooled), (out.normed_TD, x)):
        expected = ak.layer_norm(rows, 1e-5) if weight is None else ak.rms_norm(rows, weight, 1e-5)
        assert torch.equal(normed, expected)


def _loop(x: Tensor, sizes: list[int], kind: str) -> Tensor:
    pooled = []
    for group in x.split(sizes):
        if kind == "last":
            pooled.append(group[-1])
        elif kind == "sum":
            pooled.append(group.sum(0))
        else:
            mean = group.mean(0)
            scale = group.detach().norm(dim=1).max() / mean.norm() if kind == "fusion" else 1.0
            pooled.append(mean * scale)
    return torch.stack(pooled)


def _rows(num_rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(num_rows)
    return torch.randn(num_rows, 6, generator=generator, dtype=torch.float64).requires_grad_()


def _cu(sizes: list[int]) -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0).int()
