"""linear_cross_entropy with its Triton kernel against plain torch.

Both torch and the kernel round logits to the dtype of the rows. The bound of the loss, twice torch's own error in that
dtype, includes this rounding.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import arc_kernels as ak
from arc_kernels.cross_entropy import autograd, kernels, linear_cross_entropy_reference
from tests.kernels.bounds import (
    DTYPES,
    assert_close_as_torch,
    assert_kernel_close,
    assert_refused,
    assert_same_bits,
    in_dtype,
    outputs_and_gradients,
)

pytestmark = pytest.mark.usefixtures("triton_kernels", "poisoned_empty")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [1, 3, 512, 777])
def test_loss_and_gradient_are_as_close_as_torch(vocab_size: int, dtype: torch.dtype, device: torch.device) -> None:
    _compare(_inputs(5, 24, vocab_size, dtype, device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_vocabulary_of_several_blocks(dtype: torch.dtype, device: torch.device) -> None:
    _compare(_inputs(3, 8, 33333, dtype, device))


@pytest.mark.parametrize("num_rows", [1, 5, 6])
@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_the_chunks_do_not_change_the_result(
    num_rows: int, chunk: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = _inputs(num_rows, 8, 70, torch.float32, device)
    monkeypatch.setattr(kernels, "CHUNK_BYTES", chunk * 128 * 4)  # rows of 70 logits are padded to 128
    assert kernels.chunk_rows(num_rows, row_bytes=128 * 4) == chunk
    _compare(inputs)


def test_chunks_are_even_whole_tiles_within_the_bound() -> None:
    assert kernels.chunk_rows(4096, row_bytes=128256 * 2) == 1024
    assert kernels.chunk_rows(1100, row_bytes=128256 * 2) == 640  # not 1024 and 76: each chunk reads the whole weight
    assert kernels.chunk_rows(3, row_bytes=128256 * 2) == 128
    assert kernels.chunk_rows(100, row_bytes=2 * kernels.CHUNK_BYTES) == 1
    assert kernels.chunk_rows(4096, row_bytes=1 << 18) * (1 << 18) <= kernels.CHUNK_BYTES


def test_memory_is_one_chunk_and_not_the_logits(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 4 * 64 * 4)
    products: list[tuple[int, ...]] = []
    whole_mm = torch.mm

    def recording_mm(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
        products.append(tuple(out.shape))
        return whole_mm(a, b, out=out)

    monkeypatch.setattr(torch, "mm", recording_mm)
    ak.linear_cross_entropy(**_inputs(10, 8, 64, torch.float32, device))
    assert products == [(4, 64), (4, 64), (2, 64)]


@settings(max_examples=12)
@given(
    num_rows=st.integers(1, 6),
    width=st.integers(1, 40),
    vocab_size=st.integers(1, 700),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(num_rows: int, width: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> None:
    _compare(_inputs(num_rows, width, vocab_size, dtype, device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_far_beyond_exp_stay_finite(dtype: torch.dtype, device: torch.device) -> None:
    inputs = _inputs(4, 24, 600, dtype, device)
    _compare(inputs | {"h_LD": inputs["h_LD"] * 1000})


def test_the_bound_sees_a_label_left_out(device: torch.device) -> None:
    inputs = _inputs(5, 24, 777, torch.bfloat16, device)
    logits_LV = inputs["h_LD"].double() @ inputs["weight_VD"].double().T
    exact = F.cross_entropy(logits_LV, inputs["labels_L"], reduction="none")
    torchs = linear_cross_entropy_reference(**inputs)
    wrong = ak.linear_cross_entropy(**(inputs | {"labels_L": (inputs["labels_L"] + 1) % 777}))
    with pytest.raises(AssertionError, match="error"):
        assert_close_as_torch(wrong, torchs, exact, "loss")


def test_confident_rows_have_no_negative_loss(device: torch.device) -> None:
    inputs = _inputs(4, 24, 600, torch.bfloat16, device)
    sure = inputs["weight_VD"][inputs["labels_L"]] * 8
    nll_L = ak.linear_cross_entropy(**(inputs | {"h_LD": sure}))
    assert (nll_L < 0.5).all()  # they are confident
    assert (nll_L >= 0).all()  # label and sum use the same rounded logits


def test_the_gradient_follows_the_weight_of_each_row(device: torch.device) -> None:
    inputs = _inputs(3, 24, 70, torch.float32, device)
    h_LD = inputs["h_LD"].clone().requires_grad_()
    nll_L = ak.linear_cross_entropy(h_LD, inputs["weight_VD"], inputs["labels_L"])
    (plain,) = torch.autograd.grad(nll_L.sum(), h_LD, retain_graph=True)
    scale = torch.tensor([0.0, 1.0, -2.0], device=device)
    (scaled,) = torch.autograd.grad((nll_L * scale).sum(), h_LD, retain_graph=True)
    assert plain.abs().min(dim=0).values.max() > 0
    assert torch.equal(scaled, plain * scale[:, None])
    (again,) = torch.autograd.grad(nll_L.sum(), h_LD)
    assert torch.equal(again, plain)


def test_repeats_checkpointing_and_compiling_give_the_same_bits(device: torch.device) -> None:
    inputs = _inputs(5, 24, 777, torch.bfloat16, device)
    assert_same_bits(ak.linear_cross_entropy, inputs, wants_grad=("h_LD",))


def test_without_gradients_only_the_loss_is_made(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[bool] = []
    inner = autograd.losses_and_gradient

    def recording(*args: Tensor, wants_grad: bool) -> tuple[Tensor, Tensor]:
        wanted.append(wants_grad)
        return inner(*args, wants_grad=wants_grad)

    monkeypatch.setattr(autograd, "losses_and_gradient", recording)
    inputs = _inputs(3, 8, 70, torch.float32, device)
    with_grad = ak.linear_cross_entropy(
        inputs["h_LD"].clone().requires_grad_(), inputs["weight_VD"], inputs["labels_L"]
    )
    detached = ak.linear_cross_entropy(**inputs)
    with torch.no_grad():
        within = ak.linear_cross_entropy(
            inputs["h_LD"].clone().requires_grad_(), inputs["weight_VD"], inputs["labels_L"]
        )
    assert wanted == [True, False, False]
    assert detached.grad_fn is None and within.grad_fn is None
    assert torch.equal(with_grad, detached) and torch.equal(with_grad, within)


def test_no_rows_give_no_losses_and_an_empty_gradient(device: torch.device) -> None:
    h_LD = torch.zeros(0, 8, device=device, requires_grad=True)
    nll_L = ak.linear_cross_entropy(
        h_LD, torch.ones(11, 8, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    )
    nll_L.sum().backward()
    assert nll_L.shape == (0,) and h_LD.grad is not None and h_LD.grad.shape == (0, 8)


def test_the_operators_are_what_they_declare(device: torch.device) -> None:
    ops = torch.ops.arc_kernels
    inputs = _inputs(5, 24, 70, torch.float32, device)
    arguments = (inputs["h_LD"], inputs["weight_VD"], inputs["labels_L"])
    for wants_grad in (True, False):
        torch.library.opcheck(ops.linear_cross_entropy, (*arguments, wants_grad))
    torch.library.opcheck(ops.scale_rows, (inputs["h_LD"], torch.arange(5.0, device=device)))


@pytest.mark.parametrize("label", [-100, -1, 70, 2**40])
def test_a_label_outside_the_vocabulary_is_refused_or_makes_its_row_nan(
    label: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARC_KERNELS_CHECK", "0")  # as on a GPU, which does not check labels
    inputs = _inputs(3, 8, 70, torch.float32, device)
    right = outputs_and_gradients(ak.linear_cross_entropy, inputs, wants_grad=("h_LD",))
    inputs["labels_L"][1] = label
    wrong = outputs_and_gradients(ak.linear_cross_entropy, inputs, wants_grad=("h_LD",))
    for name in right:
        assert wrong[name][1].isnan().all() and torch.equal(wrong[name][[0, 2]], right[name][[0, 2]])
    monkeypatch.setenv("ARC_KERNELS_CHECK", "1")
    with pytest.raises(ValueError, match=f"labels_L holds {label}; expected 0 … 69"):
        ak.linear_cross_entropy(**inputs)


def test_arguments_that_do_not_fit_are_refused(device: torch.device) -> None:
    inputs = _inputs(3, 8, 70, torch.float32, device)
    wrong: list[tuple[dict[str, Tensor], str]] = [
        ({"weight_VD": inputs["weight_VD"][:, 1:]}, "weight_VD has shape"),
        ({"weight_VD": inputs["weight_VD"].half()}, "differ in dtype"),
        ({"weight_VD": inputs["weight_VD"].clone().requires_grad_()}, "frozen"),
        ({"weight_VD": inputs["weight_VD"][:0]}, "weight_VD has no rows"),
        ({"labels_L": inputs["labels_L"][1:]}, "labels_L has shape"),
        ({"labels_L": inputs["labels_L"].int()}, r"labels_L is torch\.int32; expected int64"),
    ]
    for change, message in wrong:
        assert_refused(partial(ak.linear_cross_entropy, **(inputs | change)), message)
    doubles = in_dtype(inputs, torch.float64)
    assert_refused(partial(ak.linear_cross_entropy, **doubles), "float64", choices=("triton",))


def _compare(inputs: dict[str, Tensor]) -> None:
    assert_kernel_close(ak.linear_cross_entropy, linear_cross_entropy_reference, inputs, wants_grad=("h_LD",))


def _inputs(num_rows: int, width: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(num_rows * 10000 + vocab_size)
    h_LD = torch.randn(num_rows, width, generator=generator, dtype=torch.float64)
    weight_VD = torch.randn(vocab_size, width, generator=generator, dtype=torch.float64) / width**0.5 * 3
    labels_L = torch.randint(vocab_size, (num_rows,), generator=generator)
    return {
        "h_LD": h_LD.to(device, dtype),
        "weight_VD": weight_VD.to(device, dtype),
        "labels_L": labels_L.to(device),
    }
