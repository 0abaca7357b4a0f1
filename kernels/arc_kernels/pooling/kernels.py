"""Launchers of the Triton kernels of group pooling and of the norms of a pooled layer.

Shape letters: T rows, G groups, P programs, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from arc_kernels._compile import LAUNCH_OPTIONS, CompileSpec, arguments_of
from arc_kernels._limits import MAX_POOL_WIDTH
from arc_kernels.pooling.programs import pool_backward_kernel, pool_forward_kernel

WEIGHT_PROGRAMS = 256  # two per processor of an H100; partial sums take 4 MiB at D = 4096; fixed for determinism


STAGES = 2  # tiles in flight


def choose(width: int) -> tuple[int, int]:
    """(rows per tile, warps of 32 threads) of a program, for rows of `width` columns.

    16 columns per thread (8 on AMD, whose warps have 64 threads). Backward then takes at most 128 registers in half
    precision, so two programs of 256 threads fit a processor (four in forward). The rows of a group are read one after
    another, and the next tile is fetched while the current one is reduced. Narrow rows are read in pairs; otherwise a
    program would have too few bytes in flight.
    """
    block = triton.next_power_of_2(width)
    if block <= 1024:
        return 2, 4
    return 1, max(4, block // 512)


def pool_forward(
    x_TD: Tensor,
    group_cu: Tensor,
    *,
    kind: str,
    norm: str,
    weight_D: Tensor | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(pooled rows [G, D], their norms [G, D], norm of every row [T, D]), in the dtype of x.

    norm: "none" (the last two outputs are empty), "rms" (needs the weight) or "layer".

    x and weight are contiguous. Rows are at most MAX_POOL_WIDTH wide.
    """
    (num_rows, width), num_groups = x_TD.shape, group_cu.numel() - 1
    block_rows, num_warps = choose(width)
    pooled_GD = x_TD.new_empty(num_groups, width)
    normed_pooled_GD = torch.empty_like(pooled_GD if norm != "none" else pooled_GD[:0])
    normed_TD = torch.empty_like(x_TD if norm != "none" else x_TD[:0])
    if pooled_GD.numel() > 0:
        with torch.cuda.device_of(x_TD):
            pool_forward_kernel[(num_groups,)](
                x_TD,
                group_cu,
                x_TD if weight_D is None else weight_D,
                pooled_GD,
                normed_pooled_GD,
                normed_TD,
                num_rows,
                width,
                eps,
                KIND=kind,
                NORM=norm,
                BLOCK_R=block_rows,
                BLOCK_D=triton.next_power_of_2(width),
                STAGES=STAGES,
                num_warps=num_warps,
                **LAUNCH_OPTIONS,
            )
    return pooled_GD, normed_pooled_GD, normed_TD


def pool_backward(
    dpooled_GD: Tensor,
    group_cu: Tensor,
    *,
    dnormed_pooled_GD: Tensor | None = None,
    dnormed_TD: Tensor | None = None,
    num_rows: int,
    x_TD: Tensor | None,
    pooled_GD: Tensor | None = None,
    kind: str,
    norm: str,
    weight_D: Tensor | None = None,
    eps: float = 0.0,
    wants_weight: bool = False,
) -> tuple[Tensor, Tensor]:
    """(gradient of x [T, D], gradient of the weight [D] in its dtype, or empty if not requested).

    dpooled, dnormed_pooled, dnormed: gradients of the outputs of `pool_forward`, contiguous. The last two are None
        without a norm.
    x: input of `pool_forward`; may be None without a norm, unless kind is "fusion".
    pooled: first output of `pool_forward`; may be None without a norm.

    Other arguments as in `pool_forward`.
    """
    num_groups, width = dpooled_GD.shape
    block_rows, num_warps = choose(width)
    dx_TD = dpooled_GD.new_empty(num_rows, width)
    num_programs = min(WEIGHT_PROGRAMS, num_groups) if wants_weight else num_groups
    dweight_PD = dpooled_GD.new_empty(num_programs if wants_weight else 0, width, dtype=torch.float32)
    if dx_TD.numel() > 0:
        # Arguments that the kernel does not read under this norm and kind must still be tensors; dpooled serves as one.
        with torch.cuda.device_of(dpooled_GD):
            pool_backward_kernel[(num_programs,)](
                dpooled_GD if x_TD is None else x_TD,
                group_cu,
                dpooled_GD if weight_D is None else weight_D,
                dpooled_GD if pooled_GD is None else pooled_GD,
                dpooled_GD,
                dpooled_GD if dnormed_pooled_GD is None else dnormed_pooled_GD,
                dpooled_GD if dnormed_TD is None else dnormed_TD,
                dx_TD,
                dweight_PD,
                num_rows,
                num_groups,
                width,
                eps,
                KIND=kind,
                NORM=norm,
                WEIGHT_GRAD=wants_weight,
                BLOCK_R=block_rows,
                BLOCK_D=triton.next_power_of_2(width),
                STAGES=STAGES,
                num_warps=num_warps,
                **LAUNCH_OPTIONS,
            )
    if weight_D is None or not wants_weight:
        return dx_TD, dx_TD.new_empty(0)
    return dx_TD, dweight_PD.sum(0).to(weight_D.dtype)


def compile_specs() -> list[CompileSpec]:
    """The kernels as launched by the paper's models, for the offline compiler."""
    shapes = [("bf16", 576), ("bf16", 2048), ("bf16", 4096), ("bf16", MAX_POOL_WIDTH)]
    shapes += [("fp32", 3072), ("fp32", MAX_POOL_WIDTH)]
    variants = [("mean", "rms"), ("mean", "layer"), ("last", "rms"), ("fusion", "rms"), ("mean", "none")]
    return [
        _spec(fn, dtype=dtype, width=width, kind=kind, norm=norm)
        for fn in (pool_forward_kernel, pool_backward_kernel)
        for dtype, width, kind, norm in [
            *((*shape, "mean", "rms") for shape in shapes),
            *(("bf16", 3072, *variant) for variant in variants),
        ]
    ]


def _spec(fn: Any, *, dtype: str, width: int, kind: str, norm: str) -> CompileSpec:
    block_rows, num_warps = choose(width)
    constexprs = {
        "KIND": kind,
        "NORM": norm,
        "BLOCK_R": block_rows,
        "BLOCK_D": triton.next_power_of_2(width),
        "STAGES": STAGES,
    }
    if fn is pool_backward_kernel:
        constexprs["WEIGHT_GRAD"] = norm == "rms"
    types = {"p_cu": "*i32", "p_dweight": "*fp32", "eps": "fp32"}
    return CompileSpec(
        name=f"{fn.__name__.removesuffix('_kernel')} {dtype} D={width} {kind} {norm}",
        fn=fn,
        **arguments_of(fn, dtype, constexprs, types=types, odd=("num_rows", "num_groups")),
        num_warps=num_warps,
    )
