"""Attention with a window against plain torch: output and all gradients, against float64.

The window's start falls on other blocks than the limit. The tests therefore use windows below, at and above the small
tiles of 16 packed query rows by 32 keys.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

import arc_kernels as ak
from arc_kernels.attention import flash, kernels
from tests.kernels.attention_cases import (
    RAGGED,
    TURNED,
    Case,
    compare,
    inputs_of,
    plain_attention,
    segments_of,
    spans_of,
)
from tests.kernels.bounds import assert_kernel_close

LONG = Case((65, 1, 20), (65, 70, 75), group=2)
MODES = ("causal", "limits")

pytestmark = pytest.mark.usefixtures("triton_kernels", "poisoned_empty")
small_tiles = pytest.mark.usefixtures("small_attention_tiles")


@small_tiles
@pytest.mark.parametrize("window", [2, 32, 33, 66])
@pytest.mark.parametrize("mode", MODES)
def test_every_window_errs_no_more_than_torch(mode: str, window: int, device: torch.device) -> None:
    compare(LONG, mode, torch.bfloat16, device, window=window)


@small_tiles
@pytest.mark.parametrize(("mode", "dtype"), [("causal", torch.float32), ("limits", torch.float16)])
def test_other_dtypes_and_rotary_err_no_more_than_torch(mode: str, dtype: torch.dtype, device: torch.device) -> None:
    compare(RAGGED, mode, dtype, device, turned=TURNED, window=12)


# With a single visible key, the gradients of q and k are zero except for rounding.
@small_tiles
@pytest.mark.parametrize("mode", MODES)
def test_a_window_of_one_errs_no_more_than_torch(mode: str, device: torch.device) -> None:
    compare(LONG, mode, torch.bfloat16, device, window=1, wants_grad=("v_UKH",))


@pytest.mark.parametrize("mode", MODES)
def test_the_real_tiles_err_no_more_than_torch(mode: str, device: torch.device) -> None:
    compare(Case((140,), (280,), group=1, head_dim=64), mode, torch.bfloat16, device, turned=TURNED, window=100)


@small_tiles
def test_the_bound_sees_a_window_that_is_one_off(device: torch.device) -> None:
    for mode in MODES:
        spans, inputs = spans_of(LONG, mode, device), inputs_of(LONG, torch.bfloat16, device)
        right = plain_attention(spans | {"window": 9})
        for wrong in (8, 10, None):
            with pytest.raises(AssertionError, match="output 0.*error"):
                function = partial(ak.attention_varlen, **spans, window=wrong)
                assert_kernel_close(function, right, inputs, wants_grad=())


@small_tiles
@pytest.mark.parametrize("mode", MODES)
def test_blocks_outside_the_window_are_not_read(mode: str, device: torch.device) -> None:
    """NaN reaches the results of a kernel that reads it, even if its weight is 0. Cost is thus linear in the window."""
    window, num_keys = 20, 192
    case = Case((num_keys,), (num_keys,), group=1)
    segments = segments_of(case, "causal", device)._replace(window=window)
    if mode == "limits":
        limits = torch.arange(1, num_keys + 1, dtype=torch.int32, device=device)
        segments = segments._replace(causal=False, k_limits_T=limits)
    q, k, v = inputs_of(case, torch.float32, device).values()
    do = torch.randn(q.shape, generator=torch.Generator().manual_seed(0)).to(device)
    o, lse, _ = kernels.forward(q, k, v, segments)
    sums = kernels.delta(o, do)
    dq, (dk, dv) = kernels.dq(q, k, v, do, lse, sums, segments), kernels.dkv(q, k, v, do, lse, sums, segments)
    start, end = 64, 96  # a block of keys, which queries 64 … 114 see
    seen = slice(start, end + window - 1)

    def only(x: Tensor, rows: slice) -> Tensor:
        """A copy of x with NaN in all other rows."""
        return torch.full_like(x, torch.nan).index_copy_(0, torch.arange(num_keys)[rows].to(device), x[rows])

    keys = slice(32, 128)  # the blocks that these queries see
    bare = [only(x, keys) for x in (k, v)]
    assert torch.equal(kernels.forward(q, *bare, segments)[0][seen], o[seen])
    assert torch.equal(kernels.dq(q, *bare, do, lse, sums, segments)[seen], dq[seen])
    queries = slice(64, 128)  # the tiles of these queries
    bare = [only(q, queries), k, v, only(do, queries), only(lse, queries), only(sums, queries)]
    for ours, whole in zip(kernels.dkv(*bare, segments), (dk, dv), strict=True):
        assert torch.equal(ours[start:end], whole[start:end]) and ours[:start].isnan().any()


@small_tiles
def test_tokens_after_a_cached_prefix_see_the_same_window_as_in_one_pass(device: torch.device) -> None:
    whole = Case((60, 41), (60, 41), num_kv_heads=2)
    q, k, v = inputs_of(whole, torch.float32, device).values()
    expected = ak.attention_varlen(q, k, v, **spans_of(whole, "causal", device), window=17)
    suffix = torch.tensor([*range(50, 60), *range(60 + 38, 60 + 41)], device=device)
    spans = spans_of(Case((10, 3), (60, 41)), "causal", device)
    limits = torch.tensor([*range(51, 61), *range(39, 42)], dtype=torch.int32, device=device)
    for given in (spans, spans | {"causal": False, "k_limits_T": limits}):
        ours = ak.attention_varlen(q[suffix], k, v, **given, window=17)
        assert torch.allclose(ours, expected[suffix], rtol=0, atol=1e-5)


def test_a_window_that_hides_no_key_takes_the_kernels_without_one(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = []
    launch = kernels._launch

    def recording(kernel: str, q: Tensor, k: Tensor, v: Tensor, segments: kernels.Segments, *others: object) -> object:
        windows.append(segments.window)
        return launch(kernel, q, k, v, segments, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(kernels, "_launch", recording)
    case = Case((3, 20), (5, 20), head_dim=16)
    inputs, spans = inputs_of(case, torch.float32, device), spans_of(case, "causal", device)
    outputs = [ak.attention_varlen(**inputs, **spans, window=window) for window in (None, 20, 2**40, 19)]
    assert windows == [None, None, None, 19]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], outputs[3])


def test_flash_gets_the_same_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention counts the keys before a query's own, without that one."""
    case, given = Case((3, 2), (3, 4)), []

    def varlen_attn(q: Tensor, *others: object, scale: float, window_size: tuple[int, int]) -> Tensor:
        given.append(window_size)
        return q

    monkeypatch.setattr(flash, "_varlen_attn", lambda: varlen_attn)
    monkeypatch.setattr(flash, "_unsupported", lambda *_: "")
    inputs = inputs_of(case, torch.bfloat16, torch.device("cpu"))
    for mode, window in (("causal", 1), ("causal", 3), ("causal", None), ("causal", 4), ("full", None)):
        spans = spans_of(case, mode, torch.device("cpu"))
        ak.attention_varlen(**inputs, **spans, window=window, backend="flash")
    assert given == [(0, 0), (2, 0), (-1, 0), (-1, 0), (-1, -1)]
