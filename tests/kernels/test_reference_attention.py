"""attention_varlen in plain torch against a loop over segments, heads and queries in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import arc_kernels as ak
import arc_kernels.attention.reference as reference

HEAD_DIM = 4
# Worst measured error against the loop, both in float64, outputs and gradients: 4e-15 (values of order one).
EXACT = 2e-14
LENGTHS = [([3, 1, 5], [4, 2, 5]), ([7], [7]), ([1, 1], [6, 1]), ([2, 30, 1, 1, 1], [3, 31, 1, 2, 1])]


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 8])
@pytest.mark.parametrize("repeat", [1, 3, 4, 8])
def test_head_n_reads_kv_head_n_over_repeat(kv_heads: int, repeat: int) -> None:
    _compare([3, 1, 5], [4, 2, 5], num_heads=kv_heads * repeat, kv_heads=kv_heads)


@pytest.mark.parametrize(("q_lengths", "k_lengths"), LENGTHS)
def test_every_query_sees_all_keys_of_its_own_segment(q_lengths: list[int], k_lengths: list[int]) -> None:
    _compare(q_lengths, k_lengths)


@pytest.mark.parametrize(("q_lengths", "k_lengths"), LENGTHS)
def test_causal_is_aligned_to_the_end_of_the_keys(q_lengths: list[int], k_lengths: list[int]) -> None:
    _compare(q_lengths, k_lengths, causal=True)


@pytest.mark.parametrize(("q_lengths", "k_lengths"), LENGTHS)
def test_limits_say_how_many_keys_a_query_sees(q_lengths: list[int], k_lengths: list[int]) -> None:
    limits = [
        1 + (3 * i + s + 2) % n for s, (m, n) in enumerate(zip(q_lengths, k_lengths, strict=True)) for i in range(m)
    ]
    _compare(q_lengths, k_lengths, limits=limits)


def test_a_scale_that_is_given_replaces_the_default() -> None:
    _compare([3, 2], [3, 4], scale=0.9)


def test_one_long_and_many_short_segments_take_the_dense_path(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    dense = reference._attend_dense
    monkeypatch.setattr(reference, "_attend_dense", lambda *args: calls.append(1) or dense(*args))
    _compare(*LENGTHS[0])
    assert not calls, "nearly equal segments are padded"
    _compare(*LENGTHS[3])
    assert calls


def test_no_rows_give_no_rows_and_stay_in_the_graph() -> None:
    cu = torch.zeros(1, dtype=torch.int32)
    inputs = tuple(torch.zeros(0, 2, HEAD_DIM, requires_grad=True) for _ in "qkv")
    out = ak.attention_varlen(*inputs, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=0, max_seqlen_k=0, causal=True)
    assert out.shape == (0, 2, HEAD_DIM)
    out.sum().backward()
    assert all(x.grad is not None for x in inputs), "the graph must reach q, k and v even without rows"


def test_keys_of_another_segment_have_no_influence() -> None:
    q, k, v = _random([2, 3], [4, 5], 2, 2)
    cu_q, cu_k = _cu([2, 3]), _cu([4, 5])
    sizes = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": 3, "max_seqlen_k": 5}
    before = ak.attention_varlen(q, k, v, **sizes)
    changed = v.detach().clone()
    changed[4:] += 1.0
    after = ak.attention_varlen(q, k, changed, **sizes)
    assert torch.equal(before[:2], after[:2])
    assert (before[2:] - after[2:]).abs().min() > 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens_q": torch.tensor([0, 3])}, "int32"),
        ({"cu_seqlens_k": torch.tensor([0, 1, 3], dtype=torch.int32)}, "cu_seqlens_k"),
        ({"causal": True, "k_limits_T": torch.ones(3, dtype=torch.int32)}, "exclude"),
        ({"k_limits_T": torch.ones(2, dtype=torch.int32)}, "k_limits_T"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    q, k, v = _random([3], [3], 2, 2)
    sizes = {"cu_seqlens_q": _cu([3]), "cu_seqlens_k": _cu([3]), "max_seqlen_q": 3, "max_seqlen_k": 3}
    with pytest.raises(ValueError, match=message):
        ak.attention_varlen(q, k, v, **{**sizes, **change})


def test_heads_that_do_not_divide_are_refused() -> None:
    q, k, v = _random([3], [3], 4, 3)
    sizes = {"cu_seqlens_q": _cu([3]), "cu_seqlens_k": _cu([3]), "max_seqlen_q": 3, "max_seqlen_k": 3}
    with pytest.raises(ValueError, match="4 query heads are not a multiple of 3"):
        ak.attention_varlen(q, k, v, **sizes)


def _compare(
    q_lengths: list[int],
    k_lengths: list[int],
    *,
    num_heads: int = 4,
    kv_heads: int = 2,
    causal: bool = False,
    limits: list[int] | None = None,
    scale: float | None = None,
) -> None:
    """Check that outputs and gradients of q, k and v equal those of the loop."""
    inputs = _random(q_lengths, k_lengths, num_heads, kv_heads)
    ours = ak.attention_varlen(
        *inputs,
        cu_seqlens_q=_cu(q_lengths),
        cu_seqlens_k=_cu(k_lengths),
        max_seqlen_q=max(q_lengths),
        max_seqlen_k=max(k_lengths),
        causal=causal,
        k_limits_T=None if limits is None else torch.tensor(limits, dtype=torch.int32),
        scale=scale,
    )
    if limits is None:
        limits = [n - m + i + 1 if causal else n for m, n in zip(q_lengths, k_lengths, strict=True) for i in range(m)]
    looped = _loop(*inputs, q_lengths, k_lengths, limits, scale or HEAD_DIM**-0.5)
    towards = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.allclose(ours, looped, rtol=0, atol=EXACT)
    for got, wanted in zip(_gradients(ours, towards, inputs), _gradients(looped, towards, inputs), strict=True):
        assert wanted.abs().max() > 0
        assert torch.allclose(got, wanted, rtol=0, atol=EXACT)


def _loop(
    q: Tensor, k: Tensor, v: Tensor, q_lengths: list[int], k_lengths: list[int], limits: list[int], scale: float
) -> Tensor:
    rows, q_row, k_start = [], 0, 0
    repeat = q.shape[1] // k.shape[1]
    for num_queries, num_keys in zip(q_lengths, k_lengths, strict=True):
        for _ in range(num_queries):
            seen = slice(k_start, k_start + limits[q_row])
            heads = []
            for n in range(q.shape[1]):
                probs = torch.softmax(k[seen, n // repeat] @ q[q_row, n] * scale, dim=0)
                heads.append(probs @ v[seen, n // repeat])
            rows.append(torch.stack(heads))
            q_row += 1
        k_start += num_keys
    return torch.stack(rows)


def _random(q_lengths: list[int], k_lengths: list[int], num_heads: int, kv_heads: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(q_lengths), num_heads), (sum(k_lengths), kv_heads), (sum(k_lengths), kv_heads)]
    return tuple(
        torch.randn(*shape, HEAD_DIM, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes
    )


def _gradients(out: Tensor, towards: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return torch.autograd.grad((out * towards).sum(), inputs)


def _cu(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()
