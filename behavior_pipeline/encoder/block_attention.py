"""Triton kernels of attention over stretches: each token sees one stretch of tokens around it.

A block of tokens and a head are one program. It looks at the few blocks in which its tokens'
stretches lie, its own alone where runs are short, so that short runs share the tiles that
would else be each one's own. Softmax is online (Milakov and Gimelshein 2018), the backward pass
computes its scores again from the log-sum-exp (Dao et al. 2022, "FlashAttention", algorithm 4).
Each program alone writes the gradients of its block: no atomic additions, the same bits every time.

This module needs Triton and is imported by `run_attention.py` where a kernel is launched. Only what
Triton has had since 3.6 is used.

Legend of shapes: N tokens, H heads, W width of a head, B tokens of a block.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Far below any score, and finite: minus infinity less itself would be no number.
HIDDEN = tl.constexpr(-1.0e30)
NUM_ENDS = tl.constexpr(4)


@triton.jit
def load_rows(start, rows, stride, num_tokens, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Return rows (B, PADDED) of (N, WIDTH) numbers from `start` on; zeros beyond either end."""
    columns = tl.arange(0, PADDED)
    places = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    inside = (rows < num_tokens)[:, None] & (columns < WIDTH)[None, :]
    return tl.load(start + places, mask=inside, other=0.0)


@triton.jit
def store_rows(start, rows, stride, values, num_tokens, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Write rows (B, PADDED) where `load_rows` reads them."""
    columns = tl.arange(0, PADDED)
    places = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    inside = (rows < num_tokens)[:, None] & (columns < WIDTH)[None, :]
    tl.store(start + places, values.to(start.dtype.element_ty), mask=inside)


@triton.jit
def load_stretch(first, last, rows, num_tokens):
    """Return the first and last token that each row sees; a row beyond the end sees none."""
    inside = rows < num_tokens
    return tl.load(first + rows, mask=inside, other=0), tl.load(last + rows, mask=inside, other=-1)


@triton.jit
def forward_kernel(
    query, key, value, out, log_sums, first, last, reach,
    query_row, query_head, key_row, key_head, value_row, value_head, out_row, out_head,
    num_tokens, num_heads, scale,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write out = softmax(scores) value and log2 sum exp2(scores), scores = scale query key'."""
    block, head = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads
    rows = block * BLOCK + tl.arange(0, BLOCK)
    low, high = load_stretch(first, last, rows, num_tokens)
    q = load_rows(query + head * query_head, rows, query_row, num_tokens, WIDTH, PADDED)
    highest = tl.full((BLOCK,), HIDDEN, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    mixed = tl.zeros((BLOCK, PADDED), tl.float32)
    begin = tl.load(reach + block * NUM_ENDS)
    end = tl.load(reach + block * NUM_ENDS + 1)
    for other in range(begin, end + 1):
        columns = other * BLOCK + tl.arange(0, BLOCK)
        k = load_rows(key + head * key_head, columns, key_row, num_tokens, WIDTH, PADDED)
        v = load_rows(value + head * value_head, columns, value_row, num_tokens, WIDTH, PADDED)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        seen = (columns[None, :] >= low[:, None]) & (columns[None, :] <= high[:, None])
        scores = tl.where(seen, scores, HIDDEN)
        higher = tl.maximum(highest, tl.max(scores, 1))
        shares = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(shares, 1)
        mixed = mixed * shrink[:, None]
        mixed = tl.dot(shares.to(v.dtype), v, mixed, input_precision=PRECISION)
        highest = higher
    mixed = mixed / total[:, None]
    store_rows(out + head * out_head, rows, out_row, mixed, num_tokens, WIDTH, PADDED)
    sums = highest + tl.log2(total)
    tl.store(log_sums + head.to(tl.int64) * num_tokens + rows, sums, mask=rows < num_tokens)


@triton.jit
def load_side(
    query, out, given, log_sums, first, last, rows, head,
    query_row, query_head, out_row, out_head, given_row, given_head, num_tokens,
    WIDTH: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Return what the backward pass needs of rows that look.

    Queries, gradients of what was mixed, log sums, row sums of gradient times mixed, stretches.
    """
    q = load_rows(query + head * query_head, rows, query_row, num_tokens, WIDTH, PADDED)
    g = load_rows(given + head * given_head, rows, given_row, num_tokens, WIDTH, PADDED)
    o = load_rows(out + head * out_head, rows, out_row, num_tokens, WIDTH, PADDED)
    dots = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    place = log_sums + head.to(tl.int64) * num_tokens + rows
    sums = tl.load(place, mask=rows < num_tokens, other=0.0)
    low, high = load_stretch(first, last, rows, num_tokens)
    return q, g, sums, dots, low, high


@triton.jit
def shares_and_slopes(q, k, v, g, sums, dots, low, high, columns, scale, PRECISION: tl.constexpr):
    """Return the softmax's shares and its scores' gradients; transposed, a row for each key."""
    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
    seen = (columns[:, None] >= low[None, :]) & (columns[:, None] <= high[None, :])
    shares = tl.where(seen, tl.exp2(scores - sums[None, :]), 0.0)
    slopes = tl.dot(v, tl.trans(g), input_precision=PRECISION)
    return shares.to(q.dtype), (shares * (slopes - dots[None, :])).to(q.dtype)


@triton.jit
def backward_kernel(
    query, key, value, out, given, log_sums, first, last, reach,
    for_query, for_key, for_value,
    query_row, query_head, key_row, key_head, value_row, value_head, out_row, out_head,
    given_row, given_head, made_row, made_head,
    num_tokens, num_heads, scale, slope_scale,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the gradients of one block's queries, keys and values.

    The pair of the block with itself is looked at once for all three, then the other blocks that
    its queries see, then the other blocks whose queries see its keys.
    """
    block, head = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads
    rows = block * BLOCK + tl.arange(0, BLOCK)
    q, g, sums, dots, low, high = load_side(
        query, out, given, log_sums, first, last, rows, head,
        query_row, query_head, out_row, out_head, given_row, given_head, num_tokens,
        WIDTH, PADDED,
    )  # fmt: skip
    k = load_rows(key + head * key_head, rows, key_row, num_tokens, WIDTH, PADDED)
    v = load_rows(value + head * value_head, rows, value_row, num_tokens, WIDTH, PADDED)
    shares, slopes = shares_and_slopes(
        q, k, v, g, sums, dots, low, high, rows, scale, PRECISION
    )  # fmt: skip
    to_value = tl.dot(shares, g, input_precision=PRECISION)
    to_key = tl.dot(slopes, q, input_precision=PRECISION)
    to_query = tl.dot(tl.trans(slopes), k, input_precision=PRECISION)

    begin = tl.load(reach + block * NUM_ENDS)
    end = tl.load(reach + block * NUM_ENDS + 1)
    for turn in range(begin, end):
        other = turn + (turn >= block).to(tl.int32)  # its own block is done
        columns = other * BLOCK + tl.arange(0, BLOCK)
        k_other = load_rows(key + head * key_head, columns, key_row, num_tokens, WIDTH, PADDED)
        v_other = load_rows(
            value + head * value_head, columns, value_row, num_tokens, WIDTH, PADDED
        )
        _, more = shares_and_slopes(
            q, k_other, v_other, g, sums, dots, low, high, columns, scale, PRECISION
        )
        to_query = tl.dot(tl.trans(more), k_other, to_query, input_precision=PRECISION)
    made = head * made_head
    store_rows(for_query + made, rows, made_row, to_query * slope_scale, num_tokens, WIDTH, PADDED)

    begin = tl.load(reach + block * NUM_ENDS + 2)
    end = tl.load(reach + block * NUM_ENDS + 3)
    for turn in range(begin, end):
        other = turn + (turn >= block).to(tl.int32)
        columns = other * BLOCK + tl.arange(0, BLOCK)
        q_other, g_other, sums_other, dots_other, low_other, high_other = load_side(
            query, out, given, log_sums, first, last, columns, head,
            query_row, query_head, out_row, out_head, given_row, given_head, num_tokens,
            WIDTH, PADDED,
        )  # fmt: skip
        shares_other, slopes_other = shares_and_slopes(
            q_other, k, v, g_other, sums_other, dots_other, low_other, high_other, rows, scale,
            PRECISION,
        )  # fmt: skip
        to_value = tl.dot(shares_other, g_other, to_value, input_precision=PRECISION)
        to_key = tl.dot(slopes_other, q_other, to_key, input_precision=PRECISION)
    store_rows(for_key + made, rows, made_row, to_key * slope_scale, num_tokens, WIDTH, PADDED)
    store_rows(for_value + made, rows, made_row, to_value, num_tokens, WIDTH, PADDED)
