# mypy: allow-untyped-defs
"""Forward kernel of varlen attention: online softmax, one program per query tile and kv head. See `tiles`."""

from __future__ import annotations

import triton
import triton.language as tl

from arc_kernels._interpreter import dot, narrow
from arc_kernels.attention.rotation import joined, load_turned, store_halves
from arc_kernels.attention.tiles import bounds, limits, load_tile, sees, segment_of, store_tile, unpack, window_bounds


@triton.jit
def _attend(
    b_acc,
    b_max,
    b_sum,
    b_q,
    b_limit,
    k,
    v,
    stride_k,
    stride_v,
    begin,
    end,
    num_keys,
    window,
    scale,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    TURNS: tl.constexpr,
):
    """Online softmax over keys begin … end: running sums of values [BM, BH], maxima [BM] and sums [BM]."""
    o_n = tl.arange(0, BLOCK_N)
    for start in range(begin, end, BLOCK_N):
        m_n = start + o_n < num_keys
        at = tl.cast(start, tl.int64)
        b_k = load_tile(k + at * stride_k, o_n * stride_k, m_n, H, BLOCK_H, MASKED, TURNS)  # [BN, BH]
        b_s = dot(b_q, tl.trans(b_k))  # [BM, BN]
        if MASKED:
            b_s = tl.where(sees((start + o_n)[None, :], b_limit[:, None], window), b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale)
        b_shift = b_new
        if MASKED:  # a row without any key so far would compute inf - inf
            b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_p = tl.exp2(b_s * scale - b_shift[:, None])
        b_decay = tl.exp2(b_max - b_shift)
        b_v = load_tile(v + at * stride_v, o_n * stride_v, m_n, H, BLOCK_H, MASKED, False)  # [BN, BH]
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        b_acc = dot(narrow(b_p, b_v.dtype), b_v, b_acc * b_decay[:, None])
        b_max = b_new
    return b_acc, b_max, b_sum


@triton.jit(do_not_specialize=["num_q_rows", "num_k_rows", "num_segments", "window"])
def forward_kernel(
    q,
    k,
    v,
    o,
    lse,
    cu_q,
    cu_k,
    k_limits,
    cos,
    sin,
    q_turned,
    stride_q,
    stride_k,
    stride_v,
    num_q_rows,
    num_k_rows,
    num_segments,
    window,
    scale,
    N: tl.constexpr,
    GROUP: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    LIMITED: tl.constexpr,
    TURNS: tl.constexpr,
    KEEPS_TURNED: tl.constexpr,
):
    """o [T, N, H] and lse [T, N]; one program per query tile and kv head.

    window: None or the number of keys up to its limit that a query sees.
    scale: softmax scale times log2(e), positive.
    TURNS: rotate the queries by the angles cos, sin [T, H / 2] first.
    KEEPS_TURNED: also write the rotated queries to q_turned.
    """
    # Start with the last tile: under a causal mask, later tiles of a segment see the most keys.
    i_tile = tl.num_programs(0) - 1 - tl.program_id(0)
    i_head = tl.program_id(1)
    i_segment, start = segment_of(cu_q, i_tile, num_segments, BLOCK_M, GROUP)
    q_start, num_queries = bounds(cu_q, i_segment, num_q_rows)
    k_start, num_keys = bounds(cu_k, i_segment, num_k_rows)
    if (start >= 0) & (start < num_queries * GROUP):
        first, o_query, o_head = unpack(start.to(tl.int32), BLOCK_M, GROUP)
        m_m = first + o_query < num_queries
        q_row = q_start + first
        o_head += i_head * GROUP
        o_out = (o_query * N + o_head) * H
        o_q = o_query * stride_q + o_head * H
        if TURNS:
            at = q_row * (H // 2)
            b_first, b_second = load_turned(q + q_row * stride_q, o_q, m_m, cos + at, sin + at, o_query, H, BLOCK_H)
            if KEEPS_TURNED:
                store_halves(q_turned + q_row * N * H, o_out, m_m, b_first, b_second, H, BLOCK_H)
            b_q = joined(narrow(b_first, q.dtype.element_ty), narrow(b_second, q.dtype.element_ty))  # [BM, BH]
        else:
            b_q = load_tile(q + q_row * stride_q, o_q, m_m, H, BLOCK_H, True, False)  # [BM, BH]
        # Rows past the segment get the limit of its last query, so they do not change the key range of the tile.
        o_within = tl.minimum(first + o_query, num_queries - 1)
        b_limit = limits(k_limits + q_start, o_within, num_queries, num_keys, CAUSAL, LIMITED)  # [BM]
        seen_by_all = tl.maximum(tl.min(b_limit, 0), 0) // BLOCK_N * BLOCK_N
        seen_by_any = tl.max(b_limit, 0)

        k += k_start * stride_k + i_head * H
        v += k_start * stride_v + i_head * H
        b_acc = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
        b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        b_sum = tl.zeros([BLOCK_M], tl.float32)
        begun = 0
        if window is not None:
            begin, begun = window_bounds(b_limit, window, BLOCK_N)
            seen_by_all = tl.maximum(seen_by_all, begun)
            b_acc, b_max, b_sum = _attend(
                b_acc, b_max, b_sum, b_q, b_limit, k, v, stride_k, stride_v, begin, begun, num_keys, window, scale,
                H, BLOCK_H, BLOCK_N, True, TURNS,
            )  # fmt: skip
        b_acc, b_max, b_sum = _attend(
            b_acc, b_max, b_sum, b_q, b_limit, k, v, stride_k, stride_v, begun, seen_by_all, num_keys, window, scale,
            H, BLOCK_H, BLOCK_N, False, TURNS,
        )  # fmt: skip
        b_acc, b_max, b_sum = _attend(
            b_acc, b_max, b_sum, b_q, b_limit, k, v, stride_k, stride_v, seen_by_all, seen_by_any, num_keys, window,
            scale, H, BLOCK_H, BLOCK_N, True, TURNS,
        )  # fmt: skip
        blind = b_sum == 0.0
        b_sum = tl.where(blind, 1.0, b_sum)
        b_lse = tl.where(blind, 0.0, b_max + tl.log2(b_sum))
        store_tile(o + q_row * N * H, o_out, m_m, b_acc / b_sum[:, None], H, BLOCK_H)
        tl.store(lse + q_row * N + o_query * N + o_head, b_lse, mask=m_m)
