"""The Triton kernels of group_pool and pool_norm against plain torch."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import arc_kernels as ak
from arc_kernels._dispatch import Choice
from tests.kernels.bounds import assert_close_as_torch, assert_kernel_close, outputs_and_gradients

EPS = 1e-5
RAGGED = [3, 1, 2, 8, 1, 5]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ak.POOL_KINDS)
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_pool_norm_is_as_close_as_torch(
    kind: str, norm: str, dtype: torch.dtype, device: torch.device, poisoned_empty: None
) -> None:
    inputs = _inputs(RAGGED, 40, dtype, device) | ({"weight_D": _weight(40, dtype, device)} if norm == "rms" else {})
    wants_grad = ("x_TD", "weight_D") if norm == "rms" else ("x_TD",)
    assert_kernel_close(_pool_norm(kind, "triton"), _pool_norm(kind, "reference"), inputs, wants_grad=wants_grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ak.POOL_KINDS)
def test_group_pool_is_as_close_as_torch(
    kind: str, dtype: torch.dtype, device: torch.device, poisoned_empty: None
) -> None:
    inputs = _inputs(RAGGED, 40, dtype, device)
    assert_kernel_close(_group_pool(kind, "triton"), _group_pool(kind, "reference"), inputs, wants_grad=("x_TD",))


@pytest.mark.parametrize("sizes", [[1], [1, 1, 1], [40, 3, 1]])
@pytest.mark.parametrize("kind", ["mean", "fusion"])
def test_groups_of_one_row_and_of_very_many(
    kind: str, sizes: list[int], device: torch.device, poisoned_empty: None
) -> None:
    inputs = _inputs(sizes, 16, torch.float32, device) | {"weight_D": _weight(16, torch.float32, device)}
    kernel, reference = _pool_norm(kind, "triton"), _pool_norm(kind, "reference")
    assert_kernel_close(kernel, reference, inputs, wants_grad=("x_TD", "weight_D"))


@pytest.mark.parametrize("width", [1, 63, 1500, 5000, 8192])
def test_widths_of_every_config(width: int, device: torch.device, poisoned_empty: None) -> None:
    inputs = _inputs([3, 1, 2], width, torch.bfloat16, device) | {"weight_D": _weight(width, torch.bfloat16, device)}
    kernel, reference = _pool_norm("mean", "triton"), _pool_norm("mean", "reference")
    assert_kernel_close(kernel, reference, inputs, wants_grad=("x_TD", "weight_D"))


def test_weight_gradient_over_more_groups_than_programs(
    device: torch.device, poisoned_empty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import arc_kernels.pooling.kernels as kernels

    monkeypatch.setattr(kernels, "WEIGHT_PROGRAMS", 4)
    inputs = _inputs(RAGGED * 2, 4, torch.float32, device) | {"weight_D": _weight(4, torch.float32, device)}
    kernel, reference = _pool_norm("mean", "triton"), _pool_norm("mean", "reference")
    assert_kernel_close(kernel, reference, inputs, wants_grad=("x_TD", "weight_D"))


@settings(max_examples=12, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    width=st.integers(1, 70),
    kind=st.sampled_from(ak.POOL_KINDS),
    dtype=st.sampled_from(DTYPES),
)
def test_ragged_groups_of_any_shape(
    sizes: list[int], width: int, kind: str, dtype: torch.dtype, device: torch.device
) -> None:
    inputs = _inputs(sizes, width, dtype, device) | {"weight_D": _weight(width, dtype, device)}
    kernel, reference = _pool_norm(kind, "triton"), _pool_norm(kind, "reference")
    assert_kernel_close(kernel, reference, inputs, wants_grad=("x_TD", "weight_D"))


@pytest.mark.parametrize("kind", ak.POOL_KINDS)
def test_repeated_runs_give_the_same_bits(kind: str, device: torch.device) -> None:
    inputs = _inputs([3, 1, 6], 40, torch.bfloat16, device) | {"weight_D": _weight(40, torch.bfloat16, device)}
    first, again = (
        outputs_and_gradients(_pool_norm(kind, "triton"), inputs, wants_grad=("x_TD", "weight_D")) for _ in range(2)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_the_bound_sees_a_wrong_division(device: torch.device) -> None:
    inputs = _inputs(RAGGED, 40, torch.bfloat16, device)
    torchs = outputs_and_gradients(_group_pool("mean", "reference"), inputs, wants_grad=())
    exact = ak.group_pool(inputs["x_TD"].double(), inputs["group_cu"], "mean", len(RAGGED))
    wrong = _group_pool("sum", "triton")(**inputs) / 3
    with pytest.raises(AssertionError, match="error"):
        assert_close_as_torch(wrong, torchs["output 0"], exact, "mean")


def test_a_frozen_weight_gets_no_gradient_and_the_rows_the_same(device: torch.device) -> None:
    inputs = _inputs(RAGGED, 40, torch.float32, device) | {"weight_D": _weight(40, torch.float32, device)}
    kernel = _pool_norm("mean", "triton")
    both = outputs_and_gradients(kernel, inputs, wants_grad=("x_TD", "weight_D"))
    rows_only = outputs_and_gradients(kernel, inputs, wants_grad=("x_TD",))
    assert torch.equal(both["gradient of x_TD"], rows_only["gradient of x_TD"])
    weight_only = outputs_and_gradients(kernel, inputs, wants_grad=("weight_D",))
    assert torch.equal(both["gradient of weight_D"], weight_only["gradient of weight_D"])


def test_outputs_without_a_gradient_count_as_zero(device: torch.device) -> None:
    inputs = _inputs(RAGGED, 8, torch.float32, device) | {"weight_D": _weight(8, torch.float32, device)}
    gradients = []
    for choice in ("triton", "reference"):
        x_TD = inputs["x_TD"].clone().requires_grad_()
        pooled_GD, _, _ = _pool_norm("mean", choice)(x_TD, inputs["group_cu"], inputs["weight_D"])
        pooled_GD.square().sum().backward()
        gradients.append(x_TD.grad)
    assert gradients[1].abs().max() > 0
    assert torch.allclose(*gradients, rtol=0, atol=1e-6)  # values of order one; measured 6e-8


def test_rows_with_a_stride_give_what_their_copy_gives(device: torch.device) -> None:
    wide_TD = _inputs(RAGGED, 24, torch.float32, device)["x_TD"]
    cu = _inputs(RAGGED, 24, torch.float32, device)["group_cu"]
    strided_TD = wide_TD[:, 3:19]
    assert not strided_TD.is_contiguous()
    weight_D = _weight(16, torch.float32, device)
    kernel = _pool_norm("mean", "triton")
    for ours, copied in zip(kernel(strided_TD, cu, weight_D), kernel(strided_TD.clone(), cu, weight_D), strict=True):
        assert torch.equal(ours, copied)


def test_no_rows_give_empty_outputs_and_gradients(device: torch.device) -> None:
    x_TD = torch.zeros(0, 8, device=device, requires_grad=True)
    weight_D = torch.ones(8, device=device, requires_grad=True)
    with ak.use("triton"):
        out = ak.pool_norm(
            x_TD, torch.zeros(1, dtype=torch.int32, device=device), "mean", 0, weight_D=weight_D, eps=EPS
        )
    sum(y.sum() for y in out).backward()
    assert [tuple(y.shape) for y in out] == [(0, 8)] * 3
    assert x_TD.grad.shape == (0, 8) and torch.equal(weight_D.grad, torch.zeros_like(weight_D))


def test_checkpointed_and_compiled_blocks_give_the_same_gradients(device: torch.device) -> None:
    inputs = _inputs([3, 1, 2], 8, torch.float32, device) | {"weight_D": _weight(8, torch.float32, device)}
    plain = _pool_norm("fusion", "triton")
    expected = outputs_and_gradients(plain, inputs, wants_grad=("x_TD", "weight_D"))

    def checkpointed(x_TD: Tensor, group_cu: Tensor, weight_D: Tensor) -> tuple[Tensor, ...]:
        return torch.utils.checkpoint.checkpoint(plain, x_TD, group_cu, weight_D, use_reentrant=False)

    for variant in (checkpointed, torch.compile(plain, backend="aot_eager", fullgraph=True)):
        got = outputs_and_gradients(variant, inputs, wants_grad=("x_TD", "weight_D"))
        assert all(torch.equal(expected[name], got[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operators_are_what_they_declare(dtype: torch.dtype, device: torch.device) -> None:
    import arc_kernels.pooling.autograd  # noqa: F401  (registers the operators)

    ops = torch.ops.arc_kernels
    inputs = _inputs([3, 1], 8, dtype, device)  # few rows: each of these checks runs its operator many times
    x, cu, weight = inputs["x_TD"], inputs["group_cu"], _weight(8, dtype, device)
    pooled, normed_pooled, normed = ops.pool_norm(x, cu, weight, "mean", EPS)
    torch.library.opcheck(ops.group_pool, (x, cu, "mean"))
    torch.library.opcheck(ops.group_pool_backward, (pooled, cu, x, len(x), "fusion"))
    torch.library.opcheck(ops.pool_norm, (x, cu, weight, "mean", EPS))
    torch.library.opcheck(ops.pool_norm, (x, cu, None, "mean", EPS))
    for wants_weight in (True, False):
        grads = (pooled, normed_pooled, normed)
        torch.library.opcheck(ops.pool_norm_backward, (*grads, x, cu, weight, pooled, "mean", EPS, wants_weight))


def test_boundaries_outside_the_rows_reach_no_other_memory(device: torch.device) -> None:
    import arc_kernels.pooling.autograd  # noqa: F401  (the operator: the public function refuses these on the CPU)

    around_TD = torch.full((12, 8), torch.nan, device=device)
    around_TD[4:8] = 1.0
    cu = torch.tensor([-3, 2, 9], dtype=torch.int32, device=device)
    pooled_GD = torch.ops.arc_kernels.group_pool(around_TD[4:8], cu, "sum")
    assert torch.equal(pooled_GD, torch.full((2, 8), 2.0, device=device))


def test_arguments_that_do_not_fit_are_refused(device: torch.device) -> None:
    inputs = _inputs([4, 2], 8, torch.float32, device)
    x, cu = inputs["x_TD"], inputs["group_cu"]
    with ak.use("triton"):
        wide, refusal = (
            torch.zeros(6, 8193, device=device),
            r"x_TD has 8193 columns; .* at most 8192.*use\('reference'\)",
        )
        with pytest.raises(ValueError, match=refusal):
            ak.group_pool(wide, cu, "mean", 2)
        with pytest.raises(ValueError, match=refusal):
            ak.pool_norm(wide, cu, "mean", 2, weight_D=None, eps=EPS)
        with pytest.raises(ValueError, match="float64"):
            ak.group_pool(x.double(), cu, "mean", 2)
        with pytest.raises(ValueError, match="group_cu has no group"):
            ak.group_pool(x, cu[-1:] * 0, "mean", 0)


@pytest.mark.parametrize("bounds", [[1, 4, 6], [0, 4, 5], [0, 6, 4], [0, 0, 6]])
def test_boundaries_that_are_wrong_are_refused(
    bounds: list[int], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARC_KERNELS_CHECK", "1")
    x = _inputs([4, 2], 8, torch.float32, device)["x_TD"]
    with pytest.raises(ValueError, match="group_cu"):
        ak.group_pool(x, torch.tensor(bounds, dtype=torch.int32, device=device), "mean", 2)


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


def _pool_norm(kind: str, choice: Choice) -> functools.partial:
    return functools.partial(_call_pool_norm, kind, choice)


def _call_pool_norm(
    kind: str, choice: Choice, x_TD: Tensor, group_cu: Tensor, weight_D: Tensor | None = None
) -> tuple[Tensor, ...]:
    with ak.use(choice):
        return tuple(ak.pool_norm(x_TD, group_cu, kind, group_cu.shape[0] - 1, weight_D=weight_D, eps=EPS))


def _group_pool(kind: str, choice: Choice) -> functools.partial:
    return functools.partial(_call_group_pool, kind, choice)


def _call_group_pool(kind: str, choice: Choice, x_TD: Tensor, group_cu: Tensor) -> Tensor:
    with ak.use(choice):
        return ak.group_pool(x_TD, group_cu, kind, group_cu.shape[0] - 1)


def _inputs(sizes: list[int], width: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(len(sizes) * 1000 + width)
    x_TD = torch.randn(sum(sizes), width, generator=generator, dtype=torch.float64) + 0.3
    cu = torch.tensor([0, *sizes]).cumsum(0).int()
    return {"x_TD": x_TD.to(device, dtype), "group_cu": cu.to(device)}


def _weight(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.linspace(0.5, 1.5, width, dtype=torch.float64).to(device, dtype)
