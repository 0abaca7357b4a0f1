# mypy: allow-untyped-defs
"""Triton kernels of the splice and its gradients: rows of a table and given rows in one sequence.

Each output row is read once and written once. For the table's gradient, ids are sorted stably and one program sums the
rows of a token in sequence order. The result is therefore bit-identical in every run.

Shape letters: R rows, N text rows, Z given rows, V vocabulary, D width; BJ and BD are rows and columns of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from arc_kernels._compile import LAUNCH_OPTIONS, CompileSpec, arguments_of
from arc_kernels._dispatch import warp_size
from arc_kernels._interpreter import narrow

SUM_ROWS = 16  # rows that a program sums at once


def choose_copy(width: int, *, warp_size: int = 32) -> tuple[int, int]:
    """(columns, warps) of a program: 16 columns per thread (two loads of 16 bytes in bfloat16), up to 4096 columns."""
    block = min(4096, max(16 * warp_size, triton.next_power_of_2(width)))
    return block, block // (16 * warp_size)


def choose_sum(width: int, *, warp_size: int = 32) -> tuple[int, int]:
    """(columns, warps) of a program that sums rows.

    Tiles of 16 rows by 256 columns: D / 256 programs sum a token with hundreds of rows in tens of steps.

    Most tokens occur in one row. Their programs read only that row; the rest of the tile is masked.
    """
    block = min(256, max(16, triton.next_power_of_2(width)))
    return block, 4 * 32 // warp_size


@triton.jit
def _columns(i_r, num_rows, width):
    """Number of columns of row `i_r` that may be accessed: 0 if the row does not exist."""
    return tl.where((i_r >= 0) & (i_r < num_rows), width, 0)


@triton.jit(do_not_specialize=["num_text", "num_rows"])
def _splice_forward(
    p_table,
    p_ids,
    p_text_rows,
    p_given,
    p_given_rows,
    p_out,
    vocab_size,
    num_text,
    num_rows,
    width,
    table_stride,
    BLOCK_D: tl.constexpr,
):
    """Write row i of the text rows and given rows. A token outside the table reads nothing and gives a row of NaN."""
    i_n = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    if i_n < num_text:
        token = tl.load(p_ids + i_n)
        row = tl.load(p_text_rows + i_n)
        m_d = o_d < _columns(token, vocab_size, width)
        b_token = tl.load(p_table + token * table_stride + o_d, mask=m_d, other=float("nan"))  # [BD]
        tl.store(p_out + row * width + o_d, b_token, mask=o_d < _columns(row, num_rows, width))
    else:
        i_z = i_n - num_text
        row = tl.load(p_given_rows + i_z)
        b_given = tl.load(p_given + i_z * width + o_d, mask=o_d < width, other=0.0).to(tl.float32)
        b_given = narrow(b_given, p_out.dtype.element_ty)
        tl.store(p_out + row * width + o_d, b_given, mask=o_d < _columns(row, num_rows, width))


@triton.jit(do_not_specialize=["num_rows"])
def _gather_rows(p_x, p_rows, p_out, num_rows, width, BLOCK_D: tl.constexpr):
    """out[i] = x[rows[i]] in the dtype of out; NaN for rows outside x."""
    i_z = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = tl.load(p_rows + i_z)
    m_d = o_d < _columns(row, num_rows, width)
    b_x = tl.load(p_x + row * width + o_d, mask=m_d, other=float("nan")).to(tl.float32)  # [BD]
    tl.store(p_out + i_z * width + o_d, narrow(b_x, p_out.dtype.element_ty), mask=o_d < width)


@triton.jit(do_not_specialize=["num_rows"])
def _sum_runs(
    p_x,
    p_ids,
    p_ends,
    p_rows,
    p_out,
    vocab_size,
    num_rows,
    width,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """For each i that starts a run of equal ids: out[ids[i]] = sum of x[rows[i]] … x[rows[ends[i] - 1]]. Sorted ids."""
    i_n = tl.program_id(0).to(tl.int64)
    token = tl.load(p_ids + i_n)
    before = tl.load(p_ids + i_n - 1, mask=i_n > 0, other=-1)
    if (token != before) & (token >= 0) & (token < vocab_size):
        end = tl.load(p_ends + i_n)
        o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        b_sum = tl.zeros([BLOCK_J, BLOCK_D], tl.float32)
        for start in range(i_n, end, BLOCK_J):
            o_j = start + tl.arange(0, BLOCK_J)
            row = tl.load(p_rows + o_j, mask=o_j < end, other=-1)
            m_jd = ((row >= 0) & (row < num_rows))[:, None] & (o_d < width)[None, :]
            b_sum += tl.load(p_x + row[:, None] * width + o_d[None, :], mask=m_jd, other=0.0).to(tl.float32)  # [BJ, BD]
        b_total = tl.sum(b_sum, axis=0)
        tl.store(p_out + token * width + o_d, narrow(b_total, p_out.dtype.element_ty), mask=o_d < width)


def splice_forward(
    table_VD: Tensor,
    ids_N: Tensor,
    text_rows_N: Tensor,
    given_ZD: Tensor | None,
    given_rows_Z: Tensor | None,
) -> Tensor:
    """See `splice`. All tensors are contiguous, except that the table may have any row stride."""
    (vocab_size, width), num_text = table_VD.shape, ids_N.shape[0]
    num_rows = num_text + (0 if given_ZD is None else given_ZD.shape[0])
    block, num_warps = choose_copy(width, warp_size=warp_size())
    out_RD = table_VD.new_empty(num_rows, width)
    if out_RD.numel() > 0:
        with torch.cuda.device_of(table_VD):
            _splice_forward[(num_rows, triton.cdiv(width, block))](
                table_VD,
                ids_N,
                text_rows_N,
                table_VD if given_ZD is None else given_ZD,
                text_rows_N if given_rows_Z is None else given_rows_Z,
                out_RD,
                vocab_size,
                num_text,
                num_rows,
                width,
                table_VD.stride(0),
                BLOCK_D=block,
                num_warps=num_warps,
                **LAUNCH_OPTIONS,
            )
    return out_RD


def gather_rows(x_RD: Tensor, rows_Z: Tensor, dtype: torch.dtype) -> Tensor:
    """x[rows] in the given dtype: the gradient of the given rows. Both are contiguous."""
    num_rows, width = x_RD.shape
    block, num_warps = choose_copy(width, warp_size=warp_size())
    out_ZD = x_RD.new_empty(rows_Z.shape[0], width, dtype=dtype)
    if out_ZD.numel() > 0:
        with torch.cuda.device_of(x_RD):
            _gather_rows[(out_ZD.shape[0], triton.cdiv(width, block))](
                x_RD,
                rows_Z,
                out_ZD,
                num_rows,
                width,
                BLOCK_D=block,
                num_warps=num_warps,
                **LAUNCH_OPTIONS,
            )
    return out_ZD


def sum_rows_by_id(
    x_RD: Tensor,
    ids_N: Tensor,
    rows_N: Tensor,
    vocab_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """out[v] = sum of x[rows[i]] over i with ids[i] = v: the gradient of the table [V, D], summed in float32."""
    num_rows, width = x_RD.shape
    block, num_warps = choose_sum(width, warp_size=warp_size())
    out_VD = x_RD.new_zeros(vocab_size, width, dtype=dtype)
    if ids_N.shape[0] > 0 and width > 0:
        sorted_N, order_N = torch.sort(ids_N, stable=True)
        ends_N = torch.searchsorted(sorted_N, sorted_N, right=True)
        with torch.cuda.device_of(x_RD):
            _sum_runs[(ids_N.shape[0], triton.cdiv(width, block))](
                x_RD,
                sorted_N,
                ends_N,
                rows_N[order_N],
                out_VD,
                vocab_size,
                num_rows,
                width,
                BLOCK_J=SUM_ROWS,
                BLOCK_D=block,
                num_warps=num_warps,
                **LAUNCH_OPTIONS,
            )
    return out_VD


def compile_specs() -> list[CompileSpec]:
    """The kernels as launched by the paper's models, for the offline compiler."""
    shapes = [("bf16", 4096), ("bf16", 3072), ("bf16", 576), ("fp32", 4096)]
    return [_spec(fn, *shape) for fn in (_splice_forward, _gather_rows, _sum_runs) for shape in shapes]


def _spec(fn, dtype: str, width: int) -> CompileSpec:
    choose = choose_sum if fn is _sum_runs else choose_copy
    block, num_warps = choose(width)
    _, hip_num_warps = choose(width, warp_size=64)
    constexprs = {"BLOCK_D": block}
    if fn is _sum_runs:
        constexprs["BLOCK_J"] = SUM_ROWS
    indices = ("p_ids", "p_text_rows", "p_given_rows", "p_rows", "p_ends")
    odd = ("vocab_size", "num_text", "num_rows")
    return CompileSpec(
        name=f"{fn.__name__.removeprefix('_')} {dtype} D={width}",
        fn=fn,
        **arguments_of(fn, dtype, constexprs, types=dict.fromkeys(indices, "*i64"), odd=odd),
        num_warps=num_warps,
        hip_num_warps=hip_num_warps,
    )
