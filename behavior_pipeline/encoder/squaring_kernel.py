"""Triton kernel of a product that squares, or slopes, what it made before it writes it.

The product itself reads tiles with the tensor memory accelerator (an H100 or H200 has one). What is
done to a tile at its end costs no pass over memory: after a cuBLAS product it would be one more
kernel that reads and writes all of it, as long as a third of the product.

This module needs Triton and is imported by `squared_relu.py` where the kernel is launched. Only
what Triton has had since 3.6 is used.

Legend of shapes: N rows, K summed over, C columns.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def store_finished(total, squares, out, row, column, IS_BACKWARD: tl.constexpr):
    """Write relu(total)^2, or total times the slope of the square, 2 relu = 2 sqrt(square)."""
    if IS_BACKWARD:
        known = squares.load([row, column]).to(tl.float32)
        made = total * (2.0 * tl.sqrt(known))
    else:
        kept = tl.maximum(total, 0.0)
        made = kept * kept
    out.store([row, column], made.to(out.dtype))


@triton.jit
def product_kernel(
    left, right, squares, out, num_rows, num_columns, depth, num_programs,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, BAND: tl.constexpr,
    IS_BACKWARD: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """Write out = left right, finished, a tile of (ROWS, COLUMNS) after the other.

    Args:
        left: tiles (ROWS, DEPTH) of (N, K).
        right: tiles (COLUMNS, DEPTH) of (C, K), or backwards (DEPTH, COLUMNS) of (K, C).
        squares: tiles (ROWS, COLUMNS / 2) of (N, C); read backwards alone.
        out: tiles (ROWS, COLUMNS / 2) of (N, C).
        num_rows: N.
        num_columns: C.
        depth: K.
        num_programs: how many programs share the tiles.
        ROWS: of a tile.
        COLUMNS: of a tile.
        DEPTH: summed over at a time.
        BAND: tiles one below the other that are made before those to their right, so that both
            operands stay in the cache.
        IS_BACKWARD: whether `squares` are known and what they were squared from gets its gradient.
    """
    high, wide = tl.cdiv(num_rows, ROWS), tl.cdiv(num_columns, COLUMNS)
    for tile in tl.range(tl.program_id(0), high * wide, num_programs, flatten=FLAT):
        band = tile // (BAND * wide) * BAND
        height = tl.minimum(high - band, BAND)
        row = (band + tile % (BAND * wide) % height) * ROWS
        column = tile % (BAND * wide) // height * COLUMNS
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for place in range(0, depth, DEPTH):
            a = left.load([row, place])
            b = right.load([place, column]) if IS_BACKWARD else right.load([column, place]).T
            total = tl.dot(a, b, total)
        # In halves: what waits to be written takes memory from what is read ahead.
        sides = tl.permute(tl.reshape(total, (ROWS, 2, COLUMNS // 2)), (0, 2, 1))
        left_side, right_side = tl.split(sides)
        store_finished(left_side, squares, out, row, column, IS_BACKWARD)
        store_finished(right_side, squares, out, row, column + COLUMNS // 2, IS_BACKWARD)
