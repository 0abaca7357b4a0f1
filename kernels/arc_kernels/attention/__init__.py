"""Varlen attention: softmax(q k' * scale) v over packed segments."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from arc_kernels._check import (
    check_angles,
    check_boundaries,
    check_same_device,
    check_same_dtype,
    check_shape,
    values_are_readable,
)
from arc_kernels._dispatch import demand_triton
from arc_kernels.attention.choice import BACKENDS, Backend, chosen_backend, use_attention
from arc_kernels.attention.reference import attention_varlen_reference
from arc_kernels.rotary import rotary, rotary_reference

Rotation = tuple[Tensor, Tensor]


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
    rotary_q: Rotation | None = None,
    rotary_k: Rotation | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Attention of every query row over the keys of its own segment: [T, N, H], the dtype of q.

    q [T, N, H]; k, v [U, K, H] with N a multiple of K (grouped-query attention: head n reads kv head n // (N / K)).
    cu_seqlens_q, cu_seqlens_k: int32 [S + 1], boundaries of the segments among the rows of q and of k; every segment
    has at least one row of each. max_seqlen_*: the longest segment, known on the host.
    causal: query i of a segment of m queries and n keys sees keys 0 … n - m + i (aligned to the end).
    k_limits_T: int32 [T], instead of `causal`: how many keys of its segment each query sees, at least 1.
    scale: positive, default 1 / sqrt(H).
    rotary_q, rotary_k: (cos, sin) of the angles of each query, [T, H / 2], and of each key, [U, H / 2]: as if q and k
    had gone through `rotary` first, at fewer bytes. Either may be None: rows that come turned, or are not to be.
    backend: None follows `use_attention` and `arc_kernels.use`; "triton" and "reference" override them; "flash" is
    PyTorch's varlen FlashAttention (bfloat16 and float16 on a CUDA GPU, without k_limits_T; its backward need not
    repeat bit by bit).
    Raises ValueError on arguments that do not fit, and on a backend that cannot serve them. Where limits or boundaries
    are on a GPU their values are not read (see `arc_kernels`); a query that sees no key then gets 0 from the kernels.
    """
    if scale is None:
        scale = 1.0 / math.sqrt(max(q_TNH.shape[-1], 1))
    _check_tensors(q_TNH, k_UKH, v_UKH, cu_seqlens_q, cu_seqlens_k, k_limits_T)
    _check_sight(cu_seqlens_q, cu_seqlens_k, k_limits_T, causal=causal)
    if not 0.0 < scale < math.inf:
        raise ValueError(f"scale is {scale}; expected a positive number")
    if backend is None:
        backend = chosen_backend(q_TNH, k_limits_T, causal=causal, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k)
    elif backend == "triton":
        demand_triton(q_TNH)
    rotations = {"rotary_q": rotary_q, "rotary_k": rotary_k}
    _check_rotations(rotations, q_TNH, k_UKH, has_gradient=backend == "reference")
    if backend != "triton":
        turn = rotary_reference if backend == "reference" else rotary
        q_TNH = q_TNH if rotary_q is None else turn(q_TNH, *rotary_q)
        k_UKH = k_UKH if rotary_k is None else turn(k_UKH, *rotary_k)
        rotations = {}
    return _implementation(backend, q_TNH)(
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
        **rotations,
    )


def _implementation(backend: Backend, q_TNH: Tensor) -> Callable[..., Tensor]:
    """The function behind a backend; all take the arguments of `attention_varlen_reference`."""
    if backend == "reference":
        return attention_varlen_reference
    if backend == "flash":
        from arc_kernels.attention.flash import attention_varlen_flash

        return attention_varlen_flash
    if backend == "triton":
        from arc_kernels.attention.autograd import attention_varlen_triton

        return attention_varlen_triton
    raise ValueError(f"backend is {backend!r}; expected None or one of {', '.join(BACKENDS)}")


def _check_tensors(
    q_TNH: Tensor,
    k_UKH: Tensor,
    v_UKH: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    k_limits_T: Tensor | None,
) -> None:
    num_rows, num_heads, head_dim = q_TNH.shape if q_TNH.dim() == 3 else (None, None, None)
    check_shape("q_TNH", q_TNH, (num_rows, num_heads, head_dim))
    check_shape("k_UKH", k_UKH, (None, None, head_dim))
    check_shape("v_UKH", v_UKH, tuple(k_UKH.shape))
    if not 0 < k_UKH.shape[1] <= q_TNH.shape[1] or q_TNH.shape[1] % k_UKH.shape[1]:
        raise ValueError(f"{q_TNH.shape[1]} query heads are no multiple of {k_UKH.shape[1]} kv heads")
    check_same_dtype(q_TNH=q_TNH, k_UKH=k_UKH, v_UKH=v_UKH)
    check_boundaries("cu_seqlens_q", cu_seqlens_q, total=num_rows)
    check_boundaries("cu_seqlens_k", cu_seqlens_k, total=k_UKH.shape[0])
    check_shape("cu_seqlens_k", cu_seqlens_k, tuple(cu_seqlens_q.shape))
    if k_limits_T is not None:
        check_shape("k_limits_T", k_limits_T, (num_rows,))
        if k_limits_T.dtype != torch.int32:
            raise ValueError(f"k_limits_T is {k_limits_T.dtype}; expected int32")
    check_same_device(
        q_TNH=q_TNH,
        k_UKH=k_UKH,
        v_UKH=v_UKH,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        k_limits_T=k_limits_T,
    )


def _check_rotations(
    rotations: Mapping[str, Rotation | None], q_TNH: Tensor, k_UKH: Tensor, *, has_gradient: bool
) -> None:
    for (name, angles), x in zip(rotations.items(), (q_TNH, k_UKH), strict=True):
        if angles is not None:
            if len(angles) != 2:
                raise ValueError(f"{name} has {len(angles)} elements; expected (cos, sin)")
            check_angles({f"{name}[0]": angles[0], f"{name}[1]": angles[1]}, x, has_gradient=has_gradient)


def _check_sight(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, k_limits_T: Tensor | None, *, causal: bool) -> None:
    """Every query sees a key: read from the values where `check_boundaries` reads them."""
    if causal and k_limits_T is not None:
        raise ValueError("causal=True and k_limits_T exclude each other: the limits already say what is seen")
    if not values_are_readable(cu_seqlens_q):
        return
    queries_S, keys_S = cu_seqlens_q.diff(), cu_seqlens_k.diff()
    if causal and bool((keys_S < queries_S).any()):
        i = int((keys_S < queries_S).nonzero()[0])
        raise ValueError(
            f"segment {i} has {int(queries_S[i])} queries and {int(keys_S[i])} keys: under causal=True, aligned to the "
            "end, its first queries would see nothing; give at least as many keys as queries"
        )
    if k_limits_T is not None:
        wrong_T = (k_limits_T < 1) | (k_limits_T > torch.repeat_interleave(keys_S, queries_S))
        if bool(wrong_T.any()):
            i = int(wrong_T.nonzero()[0])
            raise ValueError(f"k_limits_T[{i}] is {int(k_limits_T[i])}; expected 1 to the number of the segment's keys")


__all__ = ["BACKENDS", "Backend", "attention_varlen", "attention_varlen_reference", "use_attention"]
