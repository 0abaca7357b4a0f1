"""The rotary kernel against plain torch: output and gradient, in three dtypes, against float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import arc_kernels as ak
from arc_kernels.rotary import autograd, rotary_reference
from tests.kernels.bounds import DTYPES, assert_kernel_close, assert_refused, assert_same_bits

Shape = tuple[int, int, int]

pytestmark = pytest.mark.usefixtures("triton_kernels", "poisoned_empty")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ((5, 24, 128), (6, 9, 64), (7, 3, 80)))
def test_rotary_errs_no_more_than_torch(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    assert_kernel_close(ak.rotary, rotary_reference, _inputs(shape, dtype, device), wants_grad=("x_TNH",))


def test_the_bound_sees_neighbouring_pairs_and_the_wrong_direction(device: torch.device) -> None:
    inputs = _inputs((5, 3, 64), torch.bfloat16, device)

    def neighbours(x_TNH: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
        halves = x_TNH.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        return ak.rotary(halves, cos_TF, sin_TF)

    for wrong in (neighbours, lambda x_TNH, cos_TF, sin_TF: ak.rotary(x_TNH, cos_TF, -sin_TF)):
        with pytest.raises(AssertionError, match="error"):
            assert_kernel_close(wrong, rotary_reference, inputs, wants_grad=())


@settings(max_examples=10)
@given(num_rows=st.integers(0, 6), num_heads=st.integers(1, 20), half=st.integers(1, 70), seed=st.integers(0, 99))
def test_every_shape_is_rotated(num_rows: int, num_heads: int, half: int, seed: int, device: torch.device) -> None:
    # bfloat16, in which a few numbers may differ only by one final rounding.
    inputs = _inputs((num_rows, num_heads, 2 * half), torch.bfloat16, device, seed=seed)
    assert_kernel_close(ak.rotary, rotary_reference, inputs, wants_grad=("x_TNH",))


def test_the_gradient_turns_back(device: torch.device) -> None:
    inputs = _inputs((4, 3, 16), torch.float32, device)
    x = inputs["x_TNH"].requires_grad_()
    turned = ak.rotary(**inputs)
    (back,) = torch.autograd.grad(turned, x, turned.detach())
    torch.testing.assert_close(back, x.detach(), rtol=1e-6, atol=1e-6)  # two rotations: four roundings of about 1e-7


def test_scaled_angles_scale_the_gradient_too(device: torch.device) -> None:
    """The gradient is the transposed rotation. The inverse one is the same only if cos² + sin² = 1."""
    inputs = _inputs((40, 9, 64), torch.bfloat16, device)
    factor, unscaled = 1.3, dict(inputs)
    inputs |= {name: factor * inputs[name] for name in ("cos_TF", "sin_TF")}  # yarn and longrope have such a factor
    for name, value in (("cos_TF", 1.0), ("sin_TF", 0.0)):  # pairs that stay, as with a partial rotary
        inputs[name][:, 20:] = unscaled[name][:, 20:] = value
    assert_kernel_close(ak.rotary, rotary_reference, inputs, wants_grad=("x_TNH",))

    def turns_back(x_TNH: Tensor, **angles: Tensor) -> Tensor:
        """Correct output, gradient of the rotation without the factor."""
        unit = ak.rotary(x_TNH, unscaled["cos_TF"], unscaled["sin_TF"])
        return ak.rotary(x_TNH, **angles).detach() + unit - unit.detach()

    with pytest.raises(AssertionError, match="gradient of x_TNH.*error"):
        assert_kernel_close(turns_back, rotary_reference, inputs, wants_grad=("x_TNH",))


def test_heads_of_a_fused_projection_are_read_where_they_are(device: torch.device) -> None:
    inputs = _inputs((6, 1, 3 * 4 * 16), torch.bfloat16, device)
    fused = inputs["x_TNH"].view(6, 12, 16)
    angles = _inputs((6, 1, 16), torch.bfloat16, device)
    cos, sin = angles["cos_TF"], angles["sin_TF"]
    for view in (fused[:, 4:8], fused[:, ::3], fused.transpose(0, 1).contiguous().transpose(0, 1), fused[..., ::2]):
        half = cos[:, : view.shape[-1] // 2], sin[:, : view.shape[-1] // 2]
        assert torch.equal(ak.rotary(view, *half), ak.rotary(view.contiguous(), *half))
    x = fused[:, 4:8].detach().requires_grad_()
    turned = ak.rotary(x, cos, sin)
    (strided,) = torch.autograd.grad(turned, x, fused[:, ::3], retain_graph=True)
    assert torch.equal(strided, torch.autograd.grad(turned, x, fused[:, ::3].contiguous())[0])
    (of_sum,) = torch.autograd.grad(ak.rotary(x, cos, sin).sum(), x)
    assert torch.equal(of_sum, torch.autograd.grad(ak.rotary(x, cos, sin), x, torch.ones_like(x))[0])


def test_repeats_checkpointing_and_compiling_give_the_same_bits(device: torch.device) -> None:
    assert_same_bits(ak.rotary, _inputs((6, 3, 40), torch.bfloat16, device), wants_grad=("x_TNH",))


def test_the_operators_fake_matches_it(device: torch.device) -> None:
    x, cos, sin = _inputs((5, 3, 24), torch.bfloat16, device).values()
    for inverse in (False, True):
        torch.library.opcheck(autograd.rotate, (x, cos, sin, inverse))


def test_wrong_arguments_are_named(device: torch.device) -> None:
    inputs = _inputs((5, 3, 24), torch.float32, device)
    for name, wrong, message in (
        ("x_TNH", inputs["x_TNH"][..., 1:], "an even size"),
        ("x_TNH", inputs["x_TNH"][0], "x_TNH has shape"),
        ("x_TNH", inputs["x_TNH"].long(), "expected floats"),
        ("cos_TF", inputs["cos_TF"][:4], "cos_TF has shape"),
        ("sin_TF", inputs["sin_TF"][:, :3], "sin_TF has shape"),
        ("cos_TF", inputs["cos_TF"].bfloat16(), "cos_TF is torch.bfloat16"),
        ("sin_TF", inputs["sin_TF"].to("meta"), "different devices"),
    ):
        assert_refused(partial(ak.rotary, **(inputs | {name: wrong})), message)
    trained = inputs | {"cos_TF": inputs["cos_TF"].clone().requires_grad_()}
    assert_refused(lambda: ak.rotary(**trained), "cos_TF requires a gradient", choices=("triton",))
    wide = _inputs((1, 1, 514), torch.float32, device)
    assert_refused(lambda: ak.rotary(**wide), "head size 514", choices=("triton",))


def _inputs(shape: Shape, dtype: torch.dtype, device: torch.device, *, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    angles = torch.rand((shape[0], shape[2] // 2), generator=generator) * 6.3
    return {
        "x_TNH": torch.randn(shape, generator=generator).to(device, dtype),
        "cos_TF": angles.cos().to(device),
        "sin_TF": angles.sin().to(device),
    }
