# mypy: allow-untyped-defs
"""Backward kernels of varlen attention: delta, gradient of queries, gradients of keys and values. See `tiles`.

With P = softmax(scale q k'), dP = do v' and delta = rowsum(o do): dS = P (dP - delta), dq = scale dS k,
dk = scale dS' q, dv = P' do. P is recomputed from the saved log-sum-exp, once in the query kernel and once in the key
kernel. Five products would suffice with atomics on dq; seven make every run bit-identical.
"""

from __future__ import annotations

import triton
import triton.language as tl

from arc_kernels._interpreter import dot, narrow
from arc_kernels.attention.rotation import store_turned_back
from arc_kernels.attention.tiles import bounds, limits, load_tile, sees, segment_of, store_tile, unpack, window_bounds

_LIMITS_AT_ONCE = tl.constexpr(1024)


@triton.jit(do_not_specialize=["num_rows"])
def delta_kernel(o, do, delta, num_rows, H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr):
    """delta [rows]: sum of o * do over each row of H values, in fp32."""
    start = tl.program_id(0).to(tl.int64) * BLOCK_M
    o_m = tl.arange(0, BLOCK_M)
    m_m = start + o_m < num_rows
    b_o = load_tile(o + start * H, o_m * H, m_m, H, BLOCK_H, True, False).to(tl.float32)
    b_do = load_tile(do + start * H, o_m * H, m_m, H, BLOCK_H, True, False).to(tl.float32)
    tl.store(delta + start + o_m, tl.sum(b_o * b_do, 1), mask=m_m)


@triton.jit
def _query_gradient(
    b_dq,
    b_q,
    b_do,
    b_lse,
    b_delta,
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
    """Add the contribution of keys begin … end to b_dq [BM, BH], without the factor of the softmax scale."""
    o_n = tl.arange(0, BLOCK_N)
    for start in range(begin, end, BLOCK_N):
        m_n = start + o_n < num_keys
        at = tl.cast(start, tl.int64)
        b_k = load_tile(k + at * stride_k, o_n * stride_k, m_n, H, BLOCK_H, MASKED, TURNS)  # [BN, BH]
        b_v = load_tile(v + at * stride_v, o_n * stride_v, m_n, H, BLOCK_H, MASKED, False)  # [BN, BH]
        b_s = dot(b_q, tl.trans(b_k))  # [BM, BN]
        b_p = tl.exp2(b_s * scale - b_lse[:, None])
        if MASKED:
            b_p = tl.where(sees((start + o_n)[None, :], b_limit[:, None], window), b_p, 0.0)
        b_dp = dot(b_do, tl.trans(b_v))  # [BM, BN]
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dq = dot(narrow(b_ds, b_k.dtype), b_k, b_dq)
    return b_dq


@triton.jit(do_not_specialize=["num_q_rows", "num_k_rows", "num_segments", "window"])
def dq_kernel(
    q,
    k,
    v,
    do,
    lse,
    delta,
    dq,
    cu_q,
    cu_k,
    k_limits,
    cos,
    sin,
    stride_q,
    stride_k,
    stride_v,
    num_q_rows,
    num_k_rows,
    num_segments,
    window,
    scale,
    softmax_scale,
    N: tl.constexpr,
    GROUP: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    LIMITED: tl.constexpr,
    TURNS: tl.constexpr,
):
    """dq [T, N, H]; one program per query tile and kv head.

    do and dq are contiguous. scale is softmax_scale times log2(e). q and k are already rotated. TURNS: dq is rotated
    back by the queries' angles cos, sin [T, H / 2].
    """
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
        b_q = load_tile(q + q_row * stride_q, o_q, m_m, H, BLOCK_H, True, TURNS)  # [BM, BH]
        b_do = load_tile(do + q_row * N * H, o_out, m_m, H, BLOCK_H, True, False)  # [BM, BH]
        b_lse = tl.load(lse + q_row * N + o_query * N + o_head, mask=m_m, other=0.0)
        b_delta = tl.load(delta + q_row * N + o_query * N + o_head, mask=m_m, other=0.0)
        o_within = tl.minimum(first + o_query, num_queries - 1)
        b_limit = limits(k_limits + q_start, o_within, num_queries, num_keys, CAUSAL, LIMITED)
        seen_by_all = tl.maximum(tl.min(b_limit, 0), 0) // BLOCK_N * BLOCK_N
        seen_by_any = tl.max(b_limit, 0)

        k += k_start * stride_k + i_head * H
        v += k_start * stride_v + i_head * H
        b_dq = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
        begun = 0
        if window is not None:
            begin, begun = window_bounds(b_limit, window, BLOCK_N)
            seen_by_all = tl.maximum(seen_by_all, begun)
            b_dq = _query_gradient(
                b_dq, b_q, b_do, b_lse, b_delta, b_limit, k, v, stride_k, stride_v, begin, begun, num_keys, window,
                scale, H, BLOCK_H, BLOCK_N, True, TURNS,
            )  # fmt: skip
        b_dq = _query_gradient(
            b_dq, b_q, b_do, b_lse, b_delta, b_limit, k, v, stride_k, stride_v, begun, seen_by_all, num_keys, window,
            scale, H, BLOCK_H, BLOCK_N, False, TURNS,
        )  # fmt: skip
        b_dq = _query_gradient(
            b_dq, b_q, b_do, b_lse, b_delta, b_limit, k, v, stride_k, stride_v, seen_by_all, seen_by_any, num_keys,
            window, scale, H, BLOCK_H, BLOCK_N, True, TURNS,
        )  # fmt: skip
        dq += q_row * N * H
        if TURNS:
            at = q_row * (H // 2)
            store_turned_back(dq, o_out, m_m, b_dq * softmax_scale, cos + at, sin + at, o_query, H, BLOCK_H)
        else:
            store_tile(dq, o_out, m_m, b_dq * softmax_scale, H, BLOCK_H)


@triton.jit
def _key_gradients(
    b_dk,
    b_dv,
    b_k,
    b_v,
    q,
    do,
    lse,
    delta,
    k_limits,
    stride_q,
    begin,
    end,
    key,
    num_queries,
    num_keys,
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
    MASKED: tl.constexpr,
    TURNS: tl.constexpr,
):
    """Add the contribution of packed rows begin … end to b_dk (without the softmax scale) and b_dv [BN, BH].

    Rows past the segment load q, do, lse and delta as 0 and contribute 0. Keys past the segment need no mask: a key's
    gradient depends on no other key, and their own gradients are not stored.
    """
    o_key = key + tl.arange(0, BLOCK_N)
    for start in range(begin, end, BLOCK_M):
        first, o_query, o_head = unpack(start, BLOCK_M, GROUP)
        m_m = first + o_query < num_queries
        at = tl.cast(first, tl.int64)
        o_stat = o_query * N + o_head
        b_q = load_tile(q + at * stride_q, o_query * stride_q + o_head * H, m_m, H, BLOCK_H, True, TURNS)  # [BM, BH]
        b_lse = tl.load(lse + at * N + o_stat, mask=m_m, other=0.0)
        b_st = dot(b_k, tl.trans(b_q))  # [BN, BM]
        b_pt = tl.exp2(b_st * scale - b_lse[None, :])
        if MASKED:
            b_limit = limits(k_limits, first + o_query, num_queries, num_keys, CAUSAL, LIMITED)
            b_pt = tl.where(sees(o_key[:, None], b_limit[None, :], window), b_pt, 0.0)
        b_do = load_tile(do + at * N * H, o_stat * H, m_m, H, BLOCK_H, True, False)  # [BM, BH]
        b_delta = tl.load(delta + at * N + o_stat, mask=m_m, other=0.0)
        b_dv = dot(narrow(b_pt, b_do.dtype), b_do, b_dv)
        b_dpt = dot(b_v, tl.trans(b_do))  # [BN, BM]
        b_dst = b_pt * (b_dpt - b_delta[None, :])
        b_dk = dot(narrow(b_dst, b_q.dtype), b_q, b_dk)
    return b_dk, b_dv


@triton.jit
def _first_row_that_sees(
    key, k_limits, num_queries, num_keys, BLOCK_M: tl.constexpr, GROUP: tl.constexpr, LIMITED: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """A packed row, a multiple of BLOCK_M. No earlier row sees the given key or a later one."""
    start = num_queries * 0
    if CAUSAL:
        start = tl.minimum(tl.maximum(key - num_keys + num_queries, 0), num_queries) * GROUP // BLOCK_M * BLOCK_M
    if LIMITED:
        # Limits usually grow within a segment. The result does not rely on it, because leading blocks are skipped only
        # after checking each of their limits.
        looking = start < num_queries * GROUP
        while looking:
            first, o_query, _ = unpack(start, BLOCK_M, GROUP)
            b_limit = limits(k_limits, first + o_query, num_queries, num_keys, False, True)
            blind = tl.max(b_limit, 0) <= key
            start = tl.where(blind, start + BLOCK_M, start)
            looking = blind & (start < num_queries * GROUP)
    return start


@triton.jit
def _rows_that_see(
    key, k_limits, window, num_queries, num_keys, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr
):
    """Two packed rows, the first a multiple of BLOCK_M: only rows between them see any of keys key … key + BLOCK_N - 1.

    Reads all limits of the segment, because they need not be in order.
    """
    first = num_queries
    past = num_queries * 0
    for start in range(0, num_queries, _LIMITS_AT_ONCE):
        o_query = start + tl.arange(0, _LIMITS_AT_ONCE)
        b_limit = limits(k_limits, o_query, num_queries, num_keys, False, True)  # 0 past the segment
        m_seen = (b_limit > key) & (b_limit - window < key + BLOCK_N)
        first = tl.minimum(first, tl.min(tl.where(m_seen, o_query, num_queries), 0))
        past = tl.maximum(past, tl.max(tl.where(m_seen, o_query + 1, 0), 0))
    return first * GROUP // BLOCK_M * BLOCK_M, past * GROUP


@triton.jit(do_not_specialize=["num_q_rows", "num_k_rows", "num_segments", "window"])
def dkv_kernel(
    q,
    k,
    v,
    do,
    lse,
    delta,
    dk,
    dv,
    cu_q,
    cu_k,
    k_limits,
    cos,
    sin,
    stride_q,
    stride_k,
    stride_v,
    num_q_rows,
    num_k_rows,
    num_segments,
    window,
    scale,
    softmax_scale,
    N: tl.constexpr,
    GROUP: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    LIMITED: tl.constexpr,
    TURNS: tl.constexpr,
):
    """dk and dv [U, K, H]; one program per key tile and kv head.

    do, dk and dv are contiguous. q and k are already rotated. TURNS: dk is rotated back by the keys' angles cos, sin
    [U, H / 2].
    """
    WINDOWED: tl.constexpr = window is not None
    i_tile = tl.program_id(0)
    i_head = tl.program_id(1)
    i_segment, start = segment_of(cu_k, i_tile, num_segments, BLOCK_N, 1)
    q_start, num_queries = bounds(cu_q, i_segment, num_q_rows)
    k_start, num_keys = bounds(cu_k, i_segment, num_k_rows)
    if (start >= 0) & (start < num_keys):
        key = start.to(tl.int32)
        o_n = tl.arange(0, BLOCK_N)
        m_n = key + o_n < num_keys
        row = k_start + key
        b_k = load_tile(k + row * stride_k + i_head * H, o_n * stride_k, m_n, H, BLOCK_H, True, TURNS)  # [BN, BH]
        b_v = load_tile(v + row * stride_v + i_head * H, o_n * stride_v, m_n, H, BLOCK_H, True, False)  # [BN, BH]

        q += q_start * stride_q + i_head * GROUP * H
        do += q_start * N * H + i_head * GROUP * H
        lse += q_start * N + i_head * GROUP
        delta += q_start * N + i_head * GROUP
        k_limits += q_start
        if LIMITED and WINDOWED:
            begin, end = _rows_that_see(key, k_limits, window, num_queries, num_keys, BLOCK_M, BLOCK_N, GROUP)
        else:
            begin = _first_row_that_sees(key, k_limits, num_queries, num_keys, BLOCK_M, GROUP, LIMITED, CAUSAL)
            end = num_queries * GROUP
        whole = begin  # from here to whole_end every query sees every key of the tile
        if LIMITED:
            whole = end
        if CAUSAL:
            last = tl.minimum(key + BLOCK_N, num_keys) - 1
            if WINDOWED:
                ahead = num_queries - num_keys + window  # query `key + ahead` is the first that no longer sees `key`
                end = tl.minimum(tl.maximum(last + ahead, 0), num_queries) * GROUP
            rows = tl.maximum(last - num_keys + num_queries, 0) * GROUP
            whole = tl.minimum((rows + BLOCK_M - 1) // BLOCK_M * BLOCK_M, end)
        whole_end = end
        if CAUSAL and WINDOWED:
            rows = tl.minimum(tl.maximum(key + ahead, 0), num_queries) * GROUP
            whole_end = tl.maximum(rows // BLOCK_M * BLOCK_M, whole)
        b_dk = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
        b_dv = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
        if CAUSAL or LIMITED:
            b_dk, b_dv = _key_gradients(
                b_dk, b_dv, b_k, b_v, q, do, lse, delta, k_limits, stride_q, begin, whole, key, num_queries, num_keys,
                window, scale, N, GROUP, H, BLOCK_H, BLOCK_M, BLOCK_N, CAUSAL, LIMITED, True, TURNS,
            )  # fmt: skip
        if not LIMITED:
            b_dk, b_dv = _key_gradients(
                b_dk, b_dv, b_k, b_v, q, do, lse, delta, k_limits, stride_q, whole, whole_end, key, num_queries,
                num_keys, window, scale, N, GROUP, H, BLOCK_H, BLOCK_M, BLOCK_N, CAUSAL, LIMITED, False, TURNS,
            )  # fmt: skip
        if CAUSAL and WINDOWED:
            b_dk, b_dv = _key_gradients(
                b_dk, b_dv, b_k, b_v, q, do, lse, delta, k_limits, stride_q, whole_end, end, key, num_queries,
                num_keys, window, scale, N, GROUP, H, BLOCK_H, BLOCK_M, BLOCK_N, CAUSAL, LIMITED, True, TURNS,
            )  # fmt: skip
        num_kv_heads: tl.constexpr = N // GROUP
        o_out = (o_n * num_kv_heads + i_head) * H
        store_tile(dv + row * num_kv_heads * H, o_out, m_n, b_dv, H, BLOCK_H)
        dk += row * num_kv_heads * H
        if TURNS:
            at = row * (H // 2)
            store_turned_back(dk, o_out, m_n, b_dk * softmax_scale, cos + at, sin + at, o_n, H, BLOCK_H)
        else:
            store_tile(dk, o_out, m_n, b_dk * softmax_scale, H, BLOCK_H)
