# mypy: allow-untyped-defs
"""How the attention kernels cut packed segments into tiles: what forward and backward share.

Three decisions shape all kernels (what they compute: kernels/README.md):

*Packed heads.* The GROUP query heads that share one kv head are laid into the rows of one tile: packed row r of a
segment is query r // GROUP, head r % GROUP of the group. So K and V are read once for the whole group, a segment of
three queries still fills a tile, and the key side sums its group's gradients in one loop, without atomics.

*Flat tiles.* The grid is one-dimensional over all segments. Segment s, whose rows begin at cu[s], owns the tiles from
cu[s] // BLOCK + s on: floors can only lose what the added s gives back, so every segment has at least the tiles it
needs and at most one too many. This needs no table of tiles, no host sync and no length of the longest segment; the
grid is rows // BLOCK + segments, and a program finds its segment by bisection over cu.

*Limits.* Full, causal and limited attention differ only in how many of its segment's keys a query sees. Key blocks
that all queries of a tile see are attended without a mask, the blocks after them with one, the rest not at all.

Boundaries and limits are clamped to the tensors, so that wrong values cannot reach other memory. A query that sees no
key gets output 0 and gradient 0. Scores are kept times log2(e), for exp2; so is the log-sum-exp, [T, N].

Shape letters: T query rows, U key rows, N heads, K kv heads, H head size; M packed query rows and N key rows of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from arc_kernels._interpreter import narrow


@triton.jit
def segment_of(cu, tile, num_segments, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """The segment that owns a tile, the last s with cu[s] * GROUP // BLOCK + s <= tile; the tile's first row in it.

    The row, int64, is below 0 or past the segment's end where the tile holds nothing.
    """
    low = num_segments * 0
    high = num_segments - 1
    while low < high:
        middle = (low + high + 1) // 2
        begins_later = tl.load(cu + middle).to(tl.int64) * GROUP // BLOCK + middle > tile
        low = tl.where(begins_later, low, middle)
        high = tl.where(begins_later, middle - 1, high)
    return low, (tile - low - tl.load(cu + low).to(tl.int64) * GROUP // BLOCK) * BLOCK


@triton.jit
def bounds(cu, segment, num_rows):
    """First row and number of rows of a segment, within the tensor whatever cu holds."""
    start = tl.minimum(tl.maximum(tl.load(cu + segment), 0), num_rows)
    end = tl.minimum(tl.maximum(tl.load(cu + segment + 1), start), num_rows)
    return start.to(tl.int64), end - start


@triton.jit
def unpack(start, BLOCK_M: tl.constexpr, GROUP: tl.constexpr):
    """Packed rows start … start + BLOCK_M: the first one's query, each one's query after it, and head in the group."""
    o_m = tl.arange(0, BLOCK_M)
    if BLOCK_M % GROUP != 0:  # else a tile begins with the first head of a query
        o_m += start % GROUP
    return start // GROUP, o_m // GROUP, o_m % GROUP


@triton.jit
def limits(k_limits, o_query, num_queries, num_keys, CAUSAL: tl.constexpr, LIMITED: tl.constexpr):
    """How many keys of the segment each query sees (not above num_keys). k_limits points at the segment's first."""
    if LIMITED:
        inside = (o_query >= 0) & (o_query < num_queries)
        return tl.minimum(tl.load(k_limits + o_query, mask=inside, other=0), num_keys)
    elif CAUSAL:
        return num_keys - num_queries + tl.minimum(o_query + 1, num_queries)
    else:
        return num_keys + tl.zeros_like(o_query)


@triton.jit
def load_tile(
    base,
    o_offset,
    m_row,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    HALVES: tl.constexpr,
):
    """Rows of H values at base + o_offset: [rows, BLOCK_H], zeros beyond H and, under MASK_ROWS, where m_row is not.

    HALVES: the halves of a head stand BLOCK_H / 2 apart, each with its zeros behind it (see `rotation`).
    """
    o_h = tl.arange(0, BLOCK_H)
    m_h = o_h < H
    if HALVES and BLOCK_H != H:
        o_pair = o_h % (BLOCK_H // 2)
        m_h = o_pair < H // 2
        o_h = o_h // (BLOCK_H // 2) * (H // 2) + o_pair
    p = base + o_offset[:, None] + o_h[None, :]
    if MASK_ROWS:
        if BLOCK_H == H:
            return tl.load(p, mask=m_row[:, None], other=0.0)
        return tl.load(p, mask=m_row[:, None] & m_h[None, :], other=0.0)
    if BLOCK_H == H:
        return tl.load(p)
    return tl.load(p, mask=m_h[None, :], other=0.0)


@triton.jit
def store_tile(base, o_offset, m_row, b_x, H: tl.constexpr, BLOCK_H: tl.constexpr):
    o_h = tl.arange(0, BLOCK_H)
    p = base + o_offset[:, None] + o_h[None, :]
    tl.store(p, narrow(b_x, base.dtype.element_ty), mask=m_row[:, None] & (o_h < H)[None, :])
