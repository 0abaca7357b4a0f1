# mypy: allow-untyped-defs
"""Triton kernel of the rotary embedding, which rotates the pairs (i, i + H / 2) of a head by the angles of the row.

The gradient is the transposed rotation: the same kernel with negated sines, even if cos² + sin² is not 1. Neither works
in place, because this would not save any memory traffic. In forward, other code may hold the projection's output. In
backward, autograd may pass the same gradient tensor to other consumers.

Shape letters: T rows, N heads, H head size, F = H / 2 pairs. A program has one row, BN of its heads and BF >= F pairs.
"""

from __future__ import annotations

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from arc_kernels._compile import LAUNCH_OPTIONS, CompileSpec, arguments_of
from arc_kernels._dispatch import warp_size
from arc_kernels._interpreter import narrow


def choose(num_heads: int, num_pairs: int, *, warp_size: int = 32) -> tuple[int, int]:
    """(heads, warps) of a program.

    It has about 1024 pairs, eight per thread. If possible, its heads divide num_heads (24: by 8).

    Other numbers of heads are padded, at most to a multiple of 8.
    """
    block_pairs = triton.next_power_of_2(num_pairs)
    most = max(1, 1024 // block_pairs)
    block_heads = max(gcd(num_heads, most), min(triton.next_power_of_2(num_heads), 8, most))
    return block_heads, max(1, block_heads * block_pairs // (8 * warp_size))


@triton.jit
def rotary_kernel(
    p_x,
    p_cos,
    p_sin,
    p_y,
    x_row_stride,
    x_head_stride,
    N: tl.constexpr,
    F: tl.constexpr,
    BN: tl.constexpr,
    BF: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """Rotate the pairs in some heads of one row by the row's angles, or back."""
    i_t = tl.program_id(0).to(tl.int64)
    o_n = tl.program_id(1) * BN + tl.arange(0, BN)[:, None]
    o_f = tl.broadcast_to(tl.arange(0, BF)[None, :], (BN, BF))
    m_nf = (o_n < N) & (o_f < F)
    # Read the angles once per head, from L1. A thread has one head, so a single read would need an exchange through
    # shared memory.
    b_cos = tl.load(p_cos + i_t * F + o_f, mask=m_nf, other=0.0).to(tl.float32)  # [BN, BF]
    b_sin = tl.load(p_sin + i_t * F + o_f, mask=m_nf, other=0.0).to(tl.float32)
    if INVERSE:
        b_sin = -b_sin
    p_first = p_x + i_t * x_row_stride + o_n.to(tl.int64) * x_head_stride + o_f
    b_first = tl.load(p_first, mask=m_nf, other=0.0).to(tl.float32)  # [BN, BF]
    b_second = tl.load(p_first + F, mask=m_nf, other=0.0).to(tl.float32)
    p_out = p_y + (i_t * N + o_n) * (2 * F) + o_f
    tl.store(p_out, narrow(b_first * b_cos - b_second * b_sin, p_y.dtype.element_ty), mask=m_nf)
    tl.store(p_out + F, narrow(b_second * b_cos + b_first * b_sin, p_y.dtype.element_ty), mask=m_nf)


def rotate(x_TNH: Tensor, cos_TF: Tensor, sin_TF: Tensor, *, inverse: bool) -> Tensor:
    """Rotate each pair by the angle of its row, or back if `inverse`: [T, N, H].

    x_TNH: last stride 1, any row and head strides.
    cos_TF: contiguous.
    sin_TF: contiguous.
    """
    y_TNH = x_TNH.new_empty(x_TNH.shape)
    if y_TNH.numel() == 0:
        return y_TNH
    num_rows, num_heads, head_dim = x_TNH.shape
    num_pairs = head_dim // 2
    block_heads, num_warps = choose(num_heads, num_pairs, warp_size=warp_size())
    with torch.cuda.device_of(x_TNH):
        rotary_kernel[(num_rows, triton.cdiv(num_heads, block_heads))](
            x_TNH,
            cos_TF,
            sin_TF,
            y_TNH,
            x_TNH.stride(0),
            x_TNH.stride(1),
            N=num_heads,
            F=num_pairs,
            BN=block_heads,
            BF=triton.next_power_of_2(num_pairs),
            INVERSE=inverse,
            num_warps=num_warps,
            **LAUNCH_OPTIONS,
        )
    return y_TNH


def compile_specs() -> list[CompileSpec]:
    """Heads of the paper's models (24 and 32 query heads, 8 kv heads) and all head sizes, in both directions."""
    shapes = [(24, 128, "bf16"), (32, 128, "bf16"), (8, 128, "bf16"), (32, 80, "bf16"), (9, 64, "bf16")]
    shapes += [(24, 128, "fp32")]
    return [_spec(*shape, inverse=inverse) for shape in shapes for inverse in (False, True)]


def _spec(num_heads: int, head_dim: int, dtype: str, *, inverse: bool) -> CompileSpec:
    num_pairs = head_dim // 2
    block_heads, num_warps = choose(num_heads, num_pairs)
    _, hip_num_warps = choose(num_heads, num_pairs, warp_size=64)
    constexprs = {"N": num_heads, "F": num_pairs, "BN": block_heads, "INVERSE": inverse}
    constexprs["BF"] = triton.next_power_of_2(num_pairs)
    return CompileSpec(
        name=f"rotary{'_inverse' if inverse else ''} {dtype} N={num_heads} H={head_dim}",
        fn=rotary_kernel,
        **arguments_of(rotary_kernel, dtype, constexprs, types={"p_cos": "*fp32", "p_sin": "*fp32"}),
        num_warps=num_warps,
        hip_num_warps=hip_num_warps,
    )
