# mypy: allow-untyped-defs
"""Tiling of packed segments in the attention kernels, shared by forward and backward.

Three decisions shape all kernels (kernels/README.md has the maths):

*Packed heads.* The GROUP query heads that share one kv head are rows of one tile. Packed row r of a segment is query
r // GROUP, head r % GROUP of the group. K and V are therefore read once for the whole group, a segment of three queries
still fills a tile, and the key kernel sums the gradients of its group in one loop without atomics.

*Flat tiles.* The grid is one-dimensional over all segments. Segment s starts at row cu[s] and owns the tiles from
cu[s] // BLOCK + s on. The added s compensates for the floors, so every segment has at least the tiles that it needs and
at most one more. This needs no table of tiles, no host sync and no length of the longest segment. The grid has
rows // BLOCK + segments tiles, and a program finds its segment by bisection over cu.

*Limits.* Full, causal and limited attention differ only in the number of keys of its segment that a query sees. Key
blocks that all queries of a tile see need no mask. The following blocks are masked. Blocks that no query sees are
skipped. With a window, a query sees only the last `window` of these keys: the blocks before it are skipped, and the
blocks at its start are masked too. The window is a run-time argument, so all windows share one variant of a kernel; it
is None without a window, which compiles to the code of a kernel that knows none.

Boundaries and limits are clamped to the tensors, so wrong values cannot access other memory. A query that sees no key
gets output 0 and gradient 0. Scores and the log-sum-exp [T, N] are multiplied by log2(e), because the kernels use exp2.

Shape letters: T query rows, U key rows, N heads, K kv heads, H head size; M packed query rows and N key rows of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from arc_kernels._interpreter import narrow


@triton.jit
def segment_of(cu, tile, num_segments, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """The segment that owns a tile, and the first row of the tile in that segment.

    The segment is the last s with cu[s] * GROUP // BLOCK + s <= tile. The row is int64. For an empty tile, it is
    negative or past the end of the segment.
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
    """First row and number of rows of a segment, clamped to the tensor for any values of cu."""
    start = tl.minimum(tl.maximum(tl.load(cu + segment), 0), num_rows)
    end = tl.minimum(tl.maximum(tl.load(cu + segment + 1), start), num_rows)
    return start.to(tl.int64), end - start


@triton.jit
def unpack(start, BLOCK_M: tl.constexpr, GROUP: tl.constexpr):
    """For packed rows start … start + BLOCK_M: query of the first row; query offset and head in group of each row."""
    o_m = tl.arange(0, BLOCK_M)
    if BLOCK_M % GROUP != 0:  # otherwise each tile starts with the first head of a query
        o_m += start % GROUP
    return start // GROUP, o_m // GROUP, o_m % GROUP


@triton.jit
def limits(k_limits, o_query, num_queries, num_keys, CAUSAL: tl.constexpr, LIMITED: tl.constexpr):
    """Number of keys that each query sees, at most num_keys. k_limits points to the segment's first limit."""
    if LIMITED:
        inside = (o_query >= 0) & (o_query < num_queries)
        return tl.minimum(tl.load(k_limits + o_query, mask=inside, other=0), num_keys)
    elif CAUSAL:
        return num_keys - num_queries + tl.minimum(o_query + 1, num_queries)
    else:
        return num_keys + tl.zeros_like(o_query)


@triton.jit
def sees(o_key, b_limit, window):
    """Whether a query with this limit sees this key. Both arguments are broadcast."""
    m_seen = o_key < b_limit
    if window is not None:
        m_seen &= o_key >= b_limit - window
    return m_seen


@triton.jit
def window_bounds(b_limit, window, BLOCK_N: tl.constexpr):
    """Two keys, multiples of BLOCK_N: no query of a tile sees an earlier key, and each query's window has begun.

    b_limit: number of keys that each query of the tile sees without the window.
    """
    # The maximum comes first: a wrong limit minus the window could overflow.
    begin = (tl.maximum(tl.min(b_limit, 0), window) - window) // BLOCK_N * BLOCK_N
    begun = (tl.maximum(tl.max(b_limit, 0), window) - window + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    return begin, begun


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
    """Load rows of H values at base + o_offset: [rows, BLOCK_H], with zeros past H.

    MASK_ROWS: rows with false m_row are zero too.
    HALVES: the halves of a head are BLOCK_H / 2 apart, each followed by its zeros (see `rotation`).
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
