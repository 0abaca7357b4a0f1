"""Varlen attention in plain torch, without a loop over segments and without a host sync.

Segments are either padded to the longest one and processed as a batch, or processed as one sequence with a dense mask.
The variant with fewer scores is used. Queries are processed in blocks, because a mask is as large as the scores.

Shape letters: T query rows, U key rows, S segments, N heads, K kv heads, H head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from arc_kernels.attention.segments import Segments

# Maximum number of scores of one block of queries. Its mask takes up to 5 bytes for each. Shorter inputs are one block.
_MAX_BLOCK_SCORES = 1 << 26


class _Places(NamedTuple):
    """Segment of each packed row and its index in that segment, int64 [rows] each."""

    segment: Tensor
    place: Tensor


def attention_varlen_reference(q_TNH: Tensor, k_UKH: Tensor, v_UKH: Tensor, segments: Segments) -> Tensor:
    """See `attention_varlen`. Does not check arguments again."""
    cu_seqlens_q, cu_seqlens_k, _, max_seqlen_q, max_seqlen_k, _, scale, window = segments
    num_segments = cu_seqlens_q.numel() - 1
    if q_TNH.shape[0] == 0:
        # Keep q, k and v in the graph: under ZeRO-3 a parameter outside the graph would keep its old gradient.
        return q_TNH + 0.0 * (k_UKH.sum() + v_UKH.sum())
    q_places = _places(cu_seqlens_q, q_TNH.shape[0])
    limits_T = _limits(segments, q_places)
    padded_scores = num_segments * max_seqlen_q * max_seqlen_k
    if num_segments > 1 and padded_scores > q_TNH.shape[0] * k_UKH.shape[0]:
        k_places = _places(cu_seqlens_k, k_UKH.shape[0])
        return _attend_dense(q_TNH, k_UKH, v_UKH, q_places, k_places, limits_T, scale, window)
    q_SQNH = _pad(q_TNH, q_places, num_segments, max_seqlen_q)
    k_places = _places(cu_seqlens_k, k_UKH.shape[0])
    k_SVKH = _pad(k_UKH, k_places, num_segments, max_seqlen_k)
    v_SVKH = _pad(v_UKH, k_places, num_segments, max_seqlen_k)
    limits_SQ = limits_T.new_ones(num_segments, max_seqlen_q)  # padding rows see one key, so no row is empty
    limits_SQ[q_places.segment, q_places.place] = limits_T
    keys_K = torch.arange(max_seqlen_k, device=q_TNH.device)

    def mask_of(rows: slice) -> Tensor:
        return _sees(keys_K, limits_SQ[:, None, rows, None], window)

    o_SQNH = _sdpa(q_SQNH, k_SVKH, v_SVKH, mask_of, scale)
    return o_SQNH[q_places.segment, q_places.place]


def _attend_dense(
    q_TNH: Tensor,
    k_UKH: Tensor,
    v_UKH: Tensor,
    q_places: _Places,
    k_places: _Places,
    limits_T: Tensor,
    scale: float,
    window: int | None,
) -> Tensor:
    def mask_of(rows: slice) -> Tensor:
        same = q_places.segment[rows, None] == k_places.segment[None, :]
        return (same & _sees(k_places.place[None, :], limits_T[rows, None], window))[None, None]

    return _sdpa(q_TNH[None], k_UKH[None], v_UKH[None], mask_of, scale)[0]


def _sees(keys: Tensor, limits: Tensor, window: int | None) -> Tensor:
    """Whether queries with these limits see these keys: bool, broadcast."""
    sees = keys < limits
    return sees if window is None else sees & (keys >= limits - window)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask_of: Callable[[slice], Tensor], scale: float) -> Tensor:
    """[S, Q, N, H] attention. `mask_of` a slice of the queries is a bool mask that broadcasts to [S, N, rows, K]."""
    repeat = q.shape[2] // k.shape[2]
    if repeat > 1:
        k, v = k.repeat_interleave(repeat, dim=2), v.repeat_interleave(repeat, dim=2)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    num_queries = q.shape[2]
    block = max(_MAX_BLOCK_SCORES // (k.shape[0] * k.shape[2]), 1)
    if block >= num_queries:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_of(slice(None)), scale=scale).transpose(1, 2)
    blocks = (slice(start, start + block) for start in range(0, num_queries, block))
    parts = [F.scaled_dot_product_attention(q[:, :, b], k, v, attn_mask=mask_of(b), scale=scale) for b in blocks]
    return torch.cat(parts, dim=2).transpose(1, 2)


def _places(cu_seqlens: Tensor, num_rows: int) -> _Places:
    cu = cu_seqlens.long()
    row = torch.arange(num_rows, device=cu.device)
    segment = torch.repeat_interleave(
        torch.arange(cu.numel() - 1, device=cu.device), cu[1:] - cu[:-1], output_size=num_rows
    )
    return _Places(segment, row - cu[segment])


def _limits(segments: Segments, q_places: _Places) -> Tensor:
    """Number of keys of its segment that each query sees: int64 [T]."""
    if segments.k_limits_T is not None:
        return segments.k_limits_T.long()
    num_keys_T = segments.cu_seqlens_k.diff().long()[q_places.segment]
    if not segments.causal:
        return num_keys_T
    num_queries_S = segments.cu_seqlens_q.diff().long()
    return num_keys_T - num_queries_S[q_places.segment] + q_places.place + 1


def _pad(x: Tensor, places: _Places, num_segments: int, length: int) -> Tensor:
    """Pad [rows, heads, H] to [S, length, heads, H]. Returns a view if no padding is needed."""
    if x.shape[0] == num_segments * length:
        return x.view(num_segments, length, *x.shape[1:])
    return x.new_zeros(num_segments, length, *x.shape[1:]).index_put((places.segment, places.place), x)
