"""The SwiGLU kernels against plain torch: output and both gradients, in three dtypes, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import arc_kernels as ak
from arc_kernels.swiglu import autograd, swiglu_reference
from tests.kernels.bounds import DTYPES, assert_kernel_close, assert_refused, assert_same_bits

BOTH = ("gate_TF", "up_TF")

pytestmark = pytest.mark.usefixtures("triton_kernels", "poisoned_empty")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ((3, 8192), (7, 1376), (20, 40)))
def test_swiglu_errs_no_more_than_torch(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    assert_kernel_close(ak.swiglu, swiglu_reference, _inputs(shape, dtype, device), wants_grad=BOTH)


@pytest.mark.parametrize("wanted", BOTH)
def test_one_gradient_alone(wanted: str, device: torch.device) -> None:
    inputs = _inputs((5, 48), torch.bfloat16, device)
    assert_kernel_close(ak.swiglu, swiglu_reference, inputs, wants_grad=(wanted,))


def test_the_bound_sees_another_activation_and_a_swap(device: torch.device) -> None:
    inputs = _inputs((5, 48), torch.bfloat16, device)
    for wrong in (
        lambda gate_TF, up_TF: torch.nn.functional.gelu(gate_TF) * up_TF,
        lambda gate_TF, up_TF: ak.swiglu(up_TF, gate_TF),
    ):
        with pytest.raises(AssertionError, match="error"):
            assert_kernel_close(wrong, swiglu_reference, inputs, wants_grad=())


@settings(max_examples=10)
@given(num_rows=st.integers(0, 9), width=st.integers(1, 1100), seed=st.integers(0, 99))
def test_every_shape_is_written(num_rows: int, width: int, seed: int, device: torch.device) -> None:
    # bfloat16, in which a few numbers may differ only by one final rounding.
    inputs = _inputs((num_rows, width), torch.bfloat16, device, seed=seed)
    assert_kernel_close(ak.swiglu, swiglu_reference, inputs, wants_grad=BOTH)


def test_gates_far_from_zero_neither_overflow_nor_lose_their_sign(device: torch.device) -> None:
    gate = torch.tensor([-1e4, -200.0, -90.0, 90.0, 200.0, 1e4], device=device, requires_grad=True)
    y = ak.swiglu(gate, torch.ones_like(gate))
    (dgate,) = torch.autograd.grad(y.sum(), gate)
    assert torch.equal(y[3:], gate[3:]) and bool((y[:3].abs() < 1e-30).all())
    assert torch.equal(dgate[3:], torch.ones_like(dgate[3:])) and bool((dgate[:3].abs() < 1e-30).all())


def test_halves_of_one_projection_are_read_where_they_are(device: torch.device) -> None:
    fused = _inputs((6, 96), torch.bfloat16, device)["gate_TF"].requires_grad_()
    gate, up = fused.chunk(2, dim=-1)
    y = ak.swiglu(gate, up)
    assert torch.equal(y, ak.swiglu(gate.contiguous(), up.contiguous()))
    seed = fused.detach()[:, ::2]
    (strided,) = torch.autograd.grad(y, fused, seed, retain_graph=True)
    assert torch.equal(strided, torch.autograd.grad(y, fused, seed.contiguous())[0])
    cube = fused.detach().view(2, 3, 96)
    assert torch.equal(ak.swiglu(cube[..., :48], cube[..., 48:]).view(6, 48), y)


def test_repeats_checkpointing_and_compiling_give_the_same_bits(device: torch.device) -> None:
    assert_same_bits(ak.swiglu, _inputs((6, 40), torch.bfloat16, device), wants_grad=BOTH)


def test_the_operators_fakes_match_them(device: torch.device) -> None:
    gate, up = _inputs((5, 24), torch.bfloat16, device).values()
    torch.library.opcheck(autograd.swiglu_forward, (gate, up))
    torch.library.opcheck(autograd.swiglu_backward, (up, gate, up))


def test_wrong_arguments_are_named(device: torch.device) -> None:
    x = torch.ones(2, 8, device=device)
    assert_refused(lambda: ak.swiglu(x, x[:1]), "up_TF has shape")
    assert_refused(lambda: ak.swiglu(x, x.half()), "differ in dtype")
    assert_refused(lambda: ak.swiglu(x, x.to("meta")), "different devices")
    assert_refused(lambda: ak.swiglu(x.long(), x.long()), "gate_TF is torch.int64")


def _inputs(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, *, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: (3 * torch.randn(shape, generator=generator)).to(device, dtype) for name in BOTH}
