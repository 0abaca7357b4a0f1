# mypy: allow-untyped-defs
"""Triton kernels of group pooling and of the norms of a pooled layer.

Forward: one program per group reads the group's rows once and writes their norms. At the end it writes the pooled row
and its norm. Backward: one program per group computes the gradient of the pooled row, then reads the rows and writes
their gradients. Statistics are recomputed from the rows, so only inputs and pooled rows are saved.

Shape letters: T rows, G groups, P programs, D width; BR and BD are the rows and columns of a tile, BD at least D.
"""

from __future__ import annotations

import triton
import triton.language as tl

from arc_kernels._interpreter import narrow


@triton.jit
def _bounds(p_cu, i_g, num_rows):
    # Clamp to 0 … num_rows: wrong boundaries must not access memory outside x.
    lo = tl.minimum(tl.maximum(tl.load(p_cu + i_g), 0), num_rows)
    hi = tl.minimum(tl.load(p_cu + i_g + 1), num_rows)
    return lo.to(tl.int64), tl.maximum(hi, lo).to(tl.int64)


@triton.jit
def _load_row(p_x, i_r, width, BLOCK_D: tl.constexpr):
    o_d = tl.arange(0, BLOCK_D)
    return tl.load(p_x + i_r * width + o_d, mask=o_d < width, other=0.0).to(tl.float32)  # [BD]


@triton.jit
def _load_rows(p_x, o_r, hi, width, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    o_d = tl.arange(0, BLOCK_D)
    m_rd = (o_r < hi)[:, None] & (o_d < width)[None, :]
    return tl.load(p_x + o_r[:, None] * width + o_d[None, :], mask=m_rd, other=0.0).to(tl.float32)  # [BR, BD]


@triton.jit
def _store_rows(p_x, b_x, o_r, hi, width, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    o_d = tl.arange(0, BLOCK_D)
    m_rd = (o_r < hi)[:, None] & (o_d < width)[None, :]
    tl.store(p_x + o_r[:, None] * width + o_d[None, :], narrow(b_x, p_x.dtype.element_ty), mask=m_rd)


@triton.jit
def _normalize(b_x, m_x, width, eps, NORM: tl.constexpr, AXIS: tl.constexpr):
    """(x normalised without weight, 1 / its scale). Columns past the width are zero before and after."""
    if NORM == "layer":
        b_mean = tl.sum(b_x, axis=AXIS, keep_dims=True) / width
        b_x = tl.where(m_x, b_x - b_mean, 0.0)
    b_rstd = tl.rsqrt(tl.sum(b_x * b_x, axis=AXIS, keep_dims=True) / width + eps)
    return b_x * b_rstd, b_rstd


@triton.jit
def _normalize_gradient(b_x, b_g, b_weight, m_x, width, eps, NORM: tl.constexpr, AXIS: tl.constexpr):
    """(gradient of x, x normalised without weight), given the gradient `b_g` of the norm."""
    b_unit, b_rstd = _normalize(b_x, m_x, width, eps, NORM, AXIS)
    if NORM == "rms":
        b_g = b_g * b_weight
    b_dx = b_g - b_unit * (tl.sum(b_g * b_unit, axis=AXIS, keep_dims=True) / width)
    if NORM == "layer":
        b_dx -= tl.sum(b_g, axis=AXIS, keep_dims=True) / width
    return b_dx * b_rstd, b_unit


@triton.jit
def _add_tile(b_total, b_largest, b_x, o_r, hi, KIND: tl.constexpr):
    """Running sum of the group (for "last", its last row) and, for "fusion", its largest squared norm so far."""
    if KIND == "last":
        b_total += tl.sum(tl.where((o_r == hi - 1)[:, None], b_x, 0.0), axis=0)
    else:
        b_total += tl.sum(b_x, axis=0)
    if KIND == "fusion":
        b_largest = tl.maximum(b_largest, tl.max(tl.sum(b_x * b_x, axis=1), axis=0))
    return b_total, b_largest


@triton.jit
def _add_compensated(b_sum, b_lost, b_x, COMPENSATED: tl.constexpr):
    """(sum, its error so far), by Kahan summation or plain addition."""
    if COMPENSATED:
        b_x -= b_lost
        b_new = b_sum + b_x
        b_lost = (b_new - b_sum) - b_x
        b_sum = b_new
    else:
        b_sum += b_x
    return b_sum, b_lost


@triton.jit
def _fusion_scale(b_total, b_largest):
    """(direction of the mean, largest norm of the group divided by the norm of the sum)."""
    b_norm = tl.sqrt(tl.sum(b_total * b_total, axis=0))
    return b_total / b_norm, tl.sqrt(b_largest) / b_norm


@triton.jit(do_not_specialize=["num_rows"])
def pool_forward_kernel(
    p_x,
    p_cu,
    p_weight,
    p_pooled,
    p_normed_pooled,
    p_normed,
    num_rows,
    width,
    eps,
    KIND: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One group: its pooled row, that row's norm, and the norms of its own rows."""
    i_g = tl.program_id(0).to(tl.int64)
    lo, hi = _bounds(p_cu, i_g, num_rows)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < width
    b_total = tl.zeros([BLOCK_D], tl.float32)
    b_largest = 0.0
    b_weight = b_total
    if NORM == "rms":
        b_weight = _load_row(p_weight, 0, width, BLOCK_D)
    first = lo
    if NORM == "none" and KIND == "last":
        first = tl.maximum(hi - 1, lo)
    for start in tl.range(first, hi, BLOCK_R, num_stages=STAGES):
        o_r = start + tl.arange(0, BLOCK_R)
        b_x = _load_rows(p_x, o_r, hi, width, BLOCK_R, BLOCK_D)  # [BR, BD]
        b_total, b_largest = _add_tile(b_total, b_largest, b_x, o_r, hi, KIND)
        if NORM != "none":
            b_rows, _ = _normalize(b_x, m_d[None, :], width, eps, NORM, 1)
            if NORM == "rms":
                b_rows *= b_weight[None, :]
            _store_rows(p_normed, b_rows, o_r, hi, width, BLOCK_R, BLOCK_D)

    b_pooled = b_total  # [BD]
    if KIND == "mean":
        b_pooled = b_total / tl.maximum(hi - lo, 1).to(tl.float32)
    if KIND == "fusion":
        _, b_scale = _fusion_scale(b_total, b_largest)
        b_pooled = b_total * b_scale
    b_stored = narrow(b_pooled, p_pooled.dtype.element_ty)
    tl.store(p_pooled + i_g * width + o_d, b_stored, mask=m_d)
    if NORM != "none":
        # Normalise the pooled row as stored, so residual and norm belong to the same row.
        b_normed, _ = _normalize(b_stored.to(tl.float32), m_d, width, eps, NORM, 0)
        if NORM == "rms":
            b_normed *= b_weight
        tl.store(p_normed_pooled + i_g * width + o_d, narrow(b_normed, p_normed_pooled.dtype.element_ty), mask=m_d)


@triton.jit
def _row_gradient(p_x, b_g, lo, hi, width, KIND: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """Gradient [BD] of each row of the group (for "last", of the last row), given that of the pooled row, `b_g`."""
    if KIND == "mean":
        b_g = b_g / tl.maximum(hi - lo, 1).to(tl.float32)
    if KIND == "fusion":
        b_total = tl.zeros([BLOCK_D], tl.float32)
        b_largest = 0.0
        for start in range(lo, hi, BLOCK_R):
            o_r = start + tl.arange(0, BLOCK_R)
            b_x = _load_rows(p_x, o_r, hi, width, BLOCK_R, BLOCK_D)
            b_total, b_largest = _add_tile(b_total, b_largest, b_x, o_r, hi, KIND)
        b_unit, b_scale = _fusion_scale(b_total, b_largest)
        b_g = (b_g - b_unit * tl.sum(b_g * b_unit, axis=0)) * b_scale
    return b_g


@triton.jit(do_not_specialize=["num_rows", "num_groups"])
def pool_backward_kernel(
    p_x,
    p_cu,
    p_weight,
    p_pooled,
    p_dpooled,
    p_dnormed_pooled,
    p_dnormed,
    p_dx,
    p_dweight,
    num_rows,
    num_groups,
    width,
    eps,
    KIND: tl.constexpr,
    NORM: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients of the rows in the groups of this program, and its partial sum of the weight's gradient."""
    i_p = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < width
    b_dweight = tl.zeros([BLOCK_D], tl.float32)
    b_lost = b_dweight
    # One program may sum thousands of rows. The error is visible in float32, whereas half precision rounds much more at
    # the end. Wider rows leave no registers for the compensation.
    COMPENSATED: tl.constexpr = p_x.dtype.element_ty == tl.float32 and BLOCK_D <= 4096
    b_weight = b_dweight
    if NORM == "rms":
        b_weight = _load_row(p_weight, 0, width, BLOCK_D)
    # Without the weight's gradient this loop runs once, because there are as many programs as groups.
    for i_g in range(i_p, num_groups, tl.num_programs(0)):
        lo, hi = _bounds(p_cu, i_g, num_rows)
        b_g = _load_row(p_dpooled, i_g, width, BLOCK_D)  # [BD]
        if NORM != "none":
            b_normed_g = _load_row(p_dnormed_pooled, i_g, width, BLOCK_D)
            b_pooled = _load_row(p_pooled, i_g, width, BLOCK_D)
            b_from_norm, b_unit = _normalize_gradient(b_pooled, b_normed_g, b_weight, m_d, width, eps, NORM, 0)
            b_g += b_from_norm
            if WEIGHT_GRAD:
                b_dweight, b_lost = _add_compensated(b_dweight, b_lost, b_normed_g * b_unit, COMPENSATED)
        b_g = _row_gradient(p_x, b_g, lo, hi, width, KIND, BLOCK_R, BLOCK_D)
        for start in tl.range(lo, hi, BLOCK_R, num_stages=STAGES):
            o_r = start + tl.arange(0, BLOCK_R)
            b_dx = tl.zeros([BLOCK_R, BLOCK_D], tl.float32) + b_g[None, :]
            if KIND == "last":
                b_dx = tl.where((o_r == hi - 1)[:, None], b_dx, 0.0)
            if NORM != "none":
                b_x = _load_rows(p_x, o_r, hi, width, BLOCK_R, BLOCK_D)  # [BR, BD]
                b_rows_g = _load_rows(p_dnormed, o_r, hi, width, BLOCK_R, BLOCK_D)
                b_norm_dx, b_rows = _normalize_gradient(
                    b_x, b_rows_g, b_weight[None, :], m_d[None, :], width, eps, NORM, 1
                )
                b_dx += b_norm_dx
                if WEIGHT_GRAD:
                    # Rows past the group are masked: if eps is 0, they are 0 times the infinite scale of a zero row.
                    b_tile = tl.sum(tl.where((o_r < hi)[:, None], b_rows_g * b_rows, 0.0), axis=0)
                    b_dweight, b_lost = _add_compensated(b_dweight, b_lost, b_tile, COMPENSATED)
            _store_rows(p_dx, b_dx, o_r, hi, width, BLOCK_R, BLOCK_D)
    if WEIGHT_GRAD:
        tl.store(p_dweight + i_p * width + o_d, b_dweight, mask=m_d)
