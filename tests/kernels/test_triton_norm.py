"""The norm kernels against plain torch: outputs and all gradients, in three dtypes, against float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import arc_kernels as ak
from arc_kernels.norm import autograd, kernels, layer_norm_reference, rms_norm_reference
from tests.kernels.bounds import DTYPES, Function, assert_kernel_close, assert_refused, assert_same_bits

EPS = 1e-5
NORMS = {
    "rms_norm": ("x_TD", "weight_D"),
    "add_rms_norm": ("x_TD", "residual_TD", "weight_D"),
    "layer_norm": ("x_TD",),
    "add_layer_norm": ("x_TD", "residual_TD"),
}
# More rows than programs (4, 4, 2, 1, 1 under the interpreter). The last case computes the weight's gradient in a
# separate kernel.
SHAPES = ((150, 64), (80, 80), (5, 3072), (2, 8192), (9, 9000))

pytestmark = pytest.mark.usefixtures("triton_kernels", "poisoned_empty")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NORMS)
def test_each_norm_errs_no_more_than_torch(
    name: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    _compare(name, _inputs(shape, dtype, device, *NORMS[name]))


def test_the_bound_sees_a_sum_that_is_not_normed_or_has_no_gradient_of_its_own(device: torch.device) -> None:
    inputs = _inputs((9, 64), torch.bfloat16, device, "x_TD", "residual_TD")

    def norms_x(x_TD: Tensor, residual_TD: Tensor) -> tuple[Tensor, Tensor]:
        return ak.layer_norm(x_TD, EPS), x_TD + residual_TD

    def forgets_the_sum(x_TD: Tensor, residual_TD: Tensor) -> tuple[Tensor, Tensor]:
        normed, total = ak.add_layer_norm(x_TD, residual_TD, EPS)
        return normed, total.detach() + 0.0 * x_TD

    for wrong, value in ((norms_x, "output 0"), (forgets_the_sum, "gradient of x_TD")):
        with pytest.raises(AssertionError, match=f"{value}.*error"):
            _compare("add_layer_norm", inputs, wants_grad=("x_TD",), kernel=wrong)


def test_the_bound_sees_a_wrong_eps_and_a_mean_that_is_taken_away(device: torch.device) -> None:
    inputs = _inputs((9, 64), torch.bfloat16, device, "x_TD", "weight_D")
    for wrong in (partial(ak.rms_norm, eps=0.02), lambda x_TD, weight_D: ak.layer_norm(x_TD, EPS) * weight_D):
        with pytest.raises(AssertionError, match="error"):
            _compare("rms_norm", inputs, wants_grad=(), kernel=wrong)


@settings(max_examples=12)
@given(num_rows=st.integers(0, 40), width=st.integers(2, 200), seed=st.integers(0, 99))
def test_every_shape_is_normed(num_rows: int, width: int, seed: int, device: torch.device) -> None:
    # bfloat16, in which a few numbers may differ only by one final rounding: in float32, torch may be exact by chance.
    # No width of 1: its gradient is zero except for eps, so only rounding would be visible.
    inputs = _inputs((num_rows, width), torch.bfloat16, device, "x_TD", "residual_TD", "weight_D", seed=seed)
    _compare("add_rms_norm", inputs)


@pytest.mark.parametrize("wanted", ["x_TD", "residual_TD", "weight_D"])
def test_only_the_wanted_gradients_are_made(wanted: str, device: torch.device) -> None:
    inputs = _inputs((4, 48), torch.float32, device, "x_TD", "residual_TD", "weight_D")
    _compare("add_rms_norm", inputs, wants_grad=(wanted,))


def test_a_gradient_of_the_sum_alone_passes_through(device: torch.device) -> None:
    inputs = _inputs((4, 48), torch.float32, device, "x_TD", "residual_TD", "weight_D")
    x = inputs["x_TD"].requires_grad_()
    total = ak.add_rms_norm(x, inputs["residual_TD"], inputs["weight_D"], EPS)[1]
    seed = torch.randn_like(total)
    assert torch.equal(torch.autograd.grad(total, x, seed)[0], seed)


@pytest.mark.parametrize("shape", ((70, 64), (9, 9000)))
def test_repeats_checkpointing_and_compiling_give_the_same_bits(shape: tuple[int, int], device: torch.device) -> None:
    inputs = _inputs(shape, torch.bfloat16, device, "x_TD", "residual_TD", "weight_D")

    def block(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor) -> Tensor:
        normed, total = ak.add_rms_norm(x_TD, residual_TD, weight_D, EPS)
        normed, total = ak.add_layer_norm(normed, total, EPS)
        return ak.layer_norm(ak.rms_norm(normed, weight_D, EPS) + total, EPS)

    assert_same_bits(block, inputs, wants_grad=tuple(inputs))


def test_backward_reads_the_weight_that_is_there_then(device: torch.device) -> None:
    """ZeRO-3 frees a weight after forward and gathers it again into other memory before backward."""
    inputs = _inputs((4, 48), torch.float32, device, "x_TD", "weight_D")
    x, weight = inputs["x_TD"].requires_grad_(), torch.nn.Parameter(inputs["weight_D"])
    gathered = weight.detach().clone()
    normed = ak.rms_norm(x, weight, EPS)
    expected = torch.autograd.grad(normed.sum(), x, retain_graph=True)[0]
    weight.data = torch.empty(0, device=device)
    for scale in (1.0, 2.0):
        weight.data = scale * gathered
        assert torch.equal(torch.autograd.grad(normed.sum(), x, retain_graph=True)[0], scale * expected)


def test_rows_of_a_wider_tensor_and_transposed_rows_are_read_where_they_are(device: torch.device) -> None:
    wide = _inputs((6, 96), torch.float32, device, "x_TD")["x_TD"]
    weight = torch.ones(32, device=device)
    for view in (wide[:, 32:64], wide[:, ::3], wide[:, :32].t().contiguous().t(), wide.view(2, 3, 96)[..., 64:]):
        assert torch.equal(ak.rms_norm(view, weight, EPS), ak.rms_norm(view.contiguous(), weight, EPS))
    x = wide[:, 32:64].detach().requires_grad_()
    normed = ak.rms_norm(x, weight, EPS)
    (strided,) = torch.autograd.grad(normed, x, wide[:, 1:33].t().contiguous().t(), retain_graph=True)
    assert torch.equal(strided, torch.autograd.grad(normed, x, wide[:, 1:33].contiguous())[0])


@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_heads_of_queries_and_keys_are_normed_each(head_dim: int, device: torch.device) -> None:
    """qk-norm: many short rows, several of them in one program. 5 x 9 heads do not fill the last one."""
    assert 1 < kernels.choose(head_dim).block_rows < 45
    inputs = _inputs((45, head_dim), torch.bfloat16, device, "x_TD", "weight_D")
    _compare("rms_norm", inputs | {"x_TD": inputs["x_TD"].view(5, 9, head_dim)})


def test_the_operators_fakes_match_them(device: torch.device) -> None:
    inputs = _inputs((5, 24), torch.bfloat16, device, "x_TD", "residual_TD", "weight_D")
    x, residual, weight = inputs.values()
    for given_residual, given_weight in ((residual, weight), (None, weight), (residual, None), (None, None)):
        torch.library.opcheck(autograd.norm_forward, (x, given_residual, given_weight, EPS))
        _, _, mean, rstd = autograd.norm_forward(x, given_residual, given_weight, EPS)
        for wants_weight in (False, given_weight is not None):
            arguments = (residual, given_residual, x, given_weight, mean, rstd, wants_weight)
            torch.library.opcheck(autograd.norm_backward, arguments)


def test_wrong_arguments_are_named(device: torch.device) -> None:
    x, weight = torch.ones(2, 8, device=device), torch.ones(8, device=device)
    assert_refused(lambda: ak.rms_norm(x, weight[:7], EPS), "weight_D has shape")
    assert_refused(lambda: ak.rms_norm(x, weight.to("meta"), EPS), "different devices")
    assert_refused(lambda: ak.layer_norm(x.long(), EPS), "expected floats")
    for add in (partial(ak.add_rms_norm, weight_D=weight, eps=EPS), partial(ak.add_layer_norm, eps=EPS)):
        assert_refused(partial(add, x, x[:1]), "residual_TD has shape")
        assert_refused(partial(add, x, x.bfloat16()), "differ in dtype")
        assert_refused(partial(add, x, x.to("meta")), "different devices")
    wide = torch.ones(1, 16385, device=device)
    for call in (lambda: ak.layer_norm(wide, EPS), lambda: ak.add_layer_norm(wide, wide, EPS)):
        assert_refused(call, "rows of 16385", choices=("triton",))
    assert_refused(lambda: ak.layer_norm(x.double(), EPS), "float64", choices=("triton",))


def _compare(
    name: str,
    inputs: dict[str, Tensor],
    *,
    wants_grad: tuple[str, ...] | None = None,
    kernel: Function | None = None,
) -> None:
    """Compare a norm, or `kernel` in its place, with the reference of that norm."""
    kernel = kernel or partial(getattr(ak, name), eps=EPS)
    reference = partial(rms_norm_reference if name.endswith("rms_norm") else layer_norm_reference, eps=EPS)
    if name.startswith("add_"):
        reference = partial(_of_sum, reference)
    assert_kernel_close(kernel, reference, inputs, wants_grad=NORMS[name] if wants_grad is None else wants_grad)


def _of_sum(reference: Function, x_TD: Tensor, residual_TD: Tensor, **others: Tensor) -> tuple[Tensor, Tensor]:
    total_TD = x_TD + residual_TD
    return reference(total_TD, **others), total_TD


def _inputs(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device, *names: str, seed: int = 0
) -> dict[str, Tensor]:
    """Rows with nonzero mean and with scales that differ between rows; weights around one."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {}
    for name in names:
        size = shape[1:] if name == "weight_D" else shape
        x = torch.randn(size, generator=generator)
        x = 1 + 0.3 * x if name == "weight_D" else (x + 0.5) * torch.logspace(-1, 1, shape[0])[:, None]
        inputs[name] = x.to(device, dtype)
    return inputs
