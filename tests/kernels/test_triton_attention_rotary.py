"""Attention with rotary inside against rotary and attention in plain torch, both against float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

import arc_kernels as ak
from arc_kernels.attention import kernels
from arc_kernels.attention.segments import Rotation
from tests.kernels.attention_cases import INPUTS, TURNED, Case, angles_of, compare, inputs_of, plain_attention, spans_of
from tests.kernels.bounds import assert_kernel_close, assert_refused

POOLED = Case((2, 5), (9, 18), group=3)  # fewer queries than keys, at different positions
SQUARE = Case((3, 20), (3, 20))

pytestmark = pytest.mark.usefixtures("triton_kernels", "poisoned_empty")
small_tiles = pytest.mark.usefixtures("small_attention_tiles")


# Head size 80 is padded: the halves of a head are then apart in the tiles.
@small_tiles
@pytest.mark.parametrize(("head_dim", "group"), [(8, 1), (64, 3), (80, 4), (128, 3), (256, 1)])
def test_head_sizes_and_pooled_positions_err_no_more_than_torch(
    head_dim: int, group: int, device: torch.device
) -> None:
    compare(
        POOLED._replace(head_dim=head_dim, group=group, num_kv_heads=2), "full", torch.bfloat16, device, turned=TURNED
    )


def test_the_real_tiles_err_no_more_than_torch(device: torch.device) -> None:
    compare(Case((140, 3), (140, 3), group=3, head_dim=80), "causal", torch.bfloat16, device, turned=TURNED)


@small_tiles
@pytest.mark.parametrize("turned", ["rotary_q", "rotary_k"])
def test_one_side_may_come_turned(turned: str, device: torch.device) -> None:
    compare(POOLED, "full", torch.bfloat16, device, turned=(turned,))


@small_tiles
def test_the_bound_sees_exchanged_angles_and_gradients_that_are_not_turned_back(device: torch.device) -> None:
    spans, angles = spans_of(SQUARE, "causal", device), angles_of(SQUARE, device)
    exchanged = {"rotary_q": angles["rotary_k"], "rotary_k": angles["rotary_q"]}

    def keeps_the_turn(turned: str, **x: Tensor) -> Tensor:
        """Correct outputs, but q (or k) receives the gradient of the rotated rows."""
        name = "q_TNH" if turned == "rotary_q" else "k_UKH"
        rows = ak.rotary(x[name], *angles[turned]).detach() + x[name] - x[name].detach()
        return ak.attention_varlen(**(x | {name: rows}), **spans, **(angles | {turned: None}))

    wrongs: tuple[tuple[Callable[..., Tensor], str], ...] = (
        (partial(ak.attention_varlen, **spans, **exchanged), "output 0"),
        (partial(keeps_the_turn, "rotary_q"), "gradient of q_TNH"),
        (partial(keeps_the_turn, "rotary_k"), "gradient of k_UKH"),
    )
    inputs = inputs_of(SQUARE, torch.bfloat16, device)
    for wrong, name in wrongs:
        with pytest.raises(AssertionError, match=f"{name}.*error"):
            assert_kernel_close(wrong, plain_attention(spans, angles), inputs, wants_grad=INPUTS)


@small_tiles
def test_scaled_angles_scale_output_and_gradients(device: torch.device) -> None:
    """Cosines and sines times a factor, as yarn and longrope have, and pairs that stay, as with a partial rotary."""
    spans, angles = spans_of(SQUARE, "causal", device), angles_of(SQUARE, device)
    unscaled = {name: (_staying(cos, 1.0), _staying(sin, 0.0)) for name, (cos, sin) in angles.items()}
    scaled = {name: (_staying(1.3 * cos, 1.0), _staying(1.3 * sin, 0.0)) for name, (cos, sin) in angles.items()}
    inputs, right = inputs_of(SQUARE, torch.bfloat16, device), plain_attention(spans, scaled)
    assert_kernel_close(partial(ak.attention_varlen, **spans, **scaled), right, inputs, wants_grad=INPUTS)
    for side, name in (("rotary_q", "gradient of q_TNH"), ("rotary_k", "gradient of k_UKH")):
        wrong = partial(_turned_without_factor, spans, scaled, unscaled[side], side)
        with pytest.raises(AssertionError, match=f"{name}.*error"):
            assert_kernel_close(wrong, right, inputs, wants_grad=INPUTS)


def _staying(angles: Tensor, value: float) -> Tensor:
    """The angles, with this value for the last five pairs."""
    return torch.cat((angles[:, :-5], torch.full_like(angles[:, -5:], value)), dim=1)


def _turned_without_factor(
    spans: dict, scaled: dict[str, Rotation], unscaled: Rotation, side: str, **x: Tensor
) -> Tensor:
    """Correct outputs, but the gradient of q (or k) is that of the rotation without the factor."""
    name = "q_TNH" if side == "rotary_q" else "k_UKH"
    unit = ak.rotary(x[name], *unscaled)
    rows = ak.rotary(x[name], *scaled[side]).detach() + unit - unit.detach()
    return ak.attention_varlen(**(x | {name: rows}), **spans, **(scaled | {side: None}))


@small_tiles
def test_turned_queries_are_written_only_where_backward_will_read_them(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    launch = kernels.forward

    def recording(*args: object, **options: object) -> tuple[Tensor, Tensor, Tensor]:
        result = launch(*args, **options)  # type: ignore[arg-type]
        sizes.append(result[2].numel())
        return result

    monkeypatch.setattr(kernels, "forward", recording)
    q, k, v = inputs_of(SQUARE, torch.float32, device).values()
    spans, angles = spans_of(SQUARE, "full", device), angles_of(SQUARE, device)
    q.requires_grad_()
    with torch.no_grad():
        ak.attention_varlen(q, k, v, **spans, **angles)
    kept = ak.attention_varlen(q, k, v, **spans, **angles).grad_fn.saved_tensors
    ak.attention_varlen(q, k, v, **spans, rotary_k=angles["rotary_k"])
    assert sizes == [0, q.numel(), 0]
    assert not any(x is not None and x.data_ptr() in (q.data_ptr(), k.data_ptr()) for x in kept), "unturned rows kept"


def test_under_the_reference_angles_may_have_gradients(device: torch.device) -> None:
    spans, angles = spans_of(SQUARE, "full", device), angles_of(SQUARE, device)
    angles = {name: (cos.requires_grad_(), sin) for name, (cos, sin) in angles.items()}
    inputs = inputs_of(SQUARE, torch.float32, device)
    with ak.use("reference"):
        ours = ak.attention_varlen(**inputs, **spans, **angles)
    assert torch.equal(ours, plain_attention(spans, angles)(**inputs))
    assert torch.autograd.grad(ours.sum(), angles["rotary_q"][0])[0].abs().sum() > 0
    refused = partial(ak.attention_varlen, **inputs, **spans, **angles)
    assert_refused(refused, r"rotary_q\[0\] requires a gradient", choices=("triton",))


def test_wrong_angles_are_named(device: torch.device) -> None:
    inputs, spans = inputs_of(POOLED, torch.float32, device), spans_of(POOLED, "full", device)
    angles = angles_of(POOLED, device)
    cos, sin = angles["rotary_q"]
    for change, message in (
        ({"rotary_q": angles["rotary_k"]}, r"rotary_q\[0\] has shape \(27, 16\); expected \(7, 16\)"),
        ({"rotary_k": (angles["rotary_k"][0], sin)}, r"rotary_k\[1\] has shape"),
        ({"rotary_q": (cos, sin, sin)}, "rotary_q has 3 elements"),
        ({"rotary_q": (cos.bfloat16(), sin)}, r"rotary_q\[0\] is torch.bfloat16"),
        ({"rotary_q": (cos, sin.to("meta"))}, "different devices"),
    ):
        assert_refused(partial(ak.attention_varlen, **inputs, **spans, **(angles | change)), message)
    odd = {name: x[..., :31] for name, x in inputs.items()}
    refused = partial(ak.attention_varlen, **odd, **spans, **angles)
    assert_refused(refused, "head size is 31; expected an even one")
