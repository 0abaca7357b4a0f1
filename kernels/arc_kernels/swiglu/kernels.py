# mypy: allow-untyped-defs
"""Triton kernels of SwiGLU: y = silu(g) u, and both gradients in one pass.

With s = sigmoid(g): dg = dy u s (1 + g (1 - s)), du = dy g s. Backward recomputes s; reading it would cost more. The
gradients do not overwrite g and u, although the layer does not read these again: autograd may run a graph twice, and a
caller may hold the projections.

Shape letters: T rows, F width. A program has one row and BF of its columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from arc_kernels._compile import LAUNCH_OPTIONS, CompileSpec, arguments_of
from arc_kernels._dispatch import warp_size
from arc_kernels._interpreter import narrow


def choose(width: int, *, warp_size: int = 32) -> tuple[int, int]:
    """(columns, warps) of a program.

    A thread has eight elements: one 16-byte load per stream in 16-bit types. 1024 columns divide the usual widths
    (8192, 14336, 11264); 11008 wastes 2%. Small programs use all threads of a multiprocessor.
    """
    block_width = min(1024, triton.next_power_of_2(width))
    return block_width, max(1, block_width // (8 * warp_size))


@triton.jit
def swiglu_forward_kernel(p_gate, p_up, p_y, gate_stride, up_stride, F: tl.constexpr, BF: tl.constexpr):
    """silu(gate) * up for some columns of one row."""
    i_t = tl.program_id(0).to(tl.int64)
    o_f = tl.program_id(1) * BF + tl.arange(0, BF)
    m_f = o_f < F
    b_gate = tl.load(p_gate + i_t * gate_stride + o_f, mask=m_f, other=0.0).to(tl.float32)  # [BF]
    b_up = tl.load(p_up + i_t * up_stride + o_f, mask=m_f, other=0.0).to(tl.float32)
    b_y = b_gate * tl.sigmoid(b_gate) * b_up
    tl.store(p_y + i_t * F + o_f, narrow(b_y, p_y.dtype.element_ty), mask=m_f)


@triton.jit
def swiglu_backward_kernel(
    p_gate,
    p_up,
    p_dy,
    p_dgate,
    p_dup,
    gate_stride,
    up_stride,
    dy_stride,
    F: tl.constexpr,
    BF: tl.constexpr,
):
    """Both gradients for some columns of one row. Recomputes the sigmoid."""
    i_t = tl.program_id(0).to(tl.int64)
    o_f = tl.program_id(1) * BF + tl.arange(0, BF)
    m_f = o_f < F
    b_gate = tl.load(p_gate + i_t * gate_stride + o_f, mask=m_f, other=0.0).to(tl.float32)  # [BF]
    b_up = tl.load(p_up + i_t * up_stride + o_f, mask=m_f, other=0.0).to(tl.float32)
    b_dy = tl.load(p_dy + i_t * dy_stride + o_f, mask=m_f, other=0.0).to(tl.float32)
    b_sigmoid = tl.sigmoid(b_gate)
    b_silu = b_gate * b_sigmoid
    b_dgate = b_dy * b_up * (b_sigmoid + b_silu * (1.0 - b_sigmoid))
    tl.store(p_dgate + i_t * F + o_f, narrow(b_dgate, p_dgate.dtype.element_ty), mask=m_f)
    tl.store(p_dup + i_t * F + o_f, narrow(b_dy * b_silu, p_dup.dtype.element_ty), mask=m_f)


def swiglu_forward(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """silu(gate) * up [T, F]. The last strides are 1; row strides are arbitrary."""
    y_TF = gate_TF.new_empty(gate_TF.shape)
    if y_TF.numel() == 0:
        return y_TF
    num_rows, width = gate_TF.shape
    block_width, num_warps = choose(width, warp_size=warp_size())
    with torch.cuda.device_of(gate_TF):
        swiglu_forward_kernel[(num_rows, triton.cdiv(width, block_width))](
            gate_TF,
            up_TF,
            y_TF,
            gate_TF.stride(0),
            up_TF.stride(0),
            F=width,
            BF=block_width,
            num_warps=num_warps,
            **LAUNCH_OPTIONS,
        )
    return y_TF


def swiglu_backward(dy_TF: Tensor, gate_TF: Tensor, up_TF: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up [T, F]. The last strides are 1; row strides are arbitrary."""
    dgate_TF, dup_TF = gate_TF.new_empty(gate_TF.shape), up_TF.new_empty(up_TF.shape)
    if dgate_TF.numel() == 0:
        return dgate_TF, dup_TF
    num_rows, width = gate_TF.shape
    block_width, num_warps = choose(width, warp_size=warp_size())
    with torch.cuda.device_of(gate_TF):
        swiglu_backward_kernel[(num_rows, triton.cdiv(width, block_width))](
            gate_TF,
            up_TF,
            dy_TF,
            dgate_TF,
            dup_TF,
            gate_TF.stride(0),
            up_TF.stride(0),
            dy_TF.stride(0),
            F=width,
            BF=block_width,
            num_warps=num_warps,
            **LAUNCH_OPTIONS,
        )
    return dgate_TF, dup_TF


def compile_specs() -> list[CompileSpec]:
    """Both kernels at the feed-forward widths of the paper's models."""
    return [
        _spec(fn, width, dtype)
        for width, dtype in ((8192, "bf16"), (11008, "bf16"), (14336, "bf16"), (8192, "fp32"))
        for fn in (swiglu_forward_kernel, swiglu_backward_kernel)
    ]


def _spec(fn, width: int, dtype: str) -> CompileSpec:
    block_width, num_warps = choose(width)
    _, hip_num_warps = choose(width, warp_size=64)
    constexprs = {"F": width, "BF": block_width}
    return CompileSpec(
        name=f"{fn.__name__.removesuffix('_kernel')} {dtype} F={width}",
        fn=fn,
        **arguments_of(fn, dtype, constexprs),
        num_warps=num_warps,
        hip_num_warps=hip_num_warps,
    )
