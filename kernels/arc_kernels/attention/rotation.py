# mypy: allow-untyped-defs
"""The rotary embedding inside the attention kernels: rotate queries when loading, rotate gradients back at the end.

Keys are rotated before (`autograd`), because every query tile would rotate them again. kernels/README.md compares the
memory traffic.

Kernels that rotate store the halves of a head separately. Column c of a tile is element c mod (BLOCK_H / 2) of half
c // (BLOCK_H / 2). The two elements of a pair are therefore BLOCK_H / 2 apart, however the head is padded. This is the
plain order if the head size is a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from arc_kernels.attention.tiles import load_tile, store_tile


@triton.jit
def load_angles(cos, sin, o_row, m_row, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """cos and sin of the rows' angles, float32 [rows, BLOCK_H / 2] each. o_row: index of each row in the tables."""
    o_angle = o_row * (H // 2)
    b_cos = load_tile(cos, o_angle, m_row, H // 2, BLOCK_H // 2, True, False).to(tl.float32)
    b_sin = load_tile(sin, o_angle, m_row, H // 2, BLOCK_H // 2, True, False).to(tl.float32)
    return b_cos, b_sin


@triton.jit
def load_turned(base, o_offset, m_row, cos, sin, o_row, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """Load rows of H values at base + o_offset and rotate them: both halves, float32 [rows, BLOCK_H / 2] each."""
    b_cos, b_sin = load_angles(cos, sin, o_row, m_row, H, BLOCK_H)
    b_first = load_tile(base, o_offset, m_row, H // 2, BLOCK_H // 2, True, False).to(tl.float32)
    b_second = load_tile(base + H // 2, o_offset, m_row, H // 2, BLOCK_H // 2, True, False).to(tl.float32)
    return b_first * b_cos - b_second * b_sin, b_second * b_cos + b_first * b_sin


@triton.jit
def joined(b_first, b_second):
    """Concatenate halves [rows, BLOCK_H / 2] to [rows, BLOCK_H]."""
    b_halves = tl.permute(tl.join(b_first, b_second), (0, 2, 1))
    return tl.reshape(b_halves, [b_first.shape[0], 2 * b_first.shape[1]])


@triton.jit
def store_halves(base, o_offset, m_row, b_first, b_second, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """Store rows of H values given as halves [rows, BLOCK_H / 2]."""
    store_tile(base, o_offset, m_row, b_first, H // 2, BLOCK_H // 2)
    store_tile(base + H // 2, o_offset, m_row, b_second, H // 2, BLOCK_H // 2)


@triton.jit
def store_turned_back(base, o_offset, m_row, b_x, cos, sin, o_row, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """Rotate rows of H values (with separate halves, see above) back by their angles and store them.

    This is the transposed rotation, which is the gradient's even if cos² + sin² is not 1.
    """
    b_cos, b_sin = load_angles(cos, sin, o_row, m_row, H, BLOCK_H)
    b_halves = tl.permute(tl.reshape(b_x, [b_x.shape[0], 2, BLOCK_H // 2]), (0, 2, 1))
    b_first, b_second = tl.split(b_halves)  # [rows, BLOCK_H / 2]
    b_back, b_partner = b_first * b_cos + b_second * b_sin, b_second * b_cos - b_first * b_sin
    store_halves(base, o_offset, m_row, b_back, b_partner, H, BLOCK_H)
