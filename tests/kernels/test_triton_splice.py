"""splice with its Triton kernels against plain torch."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import arc_kernels as ak
import arc_kernels.splice.autograd  # registers the operators
from arc_kernels.splice import splice_reference
from tests.kernels.bounds import (
    DTYPES,
    assert_close_as_torch,
    assert_kernel_close,
    assert_refused,
    assert_same_bits,
    in_dtype,
    outputs_and_gradients,
)

BOTH = ("table_VD", "given_ZD")

pytestmark = pytest.mark.usefixtures("triton_kernels", "poisoned_empty")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 24, 600])
def test_rows_and_gradients_are_as_close_as_torch(width: int, dtype: torch.dtype, device: torch.device) -> None:
    _compare(_inputs(9, 4, width, 6, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_rows_are_copied_bit_for_bit(dtype: torch.dtype, device: torch.device) -> None:
    inputs = _inputs(9, 4, 24, 6, dtype, device)
    out_RD = ak.splice(**inputs)
    assert torch.equal(out_RD[inputs["text_rows_N"]], inputs["table_VD"][inputs["ids_N"]])
    assert torch.equal(out_RD[inputs["given_rows_Z"]], inputs["given_ZD"])
    assert torch.equal(out_RD, splice_reference(**inputs))


def test_wider_given_rows_are_rounded_to_the_table(device: torch.device) -> None:
    inputs = _inputs(5, 3, 24, 6, torch.bfloat16, device)
    inputs["given_ZD"] = torch.randn(3, 24, generator=torch.Generator().manual_seed(0)).to(device)
    assert torch.equal(ak.splice(**inputs), splice_reference(**inputs))
    values = outputs_and_gradients(ak.splice, inputs, wants_grad=BOTH)
    assert values["gradient of given_ZD"].dtype == torch.float32
    assert values["gradient of table_VD"].dtype == torch.bfloat16


@pytest.mark.parametrize("repeats", [1, 15, 16, 17, 50])
def test_a_token_of_many_rows_is_added_up_in_float32(repeats: int, device: torch.device) -> None:
    inputs = _inputs(repeats + 3, 2, 24, 6, torch.bfloat16, device)
    inputs["ids_N"][:repeats] = 2
    _compare(inputs)


def test_tokens_that_do_not_occur_get_a_zero_gradient(device: torch.device) -> None:
    inputs = _inputs(4, 2, 24, 9, torch.float32, device)
    inputs["ids_N"] = torch.tensor([8, 0, 8, 5], device=device)
    gradient_VD = outputs_and_gradients(ak.splice, inputs, wants_grad=BOTH)["gradient of table_VD"]
    assert gradient_VD.abs().amax(1).gt(0).tolist() == [v in (0, 5, 8) for v in range(9)]


def test_rows_of_a_wider_table_are_read_where_they_are_and_a_transposed_table_is_refused(device: torch.device) -> None:
    inputs = _inputs(5, 3, 24, 6, torch.float32, device)
    whole = torch.full((6, 40), torch.nan, device=device)
    whole[:, 8:32] = inputs["table_VD"]
    part = whole[:, 8:32].requires_grad_()
    ours = outputs_and_gradients(ak.splice, inputs, wants_grad=BOTH)
    strided = ak.splice(**(inputs | {"table_VD": part}))
    assert not part.is_contiguous() and torch.equal(strided, ours["output 0"])
    (gradient,) = torch.autograd.grad(strided.sum(), part)
    assert gradient.shape == part.shape and torch.equal(gradient.sum(1) / 24, gradient[:, 0])
    transposed = inputs | {"table_VD": inputs["table_VD"].t().contiguous().t()}
    refusal = r"table_VD has strides \(1, 6\).*contiguous once.*use\('reference'\)"
    assert_refused(lambda: ak.splice(**transposed), refusal, choices=("triton",))
    assert torch.equal(splice_reference(**transposed), ours["output 0"])


def test_the_bound_sees_a_row_left_out_of_a_sum(device: torch.device) -> None:
    inputs = _inputs(9, 1, 24, 1, torch.bfloat16, device)
    torchs, exact = (
        outputs_and_gradients(splice_reference, in_dtype(inputs, dtype), wants_grad=BOTH)["gradient of table_VD"]
        for dtype in (torch.bfloat16, torch.float64)
    )
    grad_RD = torch.randn(10, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left_out = exact - grad_RD[inputs["text_rows_N"][0].cpu()].to(device)
    with pytest.raises(AssertionError, match="error"):
        assert_close_as_torch(left_out.bfloat16(), torchs, exact, "table")


@pytest.mark.parametrize("wants_grad", [("table_VD",), ("given_ZD",)])
def test_only_the_wanted_gradient_is_made(wants_grad: tuple[str, ...], device: torch.device) -> None:
    inputs = _inputs(5, 3, 24, 6, torch.float32, device)
    both = outputs_and_gradients(ak.splice, inputs, wants_grad=BOTH)
    one = outputs_and_gradients(ak.splice, inputs, wants_grad=wants_grad)
    assert all(torch.equal(one[name], both[name]) for name in one)
    leaves = {name: x.clone().requires_grad_(name in wants_grad) for name, x in inputs.items()}
    kept = ak.splice(**leaves).grad_fn.saved_tensors
    assert sum(x is not None for x in kept) == (2 if wants_grad == ("table_VD",) else 1)


@pytest.mark.parametrize("num_text", [0, 3])
def test_nothing_to_splice(num_text: int, device: torch.device) -> None:
    inputs = _inputs(num_text, 0, 24, 6, torch.float32, device)
    del inputs["given_ZD"], inputs["given_rows_Z"]
    kernel, reference = (partial(f, given_ZD=None, given_rows_Z=None) for f in (ak.splice, splice_reference))
    assert_kernel_close(kernel, reference, inputs, wants_grad=("table_VD",))


def test_nothing_but_given_rows(device: torch.device) -> None:
    _compare(_inputs(0, 4, 24, 6, torch.float32, device))


@settings(max_examples=12)
@given(
    num_text=st.integers(0, 12),
    num_given=st.integers(0, 6),
    width=st.integers(1, 40),
    vocab_size=st.integers(1, 8),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(
    num_text: int, num_given: int, width: int, vocab_size: int, dtype: torch.dtype, device: torch.device
) -> None:
    inputs = _inputs(num_text, num_given, width, vocab_size, dtype, device)
    _compare(inputs)


def test_repeats_checkpointing_and_compiling_give_the_same_bits(device: torch.device) -> None:
    assert_same_bits(ak.splice, _inputs(40, 3, 24, 3, torch.bfloat16, device), wants_grad=BOTH)


def test_the_operators_are_what_they_declare(device: torch.device) -> None:
    ops = torch.ops.arc_kernels
    inputs = _inputs(5, 3, 24, 6, torch.float32, device)
    ids, rows, given_rows = inputs["ids_N"], inputs["text_rows_N"], inputs["given_rows_Z"]
    torch.library.opcheck(ops.splice, tuple(inputs.values()))
    torch.library.opcheck(ops.splice, (inputs["table_VD"], ids, torch.arange(5, device=device), None, None))
    grad_RD = ops.splice(*inputs.values())
    torch.library.opcheck(ops.splice_given_gradient, (grad_RD, given_rows, torch.bfloat16))
    torch.library.opcheck(ops.splice_table_gradient, (grad_RD, ids, rows, 6, torch.bfloat16))


def test_a_wrong_id_on_a_gpu_makes_its_row_nan_and_touches_nothing_else(device: torch.device) -> None:
    # The operators: they do not look at the ids first.
    ops = torch.ops.arc_kernels
    inputs = _inputs(4, 2, 8, 6, torch.float32, device)
    right_RD = ops.splice(*inputs.values())
    inputs["ids_N"][1], inputs["ids_N"][2] = 6, -1
    wrong_RD = ops.splice(*inputs.values())
    bad = torch.zeros(6, dtype=torch.bool, device=device)
    bad[inputs["text_rows_N"][1:3]] = True
    assert wrong_RD[bad].isnan().all() and torch.equal(wrong_RD[~bad], right_RD[~bad])
    dtable_VD = ops.splice_table_gradient(right_RD, inputs["ids_N"], inputs["text_rows_N"], 6, torch.float32)
    assert dtable_VD.isfinite().all()


def test_wrong_rows_on_a_gpu_are_not_written(device: torch.device) -> None:
    # The operators: they do not look at the rows first.
    ops = torch.ops.arc_kernels
    inputs = _inputs(4, 2, 8, 6, torch.float32, device)
    inputs["text_rows_N"][0], inputs["given_rows_Z"][0] = -1, 2**40
    out_RD = ops.splice(*inputs.values())
    assert int(out_RD.isnan().all(1).sum()) == 2
    assert ops.splice_given_gradient(torch.ones_like(out_RD), inputs["given_rows_Z"], torch.float32)[0].isnan().all()


def test_arguments_that_do_not_fit_are_refused(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARC_KERNELS_CHECK", "1")
    inputs = _inputs(4, 2, 8, 6, torch.float32, device)
    rows = inputs["text_rows_N"]
    wrong: list[tuple[dict[str, Tensor | None], str]] = [
        ({"ids_N": inputs["ids_N"] + 6}, "ids_N holds"),
        ({"ids_N": inputs["ids_N"] - 7}, "ids_N holds -"),
        ({"ids_N": inputs["ids_N"].int()}, r"ids_N is torch\.int32; expected int64"),
        ({"text_rows_N": rows + 3}, "text_rows_N holds"),
        ({"text_rows_N": rows[:1].expand(4)}, "more than once"),
        ({"text_rows_N": rows[1:]}, "text_rows_N has shape"),
        ({"given_ZD": inputs["given_ZD"][:, 1:]}, "given_ZD has shape"),
        ({"given_ZD": None}, "must be given together"),
    ]
    for change, message in wrong:
        assert_refused(partial(ak.splice, **(inputs | change)), message)
    assert_refused(partial(ak.splice, **in_dtype(inputs, torch.float64)), "float64", choices=("triton",))


def _compare(inputs: dict[str, Tensor]) -> None:
    assert_kernel_close(ak.splice, splice_reference, inputs, wants_grad=BOTH)


def _inputs(
    num_text: int, num_given: int, width: int, vocab_size: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(num_text * 100 + num_given)
    rows_R = torch.randperm(num_text + num_given, generator=generator).to(device)
    return {
        "table_VD": torch.randn(vocab_size, width, generator=generator, dtype=torch.float64).to(device, dtype),
        "ids_N": torch.randint(vocab_size, (num_text,), generator=generator).to(device),
        "text_rows_N": rows_R[:num_text],
        "given_ZD": torch.randn(num_given, width, generator=generator, dtype=torch.float64).to(device, dtype),
        "given_rows_Z": rows_R[num_text:],
    }
