"""Triton kernels of attention over stretches: each token sees one stretch of tokens around it.

A block of tokens and a head are one program. It looks at the few blocks in which its tokens'
stretches lie, its own alone where runs are short, so that short runs share the tiles that would
else be each one's own. Softmax is online (Milakov and Gimelshein 2018), the backward pass computes
its scores again from the log-sum-exp (Dao et al. 2022, "FlashAttention", algorithm 4). Each program
alone writes the gradients of its block: no atomic additions, the same bits every time.

Queries and keys are normalised and turned where they are loaded, which saves the passes over memory
of doing so before. A turn mixes number i of a head with number i + half: halves are loaded apart,
turned, and put side by side.

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
NOWHERE = tl.constexpr(1 << 30)  # the place of a token that there is not
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def same(block, known):
    """Return a block's number once more, given a number of a block.

    The compiler cannot tell that it is the same: else it would keep in registers, from one use of
    the block's rows to the next, all that it read and where, and there are not enough.
    """
    return tl.where(known >= 0, block, known)


@triton.jit
def place_rows(rows, stride, PADDED: tl.constexpr):
    """Return where (B, PADDED) numbers of rows lie, `stride` from row to row."""
    return rows.to(tl.int64)[:, None] * stride + tl.arange(0, PADDED)[None, :]


@triton.jit
def load_rows(start, rows, stride, num_tokens, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Return rows (B, PADDED) of (N, WIDTH) numbers, zeros beyond the width.

    A row beyond the end is the last one: nobody sees it, and it sees nobody.
    """
    places = start + place_rows(tl.minimum(rows, num_tokens - 1), stride, PADDED)
    if WIDTH == PADDED:
        return tl.load(places)
    return tl.load(places, mask=(tl.arange(0, PADDED) < WIDTH)[None, :], other=0.0)


@triton.jit
def store_rows(start, rows, stride, values, num_tokens, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Write rows (B, PADDED) where `load_rows` reads them; none beyond the end."""
    inside = (rows < num_tokens)[:, None] & (tl.arange(0, PADDED) < WIDTH)[None, :]
    places = start + place_rows(rows, stride, PADDED)
    tl.store(places, values.to(start.dtype.element_ty), mask=inside)


@triton.jit
def load_stretch(first, last, rows, num_tokens):
    """Return the first token that each row sees and how many more; none beyond the end."""
    safe = tl.minimum(rows, num_tokens - 1)
    low = tl.load(first + safe)
    more = tl.load(last + safe) - low
    return tl.where(rows < num_tokens, low, NOWHERE), more


@triton.jit
def is_seen(low, more, columns):
    """Return which tokens (C,) each row sees, (B, C)."""
    ahead = columns[None, :] - low[:, None]
    return ahead.to(tl.uint32, bitcast=True) <= more.to(tl.uint32, bitcast=True)[:, None]


@triton.jit
def side_by_side(left, right):
    """Return (B, 2 SIDE) of halves (B, SIDE)."""
    both = tl.permute(tl.join(left, right), (0, 2, 1))
    return tl.reshape(both, (left.shape[0], 2 * left.shape[1]))


@triton.jit
def apart(both):
    """Return halves (B, SIDE) of (B, 2 SIDE)."""
    halves = tl.reshape(both, (both.shape[0], 2, both.shape[1] // 2))
    return tl.split(tl.permute(halves, (0, 2, 1)))


@triton.jit
def load_gains(gains, HALF: tl.constexpr, SIDE: tl.constexpr):
    """Return both halves (1, SIDE) float32 of a norm's gains."""
    columns = tl.arange(0, SIDE)
    left = tl.load(gains + columns, mask=columns < HALF, other=0.0)
    right = tl.load(gains + HALF + columns, mask=columns < HALF, other=0.0)
    return left.to(tl.float32)[None, :], right.to(tl.float32)[None, :]


@triton.jit
def load_sides(
    start, rows, stride, num_tokens, epsilon,
    HALF: tl.constexpr, SIDE: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """Return both halves (B, SIDE) float32 of rows, and 1 over their root mean square, (B,)."""
    left = load_rows(start, rows, stride, num_tokens, HALF, SIDE).to(tl.float32)
    right = load_rows(start + HALF, rows, stride, num_tokens, HALF, SIDE).to(tl.float32)
    rate = tl.full((rows.shape[0],), 1.0, tl.float32)
    if HAS_NORM:
        squares = tl.sum(left * left + right * right, 1)
        rate = tl.rsqrt(squares * (0.5 / HALF) + epsilon)
    return left, right, rate


@triton.jit
def load_turned(
    start, gains, cosines, sines, rows, stride, num_tokens, epsilon, scale,
    HALF: tl.constexpr, SIDE: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """Return rows (B, 2 SIDE), normalised, turned and scaled, in their own precision."""
    left, right, rate = load_sides(start, rows, stride, num_tokens, epsilon, HALF, SIDE, HAS_NORM)
    if HAS_NORM:
        left_gains, right_gains = load_gains(gains, HALF, SIDE)
        left = left * left_gains
        right = right * right_gains
    cosine = load_rows(cosines, rows, HALF, num_tokens, HALF, SIDE).to(tl.float32)
    sine = load_rows(sines, rows, HALF, num_tokens, HALF, SIDE).to(tl.float32)
    rate = (rate * scale)[:, None]
    turned_left = (left * cosine - right * sine) * rate
    turned_right = (left * sine + right * cosine) * rate
    kind = start.dtype.element_ty
    return side_by_side(turned_left.to(kind), turned_right.to(kind))


@triton.jit
def store_turned_back(
    start, made, gains, for_gains, cosines, sines, rows, stride, num_tokens, epsilon, given,
    HALF: tl.constexpr, SIDE: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """Write the gradients of rows and gains from those (B, 2 SIDE) of what `load_turned` made.

    With n = x / rms(x) and y = n g: the gradient of x is (d - n mean(d n)) / rms(x), d = g dy, that
    of the gains the sum over rows of dy n.
    """
    left, right = apart(given)
    cosine = load_rows(cosines, rows, HALF, num_tokens, HALF, SIDE).to(tl.float32)
    sine = load_rows(sines, rows, HALF, num_tokens, HALF, SIDE).to(tl.float32)
    to_left = left * cosine + right * sine
    to_right = right * cosine - left * sine
    if HAS_NORM:
        n_left, n_right, rate = load_sides(
            start, rows, stride, num_tokens, epsilon, HALF, SIDE, HAS_NORM
        )
        n_left = n_left * rate[:, None]
        n_right = n_right * rate[:, None]
        columns = tl.arange(0, SIDE)[:, None]
        places = columns + tl.arange(0, 2)[None, :] * HALF
        sums = tl.sum(tl.join(to_left * n_left, to_right * n_right), 0)
        tl.store(for_gains + places, sums, mask=columns < HALF)
        left_gains, right_gains = load_gains(gains, HALF, SIDE)
        to_left = to_left * left_gains
        to_right = to_right * right_gains
        mean = tl.sum(to_left * n_left + to_right * n_right, 1) * (0.5 / HALF)
        to_left = (to_left - n_left * mean[:, None]) * rate[:, None]
        to_right = (to_right - n_right * mean[:, None]) * rate[:, None]
    store_rows(made, rows, stride, to_left, num_tokens, HALF, SIDE)
    store_rows(made + HALF, rows, stride, to_right, num_tokens, HALF, SIDE)


@triton.jit
def forward_kernel(
    whole, gains, cosines, sines, out, log_sums, first, last, reach,
    whole_row, whole_part, whole_head, out_row, out_head,
    num_tokens, num_heads, scale, epsilon,
    HALF: tl.constexpr, SIDE: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
    HAS_NORM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write out = softmax(scores) value and log2 sum exp2(scores), scores = scale query key'."""
    block, head = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads
    query = whole + head * whole_head
    key, value = query + whole_part, query + 2 * whole_part
    rows = block * BLOCK + tl.arange(0, BLOCK)
    low, more = load_stretch(first, last, rows, num_tokens)
    begin = tl.load(reach + block * NUM_ENDS)
    end = tl.load(reach + block * NUM_ENDS + 1)
    q = load_turned(
        query, gains, cosines, sines, rows, whole_row, num_tokens, epsilon, scale,
        HALF, SIDE, HAS_NORM,
    )  # fmt: skip
    highest = tl.full((BLOCK,), HIDDEN, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    mixed = tl.zeros((BLOCK, PADDED), tl.float32)
    for other in range(begin, end + 1):
        columns = other * BLOCK + tl.arange(0, BLOCK)
        k = load_turned(
            key, gains + 2 * HALF, cosines, sines, columns, whole_row, num_tokens, epsilon, 1.0,
            HALF, SIDE, HAS_NORM,
        )  # fmt: skip
        v = load_rows(value, columns, whole_row, num_tokens, 2 * HALF, PADDED)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scores = tl.where(is_seen(low, more, columns), scores, HIDDEN)
        higher = tl.maximum(highest, tl.max(scores, 1))
        shares = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(shares, 1)
        mixed = mixed * shrink[:, None]
        mixed = tl.dot(shares.to(v.dtype), v, mixed, input_precision=PRECISION)
        highest = higher
    mixed = mixed * (1.0 / total)[:, None]
    store_rows(out + head * out_head, rows, out_row, mixed, num_tokens, 2 * HALF, PADDED)
    sums = highest + tl.log2(total)
    tl.store(log_sums + head.to(tl.int64) * num_tokens + rows, sums, mask=rows < num_tokens)


@triton.jit
def load_given(
    out, given, log_sums, rows, head, out_row, out_head, given_row, given_head, num_tokens,
    WIDTH: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Return gradients of what was mixed, their row sums times what was mixed, and log sums."""
    g = load_rows(given + head * given_head, rows, given_row, num_tokens, WIDTH, PADDED)
    o = load_rows(out + head * out_head, rows, out_row, num_tokens, WIDTH, PADDED)
    dots = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    place = log_sums + head.to(tl.int64) * num_tokens
    return g, dots, tl.load(place + tl.minimum(rows, num_tokens - 1))


@triton.jit
def shares_and_slopes(
    q, k, v, g, dots, sums, low, more, columns, PRECISION: tl.constexpr
):  # fmt: skip
    """Return the softmax's shares and its scores' gradients, a row for each query."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    slopes = tl.dot(g, tl.trans(v), input_precision=PRECISION)
    shares = tl.exp2(scores - sums[:, None])
    shares = tl.where(is_seen(low, more, columns), shares, 0.0)
    return shares.to(v.dtype), (shares * (slopes - dots[:, None])).to(v.dtype)


@triton.jit
def backward_kernel(
    whole, gains, cosines, sines, out, given, log_sums, first, last, reach, made, for_gains,
    whole_row, whole_part, whole_head, out_row, out_head, given_row, given_head,
    num_tokens, num_heads, scale, epsilon,
    HALF: tl.constexpr, SIDE: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
    HAS_NORM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the gradients of one block's queries, keys and values; `made` lies like `whole`.

    First the queries of other blocks that see its keys, then the block with itself, once for all
    three gradients, then what its queries see of other blocks: no more than two sums at a time.
    """
    block, head = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads
    query = whole + head * whole_head
    key, value = query + whole_part, query + 2 * whole_part
    key_gains = gains + 2 * HALF
    to_whole = made + head * whole_head
    sums_of_gains = for_gains + (block * num_heads + head).to(tl.int64) * (4 * HALF)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    ends = reach + block * NUM_ENDS
    begin, end = tl.load(ends), tl.load(ends + 1)
    first_seer, last_seer = tl.load(ends + 2), tl.load(ends + 3)

    k = load_turned(
        key, key_gains, cosines, sines, rows, whole_row, num_tokens, epsilon, 1.0,
        HALF, SIDE, HAS_NORM,
    )  # fmt: skip
    v = load_rows(value, rows, whole_row, num_tokens, 2 * HALF, PADDED)
    to_key = tl.zeros((BLOCK, 2 * SIDE), tl.float32)
    to_value = tl.zeros((PADDED, BLOCK), tl.float32)
    for place in range(first_seer, last_seer):
        seers = (place + (place >= block).to(tl.int32)) * BLOCK + tl.arange(0, BLOCK)
        q_seer = load_turned(
            query, gains, cosines, sines, seers, whole_row, num_tokens, epsilon, scale,
            HALF, SIDE, HAS_NORM,
        )  # fmt: skip
        g_seer, dots_seer, sums_seer = load_given(
            out, given, log_sums, seers, head, out_row, out_head, given_row, given_head,
            num_tokens, 2 * HALF, PADDED,
        )  # fmt: skip
        low_seer, more_seer = load_stretch(first, last, seers, num_tokens)
        shares, slopes = shares_and_slopes(
            q_seer, k, v, g_seer, dots_seer, sums_seer, low_seer, more_seer, rows, PRECISION
        )
        to_value = tl.dot(tl.trans(g_seer), shares, to_value, input_precision=PRECISION)
        to_key = tl.dot(tl.trans(slopes), q_seer, to_key, input_precision=PRECISION)

    rows = same(block, first_seer) * BLOCK + tl.arange(0, BLOCK)
    low, more = load_stretch(first, last, rows, num_tokens)
    q = load_turned(
        query, gains, cosines, sines, rows, whole_row, num_tokens, epsilon, scale,
        HALF, SIDE, HAS_NORM,
    )  # fmt: skip
    g, dots, sums = load_given(
        out, given, log_sums, rows, head, out_row, out_head, given_row, given_head, num_tokens,
        2 * HALF, PADDED,
    )  # fmt: skip
    shares, slopes = shares_and_slopes(q, k, v, g, dots, sums, low, more, rows, PRECISION)
    to_value = tl.dot(tl.trans(g), shares, to_value, input_precision=PRECISION)
    rows = same(block, last_seer) * BLOCK + tl.arange(0, BLOCK)
    store_rows(
        to_whole + 2 * whole_part, rows, whole_row, tl.trans(to_value), num_tokens, 2 * HALF, PADDED
    )
    to_key = tl.dot(tl.trans(slopes), q, to_key, input_precision=PRECISION)
    store_turned_back(
        key, to_whole + whole_part, key_gains, sums_of_gains + 2 * HALF, cosines, sines, rows,
        whole_row, num_tokens, epsilon, to_key * LN_2, HALF, SIDE, HAS_NORM,
    )  # fmt: skip

    to_query = tl.dot(slopes, k, input_precision=PRECISION)
    for place in range(begin, end):
        columns = (place + (place >= block).to(tl.int32)) * BLOCK + tl.arange(0, BLOCK)
        k_other = load_turned(
            key, key_gains, cosines, sines, columns, whole_row, num_tokens, epsilon, 1.0,
            HALF, SIDE, HAS_NORM,
        )  # fmt: skip
        v_other = load_rows(value, columns, whole_row, num_tokens, 2 * HALF, PADDED)
        _, slopes = shares_and_slopes(
            q, k_other, v_other, g, dots, sums, low, more, columns, PRECISION
        )
        to_query = tl.dot(slopes, k_other, to_query, input_precision=PRECISION)
    rows = same(block, begin) * BLOCK + tl.arange(0, BLOCK)
    store_turned_back(
        query, to_whole, gains, sums_of_gains, cosines, sines, rows, whole_row, num_tokens,
        epsilon, to_query * (scale * LN_2), HALF, SIDE, HAS_NORM,
    )  # fmt: skip
