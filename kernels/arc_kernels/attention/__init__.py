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
from arc_kernels.attention.segments import Rotation, Segments
from arc_kernels.rotary import rotary, rotary_reference


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
    window: int | None = None,
    scale: float | None = None,
    rotary_q: Rotation | None = None,
    rotary_k: Rotation | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Attention of every query row over the keys of its own segment: [T, N, H] in the dtype of q.

    q_TNH: queries [T, N, H].
    k_UKH: keys [U, K, H]; N is a multiple of K (grouped-query attention: head n reads kv head n // (N / K)).
    v_UKH: values [U, K, H].
    cu_seqlens_q: segment boundaries among the rows of q, int32 [S + 1]; every segment has at least one query.
    cu_seqlens_k: segment boundaries among the rows of k, int32 [S + 1]; every segment has at least one key.
    max_seqlen_q: number of queries of the longest segment, known on the host.
    max_seqlen_k: number of keys of the longest segment, known on the host.
    causal: query i of a segment of m queries and n keys sees keys 0 … n - m + i (aligned to the end).
    k_limits_T: number of keys of its segment that each query sees, int32 [T], at least 1; instead of `causal`.
    window: a query sees only the last `window` of the keys that `causal` or `k_limits_T` allow, its own key included;
        needs one of the two. The same as `sliding_window` in transformers. None: no window.
    scale: positive; default 1 / sqrt(H).
    rotary_q: (cos, sin) of each query's angles, [T, H / 2] each. Equivalent to `rotary` before, with less memory
        traffic. None: do not rotate.
    rotary_k: the same for keys, [U, H / 2] each.
    backend: None follows `use_attention` and `arc_kernels.use`; "triton" and "reference" override them. "flash" is
        PyTorch's varlen FlashAttention (bfloat16 and float16 on a CUDA GPU, without k_limits_T; its backward may not be
        reproducible bit by bit).

    Raises ValueError if arguments are inconsistent or the backend cannot handle them. Limits and boundaries on a GPU
    are not read (see `arc_kernels`). The kernels then return 0 for a query that sees no key.
    """
    if scale is None:
        scale = 1.0 / math.sqrt(max(q_TNH.shape[-1], 1))
    segments = Segments(cu_seqlens_q, cu_seqlens_k, k_limits_T, max_seqlen_q, max_seqlen_k, causal, scale, window)
    _check_tensors(q_TNH, k_UKH, v_UKH, segments)
    _check_sight(segments)
    if window is not None and window >= max_seqlen_k:  # it hides no key
        segments = segments._replace(window=None)
    if not 0.0 < scale < math.inf:
        raise ValueError(f"scale is {scale}; expected a positive number")
    if backend is None:
        backend = chosen_backend(q_TNH, segments)
    elif backend == "triton":
        demand_triton(q_TNH)
    rotations = {"rotary_q": rotary_q, "rotary_k": rotary_k}
    _check_rotations(rotations, q_TNH, k_UKH, has_gradient=backend == "reference")
    if backend != "triton":
        turn = rotary_reference if backend == "reference" else rotary
        q_TNH = q_TNH if rotary_q is None else turn(q_TNH, *rotary_q)
        k_UKH = k_UKH if rotary_k is None else turn(k_UKH, *rotary_k)
        rotations = {}
    return _implementation(backend)(q_TNH, k_UKH, v_UKH, segments, **rotations)


def _implementation(backend: Backend) -> Callable[..., Tensor]:
    """The function of a backend. All take the arguments of `attention_varlen_reference`."""
    if backend == "reference":
        return attention_varlen_reference
    if backend == "flash":
        from arc_kernels.attention.flash import attention_varlen_flash

        return attention_varlen_flash
    if backend == "triton":
        from arc_kernels.attention.autograd import attention_varlen_triton

        return attention_varlen_triton
    raise ValueError(f"backend is {backend!r}; expected None or one of {', '.join(BACKENDS)}")


def _check_tensors(q_TNH: Tensor, k_UKH: Tensor, v_UKH: Tensor, segments: Segments) -> None:
    cu_seqlens_q, cu_seqlens_k, k_limits_T, *_ = segments
    num_rows, num_heads, head_dim = q_TNH.shape if q_TNH.dim() == 3 else (None, None, None)
    check_shape("q_TNH", q_TNH, (num_rows, num_heads, head_dim))
    check_shape("k_UKH", k_UKH, (None, None, head_dim))
    check_shape("v_UKH", v_UKH, tuple(k_UKH.shape))
    if not 0 < k_UKH.shape[1] <= q_TNH.shape[1] or q_TNH.shape[1] % k_UKH.shape[1]:
        raise ValueError(f"{q_TNH.shape[1]} query heads are not a multiple of {k_UKH.shape[1]} kv heads")
    check_same_dtype(q_TNH=q_TNH, k_UKH=k_UKH, v_UKH=v_UKH)
    check_boundaries("cu_seqlens_q", cu_seqlens_q, total=num_rows)
    check_boundaries("cu_seqlens_k", cu_seqlens_k, total=k_UKH.shape[0])
    check_shape("cu_seqlens_k", cu_seqlens_k, tuple(cu_seqlens_q.shape))
    if k_limits_T is not None:
        check_shape("k_limits_T", k_limits_T, (num_rows,))
        if k_limits_T.dtype != torch.int32:
            raise ValueError(f"k_limits_T is {k_limits_T.dtype}; expected int32")
    boundaries = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    check_same_device(q_TNH=q_TNH, k_UKH=k_UKH, v_UKH=v_UKH, **boundaries, k_limits_T=k_limits_T)


def _check_rotations(
    rotations: Mapping[str, Rotation | None], q_TNH: Tensor, k_UKH: Tensor, *, has_gradient: bool
) -> None:
    for (name, angles), x in zip(rotations.items(), (q_TNH, k_UKH), strict=True):
        if angles is not None:
            if len(angles) != 2:
                raise ValueError(f"{name} has {len(angles)} elements; expected (cos, sin)")
            check_angles({f"{name}[0]": angles[0], f"{name}[1]": angles[1]}, x, has_gradient=has_gradient)


def _check_sight(segments: Segments) -> None:
    """Check that every query sees a key, if values can be read."""
    cu_seqlens_q, cu_seqlens_k, k_limits_T, _, _, causal, _, window = segments
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; expected at least 1, or None for no window")
    if window is not None and not causal and k_limits_T is None:
        raise ValueError(
            f"window={window} counts back from a query's last visible key, but without causal=True or k_limits_T a "
            "query sees all keys; set one of the two, or window=None"
        )
    if causal and k_limits_T is not None:
        raise ValueError("causal=True and k_limits_T exclude each other: the limits already define the visible keys")
    if not values_are_readable(cu_seqlens_q):
        return
    queries_S, keys_S = cu_seqlens_q.diff(), cu_seqlens_k.diff()
    if causal and bool((keys_S < queries_S).any()):
        i = int((keys_S < queries_S).nonzero()[0])
        raise ValueError(
            f"segment {i} has {int(queries_S[i])} queries and {int(keys_S[i])} keys. With causal=True, aligned to the "
            "end, its first queries would see no key; provide at least as many keys as queries"
        )
    if k_limits_T is not None:
        wrong_T = (k_limits_T < 1) | (k_limits_T > torch.repeat_interleave(keys_S, queries_S))
        if bool(wrong_T.any()):
            i = int(wrong_T.nonzero()[0])
            raise ValueError(f"k_limits_T[{i}] is {int(k_limits_T[i])}; expected 1 to the number of the segment's keys")


__all__ = ["BACKENDS", "Backend", "attention_varlen", "attention_varlen_reference", "use_attention"]
