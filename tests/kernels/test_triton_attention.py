"""Varlen attention kernels against plain torch: output and all gradients, in three dtypes, against float64.

The tests use small tiles (`small_attention_tiles`), so that short segments span several tiles. One test uses the real
tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import arc_kernels as ak
from arc_kernels.attention import Backend, configs, kernels
from arc_kernels.attention.autograd import attention_backward, attention_forward
from arc_kernels.attention.flash import flash_serves
from arc_kernels.attention.segments import Segments
from tests.kernels.attention_cases import (
    INPUTS,
    MODES,
    RAGGED,
    TURNED,
    Case,
    angles_of,
    boundaries_of,
    compare,
    inputs_of,
    plain_attention,
    segments_of,
    spans_of,
)
from tests.kernels.bounds import DTYPES, assert_close_as_torch, assert_kernel_close, assert_refused, assert_same_bits

pytestmark = pytest.mark.usefixtures("triton_kernels", "poisoned_empty")
rotary_or_not = pytest.mark.parametrize("turned", [(), TURNED], ids=["plain", "rotary"])
small_tiles = pytest.mark.usefixtures("small_attention_tiles")


@small_tiles
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@rotary_or_not
def test_ragged_segments_err_no_more_than_torch(
    mode: str, dtype: torch.dtype, turned: tuple[str, ...], device: torch.device
) -> None:
    compare(RAGGED._replace(num_kv_heads=1), mode, dtype, device, turned=turned)


@small_tiles
@pytest.mark.parametrize(("group", "mode"), [(1, "causal"), (3, "limits"), (4, "causal"), (8, "full")])
def test_every_ratio_of_heads_errs_no_more_than_torch(group: int, mode: str, device: torch.device) -> None:
    compare(Case((5, 18), (9, 35), group=group, num_kv_heads=2), mode, torch.bfloat16, device)


@small_tiles
@pytest.mark.parametrize("head_dim", (8, 64, 80, 96, 128, 256))
def test_every_head_size_errs_no_more_than_torch(head_dim: int, device: torch.device) -> None:
    compare(Case((5, 18), (9, 35), head_dim=head_dim), "causal", torch.bfloat16, device)


def test_one_long_segment_beside_many_short_ones_with_the_real_tiles(device: torch.device) -> None:
    # Only the last 400 queries: all of them would take half a minute under the interpreter.
    short = (3,) * 9
    case = Case((*short, 400, *short), (*short, 2050, *short), group=1)
    compare(case, "causal", torch.bfloat16, device)


# bfloat16, because its rounding dominates chance effects in few numbers. One fixed segment has several keys: with one
# key, the gradients of q and k are zero except for rounding.
@small_tiles
@settings(max_examples=6)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 24), st.integers(0, 40)), max_size=4),
    group=st.integers(1, 5),
    mode=st.sampled_from(MODES),
)
def test_every_shape_is_attended(lengths: list[tuple[int, int]], group: int, mode: str, device: torch.device) -> None:
    pairs = [(3, 2), *lengths]
    case = Case(tuple(m for m, _ in pairs), tuple(m + more for m, more in pairs), group=group, head_dim=16)
    compare(case, mode, torch.bfloat16, device)


@small_tiles
def test_the_bound_sees_another_scale_mask_or_head(device: torch.device) -> None:
    inputs, spans = inputs_of(RAGGED, torch.bfloat16, device), spans_of(RAGGED, "causal", device)
    starts = {"causal": False, "k_limits_T": _limits_from_the_start(RAGGED).to(device)}
    wrongs: tuple[Callable[..., Tensor], ...] = (
        partial(ak.attention_varlen, **spans, scale=1.05 * RAGGED.head_dim**-0.5),
        partial(ak.attention_varlen, **{**spans, **starts}),
        lambda q_TNH, k_UKH, v_UKH: ak.attention_varlen(q_TNH, k_UKH.flip(1), v_UKH.flip(1), **spans),
    )
    for wrong in wrongs:
        with pytest.raises(AssertionError, match="error"):
            assert_kernel_close(wrong, plain_attention(spans), inputs, wants_grad=())


@small_tiles
@pytest.mark.parametrize(("turned", "window"), [((), None), (TURNED, None), (TURNED, 6)])
def test_repeats_checkpointing_and_compiling_give_the_same_bits(
    turned: tuple[str, ...], window: int | None, device: torch.device
) -> None:
    case = Case((3, 20), (5, 40), group=3)
    angles = angles_of(case, device) if turned else {}
    function = partial(ak.attention_varlen, **spans_of(case, "causal", device), **angles, window=window)
    assert_same_bits(function, inputs_of(case, torch.bfloat16, device), wants_grad=INPUTS)


def test_tiles_change_nothing_but_rounding(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, spans = inputs_of(RAGGED, torch.float32, device), segments_of(RAGGED, "limits", device)
    reference = plain_attention(spans_of(RAGGED, "limits", device))
    exact = reference(**{name: x.double() for name, x in inputs.items()})
    for block_m, block_n in ((16, 16), (32, 16), (64, 64)):
        config = configs.Config(block_m=block_m, block_n=block_n, num_warps=4, num_stages=1)
        monkeypatch.setattr(kernels, "choose", lambda *_, config=config, **__: config)
        o, _, _ = kernels.forward(*inputs.values(), spans)
        assert_close_as_torch(o, reference(**inputs), exact, f"output with tiles of {block_m} by {block_n}")


@small_tiles
def test_only_the_wanted_gradients_are_made(device: torch.device) -> None:
    case = Case((3, 20), (5, 20))
    inputs, spans = inputs_of(case, torch.bfloat16, device), spans_of(case, "full", device)
    for wanted in (("q_TNH",), ("k_UKH",), ("v_UKH",)):
        assert_kernel_close(partial(ak.attention_varlen, **spans), plain_attention(spans), inputs, wants_grad=wanted)


@small_tiles
def test_slices_of_a_fused_projection_and_gradients_of_any_stride_are_taken(device: torch.device) -> None:
    case = Case((3, 20), (3, 20), group=2, num_kv_heads=1)
    spans = spans_of(case, "causal", device)
    fused = torch.randn(23, 4, 32, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    in_place = fused[:, :2], fused[:, 2:3], fused[:, 3:]
    copied = tuple(x.contiguous() for x in in_place)
    transposed = tuple(x.transpose(0, 2).contiguous().transpose(0, 2) for x in in_place)
    gradients = []
    for q, k, v in (in_place, copied, transposed):
        out = ak.attention_varlen(q, k, v, **spans)
        gradients.append(torch.autograd.grad(out.sum(), fused, retain_graph=True)[0])  # with strides 0, 0, 0
    assert gradients[0].abs().sum() > 0
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])


@small_tiles
@rotary_or_not
def test_operators_pass_torchs_own_checks(turned: tuple[str, ...], device: torch.device) -> None:
    case = Case((3, 6), (5, 6), head_dim=16)  # small: each of these checks runs its operator many times
    q, k, v = inputs_of(case, torch.bfloat16 if turned else torch.float32, device).values()
    cu_q, cu_k = (boundaries_of(lengths, device) for lengths in (case.q_lengths, case.k_lengths))
    spans = (cu_q, cu_k, None, 6, 6, True, 0.2, 3 if turned else None)
    of_q, of_k = angles_of(case, device).values() if turned else ((None, None), (None, None))
    for keeps in (True, False):
        torch.library.opcheck(attention_forward, (q, k, v, *of_q, *spans, keeps))
    o, lse, _ = attention_forward(q, k, v, *of_q, *spans, True)
    for wants_q, wants_kv in ((True, True), (False, True), (True, False)):
        arguments = (q, k, v, o, o, lse, *of_q, *of_k, *spans, wants_q, wants_kv)
        torch.library.opcheck(attention_backward, arguments)


@pytest.mark.parametrize("backend", ("triton", "reference"))
@pytest.mark.parametrize("window", (None, 3))
@rotary_or_not
def test_no_rows_give_no_rows_and_stay_in_the_graph(
    backend: Backend, window: int | None, turned: tuple[str, ...], device: torch.device
) -> None:
    cu, none = torch.zeros(1, dtype=torch.int32, device=device), torch.zeros(0, 16, device=device)
    inputs = tuple(torch.zeros(0, 2, 32, device=device, requires_grad=True) for _ in "qkv")
    spans = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 0, "max_seqlen_k": 0, "causal": True}
    angles = dict.fromkeys(turned, (none, none))
    out = ak.attention_varlen(*inputs, **spans, **angles, window=window, backend=backend)
    assert out.shape == (0, 2, 32)
    out.sum().backward()
    for x in inputs:
        assert x.grad is not None and x.grad.shape == x.shape, "the graph must reach q, k and v even without rows"


def test_a_query_that_sees_no_key_gets_zeros(device: torch.device) -> None:
    # The public function refuses this if it can read the boundaries. On a GPU the kernels must handle it.
    case = Case((20, 5), (4, 5))
    q, k, v = inputs_of(case, torch.float32, device).values()
    spans = segments_of(case, "causal", device)
    do = torch.randn(q.shape, generator=torch.Generator().manual_seed(0)).to(device)
    o, lse, _ = kernels.forward(q, k, v, spans)
    delta = kernels.delta(o, do)
    dq, (dk, dv) = kernels.dq(q, k, v, do, lse, delta, spans), kernels.dkv(q, k, v, do, lse, delta, spans)
    assert not o[:16].any() and not dq[:16].any()
    assert bool((o[16:] != 0).all()) and all(bool(x.isfinite().all()) for x in (o, lse, dq, dk, dv))


@pytest.mark.parametrize("boundaries", ([-9, 12, 99], [0, 99, 3], [5, 5, 2**31 - 1], [7, -(2**31), 25]))
def test_wrong_boundaries_and_limits_read_nothing_outside_the_tensors(
    boundaries: list[int], device: torch.device
) -> None:
    case = Case((12, 13), (12, 13))
    fences = [torch.full((3, *x.shape), torch.nan).to(device) for x in inputs_of(case, torch.float32, device).values()]
    for fence, x in zip(fences, inputs_of(case, torch.float32, device).values(), strict=True):
        fence[1] = x
    q, k, v = (fence[1] for fence in fences)
    cu = torch.tensor(boundaries, dtype=torch.int32, device=device)
    high, low = (torch.full((25,), limit, dtype=torch.int32, device=device) for limit in (2**31 - 1, -(2**31)))
    for limits, window in ((None, None), (high, None), (high, 5), (low, 5), (None, 5)):
        spans = Segments(cu, cu, limits, 13, 13, limits is None and window is not None, 1.0, window)
        o, lse, _ = kernels.forward(q, k, v, spans)
        o, lse = (x.nan_to_num() for x in (o, lse))  # rows of no segment are not written
        delta = kernels.delta(o, q)
        for x in (kernels.dq(q, k, v, q, lse, delta, spans), *kernels.dkv(q, k, v, q, lse, delta, spans)):
            written = x.isfinite().flatten(1).all(1)
            assert bool((written | x.isnan().flatten(1).all(1)).all()), "a row is written completely or not at all"


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_without_rows_the_inputs_keep_their_gradients(backend: Backend, device: torch.device) -> None:
    """Under ZeRO-3 a parameter outside the graph would keep its old gradient."""
    cu = torch.zeros(1, dtype=torch.int32, device=device)
    inputs = [torch.zeros(0, 2, 32, device=device, requires_grad=True) for _ in INPUTS]
    spans = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 0, "max_seqlen_k": 0, "causal": True}
    ak.attention_varlen(*inputs, **spans, window=3, backend=backend).sum().backward()
    assert all(x.grad is not None and x.grad.shape == (0, 2, 32) for x in inputs)


CASE = Case((3, 2), (3, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens_q": torch.tensor([0, 3, 5])}, "expected int32 boundaries"),
        ({"cu_seqlens_q": torch.tensor([0, 3, 3, 5]).int()}, "cu_seqlens_q is empty at segment 1"),
        ({"cu_seqlens_q": torch.tensor([0, 3, 6]).int()}, "cu_seqlens_q ends at 6"),
        ({"cu_seqlens_k": torch.tensor([0, 8, 7]).int()}, "cu_seqlens_k decreases"),
        ({"cu_seqlens_k": torch.tensor([0, 1, 3, 7]).int()}, "cu_seqlens_k has shape"),
        ({"cu_seqlens_k": torch.tensor([0, 2, 7]).int(), "causal": True}, "segment 0 has 3 queries and 2 keys"),
        ({"k_limits_T": torch.ones(5).int(), "causal": True}, "exclude each other"),
        ({"k_limits_T": torch.ones(4).int()}, "k_limits_T has shape"),
        ({"k_limits_T": torch.ones(5)}, "k_limits_T is torch.float32"),
        ({"k_limits_T": torch.tensor([1, 2, 0, 1, 1]).int()}, r"k_limits_T\[2\] is 0"),
        ({"k_limits_T": torch.tensor([1, 2, 3, 1, 5]).int()}, r"k_limits_T\[4\] is 5"),
        (dict.fromkeys(("k_UKH", "v_UKH"), torch.ones(7, 3, 32)), "2 query heads are not a multiple of 3"),
        ({"window": 0, "causal": True}, "window is 0; expected at least 1"),
        ({"window": 2}, "window=2 counts back .* set one of the two, or window=None"),
        ({"scale": 0.0}, "scale is 0.0"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"backend": "fast"}, "backend is 'fast'"),
        ({"backend": "flash"}, "takes bfloat16 and float16"),
        ({"backend": "flash", "k_limits_T": torch.ones(5).int()}, "has no k_limits_T"),
    ],
)
def test_wrong_arguments_are_named(change: dict, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARC_KERNELS_CHECK", "1")
    inputs, spans = inputs_of(CASE, torch.float32, torch.device("cpu")), spans_of(CASE, "full", torch.device("cpu"))
    assert_refused(lambda: ak.attention_varlen(**{**inputs, **spans, **change}), message)


def test_a_head_that_fits_no_tile_is_refused_with_the_way_out(device: torch.device) -> None:
    case = CASE._replace(head_dim=264)
    inputs, spans = inputs_of(case, torch.float32, device), spans_of(case, "full", device)
    refusal = r"head size of q_TNH is 264.*arc_kernels\.use\('reference'\)"
    assert_refused(lambda: ak.attention_varlen(**inputs, **spans), refusal, choices=("triton",))
    with ak.use("reference"):
        assert ak.attention_varlen(**inputs, **spans).shape == (5, 2, 264)
    nothing = {name: x[..., :0] for name, x in inputs.items()}
    assert_refused(lambda: ak.attention_varlen(**nothing, **spans), "head size of q_TNH is 0", choices=("triton",))


def test_the_backend_overrides_the_choice_in_force(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = []
    launch = kernels.forward
    monkeypatch.setattr(kernels, "forward", lambda *args, **options: launches.append(1) or launch(*args, **options))
    inputs, spans = inputs_of(CASE, torch.float32, device), spans_of(CASE, "full", device)
    ak.attention_varlen(**inputs, **spans, backend="reference")
    assert not launches
    with ak.use("reference"):
        ak.attention_varlen(**inputs, **spans)
        assert not launches
        ak.attention_varlen(**inputs, **spans, backend="triton")
    assert launches


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch's varlen FlashAttention needs a GPU")
@pytest.mark.parametrize(("mode", "window"), [("full", None), ("causal", None), ("causal", 9)])
def test_flash_attends_as_we_do(mode: str, window: int | None, device: torch.device) -> None:
    case = RAGGED._replace(head_dim=64)
    inputs, spans = inputs_of(case, torch.bfloat16, device), spans_of(case, mode, device) | {"window": window}
    if not flash_serves(inputs["q_TNH"], None):
        pytest.skip(f"torch {torch.__version__} has no varlen_attn that our backend takes")
    flash = partial(ak.attention_varlen, **spans, backend="flash")
    assert_kernel_close(flash, plain_attention(spans), inputs, wants_grad=INPUTS)


def test_every_config_is_one_that_triton_takes() -> None:
    heads = (8, 64, 65, 128, configs.MAX_HEAD_DIM)
    for chip, kernel, head_dim, dtype, length in product(
        configs.CHIPS, ("forward", "dq", "dkv"), heads, DTYPES, (1, 17, 5000)
    ):
        config = configs.choose(kernel, chip=chip, head_dim=head_dim, dtype=dtype, num_rows=length, num_keys=length)
        for block in (config.block_m, config.block_n):
            assert block >= 16 and block & (block - 1) == 0, config


def test_specs_of_the_offline_compiler_name_every_argument_once() -> None:
    for chip in configs.CHIPS:
        specs = kernels.compile_specs(chip)
        assert len({spec.name for spec in specs}) == len(specs) > 20
        for spec in specs:
            assert sorted([*spec.signature, *spec.constexprs]) == sorted(spec.fn.arg_names), spec.name
            assert set(spec.divisible_by_16) <= set(spec.signature), spec.name


def _limits_from_the_start(case: Case) -> Tensor:
    """Limits of a causal mask that is aligned to the start: int32 [T]."""
    pairs = zip(case.q_lengths, case.k_lengths, strict=True)
    return torch.tensor([min(i + 1, n) for m, n in pairs for i in range(m)], dtype=torch.int32)
