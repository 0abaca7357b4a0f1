# mypy: allow-untyped-defs
"""The rotary embedding inside the attention kernels: queries turned as they come in, gradients turned back at the end.

Keys are turned before (`autograd`): every query tile reads them, and would turn them again. Why so, in bytes:
kernels/README.md. A kernel that turns something holds queries and keys with the halves of a head apart: column c of a
tile is element c mod (BLOCK_H / 2) of half c // (BLOCK_H / 2), so that partners stand BLOCK_H / 2 apart however the
head is padded. Where the head is a power of two that is the plain order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from arc_kernels.attention.tiles import load_tile, store_tile


@triton.jit
def load_angles(cos, sin, o_row, m_row, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """cos and sin of the rows' angles, each [rows, BLOCK_H / 2] of float32. o_row: the rows' places in the tables."""
    o_angle = o_row * (H // 2)
    b_cos = load_tile(cos, o_angle, m_row, H // 2, BLOCK_H // 2, True, False).to(tl.float32)
    b_sin = load_tile(sin, o_angle, m_row, H // 2, BLOCK_H // 2, True, False).to(tl.float32)
    return b_cos, b_sin


@triton.jit
def load_turned(base, o_offset, m_row, cos, sin, o_row, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """Rows of H values at base + o_offset, turned by their angles: both halves, each [rows, BLOCK_H / 2], float32."""
    b_cos, b_sin = load_angles(cos, sin, o_row, m_row, H, BLOCK_H)
    b_first = load_tile(base, o_offset, m_row, H // 2, BLOCK_H // 2, True, False).to(tl.float32)
    b_second = load_tile(base + H // 2, o_offset, m_row, H // 2, BLOCK_H // 2, True, False).to(tl.float32)
    return b_first * b_cos - b_second * b_sin, b_second * b_cos + b_first * b_sin


@triton.jit
def joined(b_first, b_second):
    """Halves [rows, BLOCK_H / 2] side by side: [rows, BLOCK_H]."""
    b_halves = tl.permute(tl.join(b_first, b_second), (0, 2, 1))
    return tl.reshape(b_halves, [b_first.shape[0], 2 * b_first.shape[1]])


@triton.jit
def store_halves(base, o_offset, m_row, b_first, b_second, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """Stores rows of H values from their halves, each [rows, BLOCK_H / 2]."""
    store_tile(base, o_offset, m_row, b_first, H // 2, BLOCK_H // 2)
    store_tile(base + H // 2, o_offset, m_row, b_second, H // 2, BLOCK_H // 2)


@triton.jit
def store_turned_back(base, o_offset, m_row, b_x, cos, sin, o_row, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """Stores rows of H values (halves apart, see above) after turning them back by their angles."""
    b_cos, b_sin = load_angles(cos, sin, o_row, m_row, H, BLOCK_H)
    b_halves = tl.permute(tl.reshape(b_x, [b_x.shape[0], 2, BLOCK_H // 2]), (0, 2, 1))
    b_first, b_second = tl.split(b_halves)  # [rows, BLOCK_H / 2]
    b_back, b_partner = b_first * b_cos + b_second * b_sin, b_second * b_cos - b_first * b_sin
    store_halves(base, o_offset, m_row, b_back, b_partner, H, BLOCK_H)
