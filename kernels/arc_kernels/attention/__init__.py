"""Varlen attention: softmax(q k' * scale) v over packed segments."""

from __future__ import annotations

from torch import Tensor

from arc_kernels._check import check_boundaries, check_same_device, check_shape
from arc_kernels.attention.reference import attention_varlen_reference


def attention_varlen(
    q_TNH: Tensor,
    k_UKH: Tensor,
    v_UKH: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = False,
    k_limits_T: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of every query row over the keys of its own segment: [T, N, H], the dtype of q.

    q [T, N, H]; k, v [U, K, H] with N a multiple of K (grouped-query attention: head n reads kv head n // (N / K)).
    cu_seqlens_q, cu_seqlens_k: int32 [S + 1], boundaries of the segments among the rows of q and of k; every segment
    has at least one row of each. max_seqlen_*: the longest segment, known on the host.
    causal: query i of a segment of m queries and n keys sees keys 0 … n - m + i (aligned to the end).
    k_limits_T: int32 [T], instead of `causal`: how many keys of its segment each query sees, at least 1.
    scale: default 1 / sqrt(H).
    Raises ValueError on shapes, dtypes or devices that do not fit.
    """
    num_rows, num_heads, head_dim = q_TNH.shape if q_TNH.dim() == 3 else (None, None, None)
    check_shape("q_TNH", q_TNH, (num_rows, num_heads, head_dim))
    check_shape("k_UKH", k_UKH, (None, None, head_dim))
    check_shape("v_UKH", v_UKH, tuple(k_UKH.shape))
    check_boundaries("cu_seqlens_q", cu_seqlens_q)
    check_boundaries("cu_seqlens_k", cu_seqlens_k)
    check_shape("cu_seqlens_k", cu_seqlens_k, tuple(cu_seqlens_q.shape))
    check_same_device(q_TNH=q_TNH, k_UKH=k_UKH, v_UKH=v_UKH, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    if q_TNH.shape[1] % k_UKH.shape[1]:
        raise ValueError(f"{q_TNH.shape[1]} query heads are no multiple of {k_UKH.shape[1]} kv heads")
    if not q_TNH.dtype == k_UKH.dtype == v_UKH.dtype:
        raise ValueError(f"q, k and v differ in dtype: {q_TNH.dtype}, {k_UKH.dtype}, {v_UKH.dtype}")
    if k_limits_T is not None:
        check_shape("k_limits_T", k_limits_T, (num_rows,))
        if causal:
            raise ValueError("causal=True and k_limits_T exclude each other: the limits already say what is seen")
    return attention_varlen_reference(
        q_TNH,
        k_UKH,
        v_UKH,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        causal=causal,
        k_limits_T=k_limits_T,
        scale=scale,
    )


__all__ = ["attention_varlen", "attention_varlen_reference"]
