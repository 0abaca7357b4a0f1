"""Launchers of the attention kernels: allocate outputs and compute grids. Imports triton. See `tiles` for tiling."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from arc_kernels._compile import LAUNCH_OPTIONS
from arc_kernels.attention.backward import delta_kernel, dkv_kernel, dq_kernel
from arc_kernels.attention.configs import DELTA_BLOCK, Kernel, block_h, chip_of, choose
from arc_kernels.attention.forward import forward_kernel
from arc_kernels.attention.segments import Rotation, Segments
from arc_kernels.attention.specs import compile_specs

LOG2_E = math.log2(math.e)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    *,
    angles: Rotation | None = None,
    keeps_turned: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run attention: (output [T, N, H] in the dtype of q, base-2 log-sum-exp of the scaled scores as fp32 [T, N],
    rotated queries [T, N, H] if requested, else empty).

    q: queries [T, N, H]; heads contiguous, any row stride.
    k: keys [U, K, H], already rotated; heads contiguous, any row stride.
    v: values [U, K, H]; heads contiguous, any row stride.
    angles: rotate the queries by these angles first, which are contiguous.
    """
    grid, arguments = _launch("forward", q, k, v, segments, angles)
    keeps_turned = keeps_turned and angles is not None
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    q_turned = torch.empty(q.shape if keeps_turned else 0, dtype=q.dtype, device=q.device)
    if grid[0]:
        with torch.cuda.device_of(q):
            forward_kernel[grid](
                q,
                k,
                v,
                o,
                lse,
                q_turned=q_turned if keeps_turned else None,
                KEEPS_TURNED=keeps_turned,
                **arguments,
            )
    return o, lse, q_turned


def delta(o: Tensor, do: Tensor) -> Tensor:
    """Sum of o * do over each head: fp32 [T, N]. o and do are contiguous."""
    sums = torch.empty(o.shape[:2], dtype=torch.float32, device=o.device)
    head_dim = o.shape[2]
    if sums.numel():
        grid = (triton.cdiv(sums.numel(), DELTA_BLOCK),)
        with torch.cuda.device_of(o):
            delta_kernel[grid](
                o,
                do,
                sums,
                sums.numel(),
                H=head_dim,
                BLOCK_H=block_h(head_dim),
                BLOCK_M=DELTA_BLOCK,
                num_warps=4,
                **LAUNCH_OPTIONS,
            )
    return sums


def dq(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    lse: Tensor,
    sums: Tensor,
    segments: Segments,
    *,
    angles: Rotation | None = None,
) -> Tensor:
    """Gradient of q, contiguous.

    do is contiguous, sums come from `delta` and lse from `forward`. q and k are already rotated. The gradient is
    rotated back by `angles`, which are those of the queries.
    """
    grid, arguments = _launch("dq", q, k, v, segments, angles)
    gradient = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if grid[0]:
        with torch.cuda.device_of(q):
            dq_kernel[grid](q, k, v, do, lse, sums, gradient, softmax_scale=segments.scale, **arguments)
    return gradient


def dkv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    lse: Tensor,
    sums: Tensor,
    segments: Segments,
    *,
    angles: Rotation | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of k and v, contiguous. Arguments as in `dq`, but with the keys' angles."""
    grid, arguments = _launch("dkv", q, k, v, segments, angles)
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if grid[0]:
        with torch.cuda.device_of(q):
            dkv_kernel[grid](q, k, v, do, lse, sums, dk, dv, softmax_scale=segments.scale, **arguments)
    return dk, dv


def _launch(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, segments: Segments, angles: Rotation | None
) -> tuple[tuple[int, int], dict[str, Any]]:
    """The grid of the forward, dq or dkv kernel, and its arguments besides inputs and outputs.

    The grid is flat tiles of all segments (see `tiles`) by kv heads. It has no tiles if there is nothing to write.
    """
    num_segments, group = segments.cu_seqlens_q.numel() - 1, q.shape[1] // k.shape[1]
    config = choose(
        kernel,
        chip=chip_of(q.device),
        head_dim=q.shape[2],
        dtype=q.dtype,
        num_rows=segments.max_seqlen_q * group,
        num_keys=segments.max_seqlen_k,
    )
    num_rows, block = (k.shape[0], config.block_n) if kernel == "dkv" else (q.shape[0] * group, config.block_m)
    num_tiles = num_rows // block + num_segments if num_rows and num_segments else 0
    limited = segments.k_limits_T is not None
    arguments = {
        "cu_q": segments.cu_seqlens_q,
        "cu_k": segments.cu_seqlens_k,
        "k_limits": segments.k_limits_T if limited else segments.cu_seqlens_q,  # not read without limits
        "cos": None if angles is None else angles[0],
        "sin": None if angles is None else angles[1],
        "stride_q": q.stride(0),
        "stride_k": k.stride(0),
        "stride_v": v.stride(0),
        "num_q_rows": q.shape[0],
        "num_k_rows": k.shape[0],
        "num_segments": num_segments,
        "window": segments.window,
        "scale": segments.scale * LOG2_E,
        "N": q.shape[1],
        "GROUP": group,
        "H": q.shape[2],
        "BLOCK_H": block_h(q.shape[2]),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "CAUSAL": segments.causal,
        "LIMITED": limited,
        "TURNS": angles is not None,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        **LAUNCH_OPTIONS,
    }
    return (num_tiles, k.shape[1]), arguments


__all__ = ["compile_specs", "delta", "dkv", "dq", "forward"]
