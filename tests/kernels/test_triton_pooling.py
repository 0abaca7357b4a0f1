"""The Triton kernels of group_pool and pool_norm against plain torch."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import arc_kernels as ak
import arc_kernels.pooling.autograd  # registers the operators
from arc_kernels.pooling import group_pool_reference, kernels, pool_norm_reference
from tests.kernels.bounds import (
    DTYPES,
    assert_close_as_torch,
    assert_kernel_close,
    assert_refused,
    assert_same_bits,
    outputs_and_gradients,
)

EPS = 1e-5
RAGGED = [3, 1, 2, 8, 1, 5]
BOTH = ("x_TD", "weight_D")

pytestmark = pytest.mark.usefixtures("triton_kernels", "poisoned_empty")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ak.POOL_KINDS)
@pytest.mark.parametrize("norm", ["rms", "layer", "none"])
def test_pooling_is_as_close_as_torch(kind: str, norm: str, dtype: torch.dtype, device: torch.device) -> None:
    _compare(RAGGED, 40, dtype, device, kind=kind, norm=norm)


@pytest.mark.parametrize("sizes", [[1], [1, 1, 1], [40, 3, 1]])
@pytest.mark.parametrize("kind", ["mean", "fusion"])
def test_groups_of_one_row_and_of_very_many(kind: str, sizes: list[int], device: torch.device) -> None:
    _compare(sizes, 16, torch.float32, device, kind=kind)


@pytest.mark.parametrize("width", [1, 63, 1500, 5000, 8192])
def test_widths_of_every_config(width: int, device: torch.device) -> None:
    _compare([3, 1, 2], width, torch.bfloat16, device)


def test_weight_gradient_over_more_groups_than_programs(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "WEIGHT_PROGRAMS", 4)
    _compare(RAGGED * 2, 4, torch.float32, device)


# bfloat16, in which a few numbers may differ only by one final rounding: in float32, torch may be exact by chance. No
# width of 1: the gradient of its norm is zero except for eps, so only rounding would be visible.
@settings(max_examples=12)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    width=st.integers(2, 70),
    kind=st.sampled_from(ak.POOL_KINDS),
)
def test_ragged_groups_of_any_shape(sizes: list[int], width: int, kind: str, device: torch.device) -> None:
    _compare(sizes, width, torch.bfloat16, device, kind=kind)


@pytest.mark.parametrize("kind", ak.POOL_KINDS)
def test_repeats_checkpointing_and_compiling_give_the_same_bits(kind: str, device: torch.device) -> None:
    assert_same_bits(_pool_norm(kind, 3), _inputs([3, 1, 6], 40, torch.bfloat16, device), wants_grad=BOTH)


def test_the_bound_sees_a_wrong_division(device: torch.device) -> None:
    inputs = _inputs(RAGGED, 40, torch.bfloat16, device)
    x, cu = inputs["x_TD"], inputs["group_cu"]
    torchs, exact = (group_pool_reference(rows, cu, "mean") for rows in (x, x.double()))
    wrong = ak.group_pool(x, cu, "sum", len(RAGGED)) / 3
    with pytest.raises(AssertionError, match="error"):
        assert_close_as_torch(wrong, torchs, exact, "mean")


@pytest.mark.parametrize("wanted", BOTH)
def test_a_frozen_weight_gets_no_gradient_and_the_rows_the_same(wanted: str, device: torch.device) -> None:
    inputs = _inputs(RAGGED, 40, torch.float32, device)
    both = outputs_and_gradients(_pool_norm("mean", len(RAGGED)), inputs, wants_grad=BOTH)
    alone = outputs_and_gradients(_pool_norm("mean", len(RAGGED)), inputs, wants_grad=(wanted,))
    assert torch.equal(both[f"gradient of {wanted}"], alone[f"gradient of {wanted}"])


def test_outputs_without_a_gradient_count_as_zero(device: torch.device) -> None:
    inputs = _inputs(RAGGED, 8, torch.float32, device)
    x_TD = inputs["x_TD"].requires_grad_()
    pooled = _pool_norm("mean", len(RAGGED))(**inputs)[0], group_pool_reference(x_TD, inputs["group_cu"], "mean")
    ours, torchs = (torch.autograd.grad(y.square().sum(), x_TD)[0] for y in pooled)
    assert torchs.abs().max() > 0
    assert torch.allclose(ours, torchs, rtol=0, atol=1e-6)  # values of order one; measured 6e-8


def test_rows_with_a_stride_give_what_their_copy_gives(device: torch.device) -> None:
    inputs = _inputs(RAGGED, 24, torch.float32, device)
    cu, weight_D = inputs["group_cu"], inputs["weight_D"][:16]
    strided_TD = inputs["x_TD"][:, 3:19]
    assert not strided_TD.is_contiguous()
    kernel = _pool_norm("mean", len(RAGGED))
    copied = kernel(strided_TD.clone(), cu, weight_D=weight_D)
    assert all(map(torch.equal, kernel(strided_TD, cu, weight_D=weight_D), copied))


def test_no_rows_give_empty_outputs_and_gradients(device: torch.device) -> None:
    x_TD = torch.zeros(0, 8, device=device, requires_grad=True)
    weight_D = torch.ones(8, device=device, requires_grad=True)
    out = _pool_norm("mean", 0)(x_TD, torch.zeros(1, dtype=torch.int32, device=device), weight_D=weight_D)
    sum(y.sum() for y in out).backward()
    assert [tuple(y.shape) for y in out] == [(0, 8)] * 3
    assert x_TD.grad.shape == (0, 8) and torch.equal(weight_D.grad, torch.zeros_like(weight_D))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operators_are_what_they_declare(dtype: torch.dtype, device: torch.device) -> None:
    ops = torch.ops.arc_kernels
    inputs = _inputs([3, 1], 8, dtype, device)  # few rows: each of these checks runs its operator many times
    x, cu, weight = inputs.values()
    pooled, normed_pooled, normed = ops.pool_norm(x, cu, weight, "mean", EPS)
    torch.library.opcheck(ops.group_pool, (x, cu, "mean"))
    torch.library.opcheck(ops.group_pool_backward, (pooled, cu, x, len(x), "fusion"))
    torch.library.opcheck(ops.pool_norm, (x, cu, weight, "mean", EPS))
    torch.library.opcheck(ops.pool_norm, (x, cu, None, "mean", EPS))
    for wants_weight in (True, False):
        grads = (pooled, normed_pooled, normed)
        torch.library.opcheck(ops.pool_norm_backward, (*grads, x, cu, weight, pooled, "mean", EPS, wants_weight))


def test_boundaries_outside_the_rows_reach_no_other_memory(device: torch.device) -> None:
    # The operator: the public function refuses these on the CPU.
    around_TD = torch.full((12, 8), torch.nan, device=device)
    around_TD[4:8] = 1.0
    cu = torch.tensor([-3, 2, 9], dtype=torch.int32, device=device)
    pooled_GD = torch.ops.arc_kernels.group_pool(around_TD[4:8], cu, "sum")
    assert torch.equal(pooled_GD, torch.full((2, 8), 2.0, device=device))


def test_arguments_that_do_not_fit_are_refused(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARC_KERNELS_CHECK", "1")
    x, cu, _ = _inputs([4, 2], 8, torch.float32, device).values()
    assert_refused(lambda: ak.group_pool(x, cu, "median", 2), "'median'; expected one of mean")
    assert_refused(lambda: ak.group_pool(x, cu, "mean", 3), "group_cu has shape")
    assert_refused(lambda: ak.group_pool(x, cu - 1, "mean", 2), "group_cu starts at -1")
    assert_refused(lambda: ak.group_pool(x[:5], cu, "mean", 2), "group_cu ends at 6; expected the number of rows, 5")
    assert_refused(lambda: ak.group_pool(x, cu[-1:] * 0, "mean", 0), "group_cu has no group")
    assert_refused(lambda: _pool_norm("mean", 2)(x, cu, weight_D=torch.ones(3, device=device)), "weight_D has shape")
    wide, refusal = torch.zeros(6, 8193, device=device), r"x_TD has 8193 columns; .* at most 8192.*use\('reference'\)"
    assert_refused(lambda: ak.group_pool(wide, cu, "mean", 2), refusal, choices=("triton",))
    assert_refused(lambda: _pool_norm("mean", 2)(wide, cu, weight_D=None), refusal, choices=("triton",))
    assert_refused(lambda: ak.group_pool(x.double(), cu, "mean", 2), "float64", choices=("triton",))


def test_a_group_of_odd_length_without_eps_has_a_finite_weight_gradient(device: torch.device) -> None:
    x_TD = torch.randn(3, 64, generator=torch.Generator().manual_seed(3)).to(device)
    cu = torch.tensor([0, 3], dtype=torch.int32, device=device)
    gradients = []
    for choice in ("triton", "reference"):
        weight_D = torch.ones(64, device=device, requires_grad=True)
        with ak.use(choice):  # type: ignore[arg-type]
            ak.pool_norm(x_TD, cu, "mean", 1, weight_D=weight_D, eps=0.0).normed_TD.square().sum().backward()
        gradients.append(weight_D.grad)
    torch.testing.assert_close(*gradients)


def _compare(
    sizes: list[int], width: int, dtype: torch.dtype, device: torch.device, *, kind: str = "mean", norm: str = "rms"
) -> None:
    """Compare `pool_norm` with an RMSNorm or a LayerNorm, or `group_pool` if norm is "none", with the reference."""
    inputs = _inputs(sizes, width, dtype, device)
    kernel, reference = _pool_norm(kind, len(sizes)), partial(pool_norm_reference, kind=kind, eps=EPS)
    if norm == "none":
        kernel = partial(ak.group_pool, kind=kind, num_groups=len(sizes))
        reference = partial(group_pool_reference, kind=kind)
    if norm == "layer":
        kernel, reference = partial(kernel, weight_D=None), partial(reference, weight_D=None)
    if norm != "rms":
        del inputs["weight_D"]
    assert_kernel_close(kernel, reference, inputs, wants_grad=BOTH if norm == "rms" else ("x_TD",))


def _pool_norm(kind: str, num_groups: int) -> partial:
    return partial(ak.pool_norm, kind=kind, num_groups=num_groups, eps=EPS)


def _inputs(sizes: list[int], width: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(len(sizes) * 1000 + width)
    x_TD = torch.randn(sum(sizes), width, generator=generator, dtype=torch.float64) + 0.3
    return {
        "x_TD": x_TD.to(device, dtype),
        "group_cu": torch.tensor([0, *sizes]).cumsum(0).int().to(device),
        "weight_D": torch.linspace(0.5, 1.5, width, dtype=torch.float64).to(device, dtype),
    }
