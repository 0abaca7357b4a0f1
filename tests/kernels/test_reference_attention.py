"""attention_varlen in plain torch against a loop over segments, heads and queries in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import arc_kernels as ak
import arc_kernels.attention.reference as reference
from tests.kernels.attention_cases import MODES, Case, inputs_of, spans_of
from tests.kernels.bounds import assert_exact

CPU = torch.device("cpu")
# Worst measured error against the loop, both in float64, outputs and gradients: 4e-15 (values of order one).
EXACT = 2e-14
CASES = [
    Case(q_lengths, k_lengths, num_kv_heads=2, head_dim=4)
    for q_lengths, k_lengths in (
        ((3, 1, 5), (4, 2, 5)),
        ((7,), (7,)),
        ((1, 1), (6, 1)),
        ((2, 30, 1, 1, 1), (3, 31, 1, 2, 1)),
    )
]


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 8])
@pytest.mark.parametrize("repeat", [1, 3, 4, 8])
def test_head_n_reads_kv_head_n_over_repeat(kv_heads: int, repeat: int) -> None:
    _compare(CASES[0]._replace(group=repeat, num_kv_heads=kv_heads))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_a_query_sees_all_keys_of_its_segment_or_those_up_to_its_diagonal_or_limit(case: Case, mode: str) -> None:
    _compare(case, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_long_inputs_are_computed_in_blocks_of_queries(monkeypatch, case: Case, mode: str) -> None:
    masks = []
    sdpa = reference.F.scaled_dot_product_attention

    def spy(*args: Tensor, attn_mask: Tensor, **kwargs: float) -> Tensor:
        masks.append(attn_mask.numel())
        return sdpa(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(reference.F, "scaled_dot_product_attention", spy)
    _compare(case, mode)
    (single,) = masks
    masks.clear()
    monkeypatch.setattr(reference, "_MAX_BLOCK_SCORES", 1)
    _compare(case, mode)
    assert sum(masks) == single and (len(masks) > 1 or max(case.q_lengths) == 1)


@pytest.mark.parametrize("window", [2, 5, 29, 31, 1000])
@pytest.mark.parametrize("mode", ("causal", "limits"))
@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=["padded", "dense"])
def test_a_window_hides_all_but_the_last_keys_up_to_the_limit(case: Case, mode: str, window: int) -> None:
    _compare(case, mode, window=window)
    if window < 5:
        with pytest.raises(AssertionError):
            _compare(case, mode, window=window, oracle_window=window + 1)


def test_a_window_of_one_gives_the_value_of_the_last_visible_key() -> None:
    inputs, spans = inputs_of(CASES[0], torch.float64, CPU), spans_of(CASES[0], "causal", CPU)
    ours = ak.attention_varlen(**inputs, **spans, window=1)
    rows = [1, 2, 3, 5, 6, 7, 8, 9, 10]  # segments of 3, 1 and 5 queries at the ends of 4, 2 and 5 keys
    assert torch.allclose(ours, inputs["v_UKH"][rows].repeat_interleave(2, dim=1), rtol=0, atol=EXACT)


def test_a_window_is_the_sliding_window_of_transformers() -> None:
    masking = pytest.importorskip("transformers.masking_utils")
    length, keys = 9, torch.arange(9)
    spans = spans_of(Case((length,), (length,)), "causal", CPU)
    for window in (1, 3, 9, 20):
        sees = masking.sliding_window_causal_mask_function(window)(0, 0, keys[:, None], keys[None, :])
        q, v = torch.zeros(length, 1, length), torch.eye(length)[:, None]
        ours = ak.attention_varlen(q, q, v, **spans, window=window)[:, 0]  # zero scores: equal shares of visible keys
        assert torch.equal(ours > 0, sees)


def test_a_scale_that_is_given_replaces_the_default() -> None:
    _compare(CASES[0], scale=0.9)


def test_one_long_and_many_short_segments_take_the_dense_path(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    dense = reference._attend_dense
    monkeypatch.setattr(reference, "_attend_dense", lambda *args: calls.append(1) or dense(*args))
    _compare(CASES[0])
    assert not calls, "nearly equal segments are padded"
    _compare(CASES[3])
    assert calls


def _compare(
    case: Case,
    mode: str = "full",
    *,
    scale: float | None = None,
    window: int | None = None,
    oracle_window: int | None = None,
) -> None:
    """Check that outputs and gradients of q, k and v equal those of the loop.

    oracle_window: window of the loop; None: that of the call.
    """
    inputs = [x.requires_grad_() for x in inputs_of(case, torch.float64, CPU).values()]
    spans = spans_of(case, mode, CPU)
    ours = ak.attention_varlen(*inputs, **spans, scale=scale, window=window)
    pairs = zip(case.q_lengths, case.k_lengths, strict=True)
    limits = [n - m + i + 1 if mode == "causal" else n for m, n in pairs for i in range(m)]
    if mode == "limits":
        limits = spans["k_limits_T"].tolist()
    window = oracle_window or window or max(case.k_lengths)
    assert_exact(ours, _loop(*inputs, case, limits, window, scale or case.head_dim**-0.5), inputs, atol=EXACT)


def _loop(q: Tensor, k: Tensor, v: Tensor, case: Case, limits: list[int], window: int, scale: float) -> Tensor:
    rows, q_row, k_start = [], 0, 0
    for num_queries, num_keys in zip(case.q_lengths, case.k_lengths, strict=True):
        for _ in range(num_queries):
            seen = slice(k_start + max(limits[q_row] - window, 0), k_start + limits[q_row])
            heads = []
            for n in range(q.shape[1]):
                probs = torch.softmax(k[seen, n // case.group] @ q[q_row, n] * scale, dim=0)
                heads.append(probs @ v[seen, n // case.group])
            rows.append(torch.stack(heads))
            q_row += 1
        k_start += num_keys
    return torch.stack(rows)
