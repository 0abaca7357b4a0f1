# mypy: allow-untyped-defs
"""Triton kernels of the norms: RMSNorm and the parameter-free LayerNorm, of rows or of the sum of two rows.

A program holds whole rows, so each tensor is read once and written once. With r = 1 / sqrt(mean(x^2) + eps), n = x r
and g = w dy, the gradient of a row is dx = r (g - n mean(g n)), plus the gradient of the sum if there is a residual.
LayerNorm also subtracts the mean of g. Backward needs the row itself and r (for LayerNorm also the mean), but not the
normalised row.

Shape letters: T rows, D width, P programs; in the kernels BT rows and BD >= D columns of one tile.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from arc_kernels._compile import LAUNCH_OPTIONS, CompileSpec, arguments_of
from arc_kernels._dispatch import num_processors, warp_size
from arc_kernels._interpreter import narrow
from arc_kernels._limits import MAX_NORM_WIDTH

# Up to this width, the main kernel sums the weight's gradient in registers. Wider rows leave no room for it.
MAX_FUSED_WIDTH = 8192


@dataclass(frozen=True, kw_only=True)
class Config:
    """The distribution of rows over programs."""

    block_rows: int
    num_warps: int
    partial_sums: int
    """Programs per multiprocessor that share the rows if the weight's gradient is summed."""


def choose(width: int, *, warp_size: int = 32) -> Config:
    """Tiles of at least 2048 elements, 16 elements per thread: two 16-byte loads in flight per stream in bfloat16.

    With more elements per thread, backward exceeds the registers (x, dy, w and the weight's gradient are float32). With
    fewer, too few loads are in flight to hide memory latency. Summing the weight's gradient takes about 100 registers
    per thread, so 16 warps fill a multiprocessor. More programs would only produce more partial sums.
    """
    block_width = triton.next_power_of_2(width)
    block_rows = max(1, 2048 // block_width)
    num_warps = block_rows * block_width // (16 * warp_size)
    return Config(block_rows=block_rows, num_warps=num_warps, partial_sums=max(1, 512 // (num_warps * warp_size)))


@triton.jit(do_not_specialize=["num_rows"])
def norm_forward_kernel(
    p_x,
    p_residual,
    p_weight,
    p_normed,
    p_total,
    p_mean,
    p_rstd,
    num_rows,
    x_stride,
    residual_stride,
    eps,
    D: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    ADDS: tl.constexpr,
    LAYER_NORM: tl.constexpr,
):
    """One tile of whole rows: sum with the residual if there is one, norm, and statistics for backward."""
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    o_d = tl.arange(0, BD)[None, :]
    m_t = o_t < num_rows
    m_td = m_t[:, None] & (o_d < D)
    o_td = o_t[:, None] * D + o_d
    b_x = tl.load(p_x + o_t[:, None] * x_stride + o_d, mask=m_td, other=0.0)  # [BT, BD]
    if ADDS:
        b_residual = tl.load(p_residual + o_t[:, None] * residual_stride + o_d, mask=m_td, other=0.0)
        # Round before the norm, because backward reads the rounded sum.
        b_x = narrow(b_x.to(tl.float32) + b_residual.to(tl.float32), p_total.dtype.element_ty)
        tl.store(p_total + o_td, b_x, mask=m_td)
    b_x = b_x.to(tl.float32)
    if LAYER_NORM:
        b_mean = tl.sum(b_x, axis=1) / D
        tl.store(p_mean + o_t, b_mean, mask=m_t)
        b_x = tl.where(o_d < D, b_x - b_mean[:, None], 0.0)
    b_rstd = tl.rsqrt(tl.sum(b_x * b_x, axis=1) / D + eps)
    tl.store(p_rstd + o_t, b_rstd, mask=m_t)
    b_normed = b_x * b_rstd[:, None]
    if not LAYER_NORM:
        b_normed *= tl.load(p_weight + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    tl.store(p_normed + o_td, narrow(b_normed, p_normed.dtype.element_ty), mask=m_td)


@triton.jit(do_not_specialize=["num_rows"])
def norm_backward_kernel(
    p_x,
    p_weight,
    p_mean,
    p_rstd,
    p_dnormed,
    p_dtotal,
    p_dx,
    p_dweight,
    num_rows,
    x_stride,
    dnormed_stride,
    dtotal_stride,
    D: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    ADDS: tl.constexpr,
    LAYER_NORM: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
):
    """Gradients of the row tiles of this program, and its partial sum of the weight's gradient."""
    i_p = tl.program_id(0)
    o_d = tl.arange(0, BD)[None, :]
    m_d = o_d < D
    if not LAYER_NORM:
        b_weight = tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)  # [1, BD]
    if WEIGHT_GRAD:
        b_dweight = tl.zeros((BT, BD), dtype=tl.float32)
    for i_t in range(i_p, tl.cdiv(num_rows, BT), tl.num_programs(0)):
        o_t = tl.cast(i_t, tl.int64) * BT + tl.arange(0, BT)
        m_t = o_t < num_rows
        m_td = m_t[:, None] & m_d
        b_x = tl.load(p_x + o_t[:, None] * x_stride + o_d, mask=m_td, other=0.0).to(tl.float32)
        b_dy = tl.load(p_dnormed + o_t[:, None] * dnormed_stride + o_d, mask=m_td, other=0.0).to(tl.float32)
        b_rstd = tl.load(p_rstd + o_t, mask=m_t, other=0.0)[:, None]
        if LAYER_NORM:
            b_x -= tl.load(p_mean + o_t, mask=m_t, other=0.0)[:, None]
            b_g = b_dy - tl.sum(b_dy, axis=1, keep_dims=True) / D
        else:
            b_g = b_dy * b_weight
        b_n = b_x * b_rstd
        b_projection = tl.sum(tl.where(m_d, b_g * b_n, 0.0), axis=1, keep_dims=True) / D
        b_dx = (b_g - b_n * b_projection) * b_rstd
        if ADDS:
            b_dx += tl.load(p_dtotal + o_t[:, None] * dtotal_stride + o_d, mask=m_td, other=0.0).to(tl.float32)
        tl.store(p_dx + o_t[:, None] * D + o_d, narrow(b_dx, p_dx.dtype.element_ty), mask=m_td)
        if WEIGHT_GRAD:
            b_dweight += b_dy * b_n
    if WEIGHT_GRAD:
        tl.store(p_dweight + i_p.to(tl.int64) * D + o_d, tl.sum(b_dweight, axis=0, keep_dims=True), mask=m_d)


@triton.jit(do_not_specialize=["num_rows"])
def weight_gradient_kernel(
    p_x,
    p_rstd,
    p_dnormed,
    p_dweight,
    num_rows,
    x_stride,
    dnormed_stride,
    D: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """This program's partial sum of the weight's gradient, for rows that are too wide to sum it in the main kernel."""
    i_p = tl.program_id(0)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)[None, :]
    m_d = o_d < D
    b_dweight = tl.zeros((BT, BD), dtype=tl.float32)
    for i_t in range(i_p, tl.cdiv(num_rows, BT), tl.num_programs(0)):
        o_t = tl.cast(i_t, tl.int64) * BT + tl.arange(0, BT)
        m_t = o_t < num_rows
        m_td = m_t[:, None] & m_d
        b_x = tl.load(p_x + o_t[:, None] * x_stride + o_d, mask=m_td, other=0.0).to(tl.float32)
        b_dy = tl.load(p_dnormed + o_t[:, None] * dnormed_stride + o_d, mask=m_td, other=0.0).to(tl.float32)
        b_rstd = tl.load(p_rstd + o_t, mask=m_t, other=0.0)[:, None]
        b_dweight += b_dy * (b_x * b_rstd)
    tl.store(p_dweight + i_p.to(tl.int64) * D + o_d, tl.sum(b_dweight, axis=0, keep_dims=True), mask=m_d)


def norm_forward(
    x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """RMSNorm of x or x + residual; LayerNorm without parameters if the weight is None. The last stride of x is 1.

    Returns

        normed: [T, D] in the dtype of x.
        total: sum with the residual, [T, D] in the dtype of x; empty without a residual.
        mean: float32 [T]; LayerNorm only, otherwise empty.
        rstd: float32 [T].
    """
    num_rows, width = x_TD.shape
    config = choose(width, warp_size=warp_size())
    normed_TD = x_TD.new_empty(num_rows, width)
    total_TD = x_TD.new_empty(0) if residual_TD is None else x_TD.new_empty(num_rows, width)
    mean_T = x_TD.new_empty(num_rows if weight_D is None else 0, dtype=torch.float32)
    rstd_T = x_TD.new_empty(num_rows, dtype=torch.float32)
    if normed_TD.numel() == 0:
        return normed_TD, total_TD, mean_T, rstd_T
    with torch.cuda.device_of(x_TD):
        norm_forward_kernel[(triton.cdiv(num_rows, config.block_rows),)](
            x_TD,
            residual_TD,
            weight_D,
            normed_TD,
            total_TD if residual_TD is not None else None,
            mean_T if weight_D is None else None,
            rstd_T,
            num_rows,
            x_TD.stride(0),
            residual_TD.stride(0) if residual_TD is not None else 0,
            eps,
            D=width,
            BT=config.block_rows,
            BD=triton.next_power_of_2(width),
            ADDS=residual_TD is not None,
            LAYER_NORM=weight_D is None,
            num_warps=config.num_warps,
            **LAUNCH_OPTIONS,
        )
    return normed_TD, total_TD, mean_T, rstd_T


def norm_backward(
    dnormed_TD: Tensor,
    dtotal_TD: Tensor | None,
    x_TD: Tensor,
    weight_D: Tensor | None,
    mean_T: Tensor,
    rstd_T: Tensor,
    *,
    wants_weight: bool,
) -> tuple[Tensor, Tensor]:
    """(gradient of x [T, D], gradient of the weight [D] in its dtype, or empty if not requested).

    x: the normalised input; with a residual, the sum. Last strides are 1.

    Results are bit-identical in every run: a fixed number of programs sum their rows in order, and torch adds the
    partial sums.
    """
    num_rows, width = x_TD.shape
    config = choose(width, warp_size=warp_size())
    dx_TD = x_TD.new_empty(num_rows, width)
    if dx_TD.numel() == 0:
        return dx_TD, weight_D.new_zeros(width) if wants_weight and weight_D is not None else x_TD.new_empty(0)
    num_blocks = triton.cdiv(num_rows, config.block_rows)
    fuses_weight = wants_weight and width <= MAX_FUSED_WIDTH
    max_programs = config.partial_sums * num_processors(x_TD.device) if fuses_weight else num_blocks
    num_programs = min(num_blocks, max_programs)
    partial_PD = x_TD.new_empty(num_programs, width, dtype=torch.float32) if fuses_weight else None
    with torch.cuda.device_of(x_TD):
        norm_backward_kernel[(num_programs,)](
            x_TD,
            weight_D,
            mean_T if weight_D is None else None,
            rstd_T,
            dnormed_TD,
            dtotal_TD,
            dx_TD,
            partial_PD,
            num_rows,
            x_TD.stride(0),
            dnormed_TD.stride(0),
            dtotal_TD.stride(0) if dtotal_TD is not None else 0,
            D=width,
            BT=config.block_rows,
            BD=triton.next_power_of_2(width),
            ADDS=dtotal_TD is not None,
            LAYER_NORM=weight_D is None,
            WEIGHT_GRAD=fuses_weight,
            num_warps=config.num_warps,
            **LAUNCH_OPTIONS,
        )
    if weight_D is None or not wants_weight:
        return dx_TD, x_TD.new_empty(0)
    if partial_PD is None:
        partial_PD = _weight_partials(dnormed_TD, x_TD, rstd_T)
    return dx_TD, partial_PD.sum(0).to(weight_D.dtype)


def _weight_partials(dnormed_TD: Tensor, x_TD: Tensor, rstd_T: Tensor) -> Tensor:
    """Partial sums [P, D] of the weight's gradient, for rows that are too wide for the main kernel."""
    num_rows, width = x_TD.shape
    block_rows, block_width = 4, 512
    num_programs = min(triton.cdiv(num_rows, block_rows), max(1, num_processors(x_TD.device) // 4))
    partial_PD = x_TD.new_empty(num_programs, width, dtype=torch.float32)
    with torch.cuda.device_of(x_TD):
        weight_gradient_kernel[(num_programs, triton.cdiv(width, block_width))](
            x_TD,
            rstd_T,
            dnormed_TD,
            partial_PD,
            num_rows,
            x_TD.stride(0),
            dnormed_TD.stride(0),
            D=width,
            BT=block_rows,
            BD=block_width,
            num_warps=4,
            **LAUNCH_OPTIONS,
        )
    return partial_PD


def compile_specs() -> list[CompileSpec]:
    """All kernels at the widths of the paper's models in bfloat16, and at the maximum width in both dtypes.

    RMSNorm also at the sizes of heads, whose queries and keys some models normalise.
    """
    shapes = [(2048, "bf16"), (3072, "bf16"), (4096, "bf16"), (4096, "fp32"), (MAX_FUSED_WIDTH, "bf16")]
    shapes += [(MAX_NORM_WIDTH, "bf16"), (MAX_NORM_WIDTH, "fp32")]
    kinds = [(layer_norm, adds) for layer_norm in (False, True) for adds in (False, True)]
    specs = [spec for width, dtype in shapes for spec in _specs(width, dtype, kinds)]
    return specs + [spec for width in (64, 128) for spec in _specs(width, "bf16", [(False, False)])]


def _specs(width: int, dtype: str, kinds: Iterable[tuple[bool, bool]]) -> Iterator[CompileSpec]:
    """kinds: whether each norm is a LayerNorm, and whether it adds a residual."""
    for layer_norm, adds in kinds:
        name = ("add_" if adds else "") + ("layer" if layer_norm else "rms")
        flags = {"ADDS": adds, "LAYER_NORM": layer_norm}
        yield _spec(norm_forward_kernel, f"{name}_norm_forward", width, dtype, flags)
        yield _spec(norm_backward_kernel, f"{name}_norm_backward", width, dtype, flags | {"WEIGHT_GRAD": False})
        if width <= MAX_FUSED_WIDTH and not layer_norm:
            flags["WEIGHT_GRAD"] = True
            yield _spec(norm_backward_kernel, f"{name}_norm_backward_weight", width, dtype, flags)
    if width > MAX_FUSED_WIDTH:
        tile = {"D": width, "BT": 4, "BD": 512}
        name = f"norm_weight_gradient {dtype} D={width}"
        arguments = _arguments(weight_gradient_kernel, dtype, tile)
        yield CompileSpec(name=name, fn=weight_gradient_kernel, **arguments, num_warps=4)


def _spec(fn, name: str, width: int, dtype: str, flags: dict[str, bool]) -> CompileSpec:
    config = choose(width)
    constexprs = {"D": width, "BT": config.block_rows, "BD": triton.next_power_of_2(width), **flags}
    pointers = {
        "ADDS": ("p_residual", "p_total", "p_dtotal"),
        "WEIGHT_GRAD": ("p_dweight",),
        "LAYER_NORM": ("p_mean",),
    }
    absent = {pointer for flag, needed in pointers.items() if not flags.get(flag) for pointer in needed}
    if flags["LAYER_NORM"]:
        absent.add("p_weight")
    return CompileSpec(
        name=f"{name} {dtype} D={width}",
        fn=fn,
        **_arguments(fn, dtype, constexprs | dict.fromkeys(absent & set(fn.arg_names))),
        num_warps=config.num_warps,
        hip_num_warps=choose(width, warp_size=64).num_warps,
    )


def _arguments(fn, dtype: str, constexprs: Mapping[str, int | None]) -> dict[str, Any]:
    """Types and constants. Statistics and partial sums are float32."""
    types = dict.fromkeys(("p_mean", "p_rstd", "p_dweight"), "*fp32") | {"eps": "fp32"}
    return arguments_of(fn, dtype, constexprs, types=types, odd=("num_rows",))
