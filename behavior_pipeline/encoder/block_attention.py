"""Triton kernels of attention over stretches: each token sees one stretch of tokens around it.

A block of tokens and a head are one program. It looks at the few blocks in which its tokens'
stretches lie, its own alone where runs are short, so that short runs share the tiles that would
else be each one's own. Softmax is online (Milakov and Gimelshein 2018), the backward pass computes
its scores again from the log-sum-exp (Dao et al. 2022, "FlashAttention", algorithm 4). Each program
alone writes the gradients of its block: no atomic additions, the same bits every time.

Queries and keys are normalised and turned where they are loaded, which saves the passes over memory
of doing so before. A turn mixes number i of a head with number i + half: the halves of queries and
keys are held apart, and a score is the sum of two products.

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
    """Return both halves (B, SIDE) float32 of rows over their root mean square, and 1 over that."""
    left = load_rows(start, rows, stride, num_tokens, HALF, SIDE).to(tl.float32)
    right = load_rows(start + HALF, rows, stride, num_tokens, HALF, SIDE).to(tl.float32)
    rate = tl.full((rows.shape[0],), 1.0, tl.float32)
    if HAS_NORM:
        squares = tl.sum(left * left, 1) + tl.sum(right * right, 1)
        rate = tl.rsqrt(squares / (2 * HALF) + epsilon)
        left = left * rate[:, None]
        right = right * rate[:, None]
    return left, right, rate


@triton.jit
def load_turned(
    start, gains, cosines, sines, rows, stride, num_tokens, epsilon,
    HALF: tl.constexpr, SIDE: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """Return both halves (B, SIDE) of rows, normalised and turned, in their own precision."""
    left, right, _ = load_sides(start, rows, stride, num_tokens, epsilon, HALF, SIDE, HAS_NORM)
    if HAS_NORM:
        left_gains, right_gains = load_gains(gains, HALF, SIDE)
        left = left * left_gains
        right = right * right_gains
    cosine = load_rows(cosines, rows, HALF, num_tokens, HALF, SIDE)
    sine = load_rows(sines, rows, HALF, num_tokens, HALF, SIDE)
    turned_left = left * cosine - right * sine
    turned_right = left * sine + right * cosine
    kind = start.dtype.element_ty
    return turned_left.to(kind), turned_right.to(kind)


@triton.jit
def store_turned_back(
    start, made, gains, for_gains, cosines, sines, rows, stride, num_tokens, epsilon, left, right,
    HALF: tl.constexpr, SIDE: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """Write the gradients of rows and gains from those (B, SIDE) of what `load_turned` made.

    With n = x / rms(x) and y = n g: the gradient of x is (d - n mean(d n)) / rms(x), d = g dy, that
    of the gains the sum over rows of dy n.
    """
    cosine = load_rows(cosines, rows, HALF, num_tokens, HALF, SIDE)
    sine = load_rows(sines, rows, HALF, num_tokens, HALF, SIDE)
    to_left = left * cosine + right * sine
    to_right = right * cosine - left * sine
    if HAS_NORM:
        n_left, n_right, rate = load_sides(
            start, rows, stride, num_tokens, epsilon, HALF, SIDE, HAS_NORM
        )
        columns = tl.arange(0, SIDE)
        tl.store(for_gains + columns, tl.sum(to_left * n_left, 0), mask=columns < HALF)
        tl.store(for_gains + HALF + columns, tl.sum(to_right * n_right, 0), mask=columns < HALF)
        left_gains, right_gains = load_gains(gains, HALF, SIDE)
        to_left = to_left * left_gains
        to_right = to_right * right_gains
        mean = (tl.sum(to_left * n_left, 1) + tl.sum(to_right * n_right, 1)) / (2 * HALF)
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
    low, high = load_stretch(first, last, rows, num_tokens)
    q_left, q_right = load_turned(
        query, gains, cosines, sines, rows, whole_row, num_tokens, epsilon, HALF, SIDE, HAS_NORM
    )
    highest = tl.full((BLOCK,), HIDDEN, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    mixed = tl.zeros((BLOCK, PADDED), tl.float32)
    begin = tl.load(reach + block * NUM_ENDS)
    end = tl.load(reach + block * NUM_ENDS + 1)
    for other in range(begin, end + 1):
        columns = other * BLOCK + tl.arange(0, BLOCK)
        k_left, k_right = load_turned(
            key, gains + 2 * HALF, cosines, sines, columns, whole_row, num_tokens, epsilon,
            HALF, SIDE, HAS_NORM,
        )  # fmt: skip
        v = load_rows(value, columns, whole_row, num_tokens, 2 * HALF, PADDED)
        scores = tl.dot(q_left, tl.trans(k_left), input_precision=PRECISION)
        scores = tl.dot(q_right, tl.trans(k_right), scores, input_precision=PRECISION) * scale
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
    place = log_sums + head.to(tl.int64) * num_tokens + rows
    return g, dots, tl.load(place, mask=rows < num_tokens, other=0.0)


@triton.jit
def shares_and_slopes(
    q_left, q_right, k_left, k_right, v, g, dots, sums, low, high, columns, scale,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the softmax's shares and its scores' gradients; transposed, a row for each key."""
    scores = tl.dot(k_left, tl.trans(q_left), input_precision=PRECISION)
    scores = tl.dot(k_right, tl.trans(q_right), scores, input_precision=PRECISION) * scale
    seen = (columns[:, None] >= low[None, :]) & (columns[:, None] <= high[None, :])
    shares = tl.where(seen, tl.exp2(scores - sums[None, :]), 0.0)
    slopes = tl.dot(v, tl.trans(g), input_precision=PRECISION)
    return shares.to(v.dtype), (shares * (slopes - dots[None, :])).to(v.dtype)


@triton.jit
def backward_kernel(
    whole, gains, cosines, sines, out, given, log_sums, first, last, reach, made, for_gains,
    whole_row, whole_part, whole_head, out_row, out_head, given_row, given_head,
    num_tokens, num_heads, scale, epsilon, slope_scale,
    HALF: tl.constexpr, SIDE: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
    HAS_NORM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the gradients of one block's queries, keys and values; `made` lies like `whole`.

    First what the block's queries see, then whose queries see its keys. The pair of the block with
    itself is looked at in both: holding all three sums at once would take more registers than
    there are.
    """
    block, head = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads
    query = whole + head * whole_head
    key, value = query + whole_part, query + 2 * whole_part
    key_gains = gains + 2 * HALF
    to_query = made + head * whole_head
    sums_of_gains = for_gains + (block * num_heads + head).to(tl.int64) * (4 * HALF)
    rows = block * BLOCK + tl.arange(0, BLOCK)

    low, high = load_stretch(first, last, rows, num_tokens)
    q_left, q_right = load_turned(
        query, gains, cosines, sines, rows, whole_row, num_tokens, epsilon, HALF, SIDE, HAS_NORM
    )
    g, dots, sums = load_given(
        out, given, log_sums, rows, head, out_row, out_head, given_row, given_head, num_tokens,
        2 * HALF, PADDED,
    )  # fmt: skip
    to_left = tl.zeros((BLOCK, SIDE), tl.float32)
    to_right = tl.zeros((BLOCK, SIDE), tl.float32)
    begin = tl.load(reach + block * NUM_ENDS)
    end = tl.load(reach + block * NUM_ENDS + 1)
    for other in range(begin, end + 1):
        columns = other * BLOCK + tl.arange(0, BLOCK)
        left, right = load_turned(
            key, key_gains, cosines, sines, columns, whole_row, num_tokens, epsilon,
            HALF, SIDE, HAS_NORM,
        )  # fmt: skip
        v_other = load_rows(value, columns, whole_row, num_tokens, 2 * HALF, PADDED)
        _, slopes = shares_and_slopes(
            q_left, q_right, left, right, v_other, g, dots, sums, low, high, columns, scale,
            PRECISION,
        )  # fmt: skip
        to_left = tl.dot(tl.trans(slopes), left, to_left, input_precision=PRECISION)
        to_right = tl.dot(tl.trans(slopes), right, to_right, input_precision=PRECISION)
    store_turned_back(
        query, to_query, gains, sums_of_gains, cosines, sines, rows, whole_row, num_tokens,
        epsilon, to_left * slope_scale, to_right * slope_scale, HALF, SIDE, HAS_NORM,
    )  # fmt: skip

    k_left, k_right = load_turned(
        key, key_gains, cosines, sines, rows, whole_row, num_tokens, epsilon, HALF, SIDE, HAS_NORM
    )
    v = load_rows(value, rows, whole_row, num_tokens, 2 * HALF, PADDED)
    to_k_left = tl.zeros((BLOCK, SIDE), tl.float32)
    to_k_right = tl.zeros((BLOCK, SIDE), tl.float32)
    to_value = tl.zeros((BLOCK, PADDED), tl.float32)
    first_seen_from = tl.load(reach + block * NUM_ENDS + 2)
    last_seen_from = tl.load(reach + block * NUM_ENDS + 3)
    for seer in range(first_seen_from, last_seen_from + 1):
        places = seer * BLOCK + tl.arange(0, BLOCK)
        seer_left, seer_right = load_turned(
            query, gains, cosines, sines, places, whole_row, num_tokens, epsilon,
            HALF, SIDE, HAS_NORM,
        )  # fmt: skip
        g_seer, dots_seer, sums_seer = load_given(
            out, given, log_sums, places, head, out_row, out_head, given_row, given_head,
            num_tokens, 2 * HALF, PADDED,
        )  # fmt: skip
        low_seer, high_seer = load_stretch(first, last, places, num_tokens)
        shares, slopes_seer = shares_and_slopes(
            seer_left, seer_right, k_left, k_right, v, g_seer, dots_seer, sums_seer, low_seer,
            high_seer, rows, scale, PRECISION,
        )  # fmt: skip
        to_value = tl.dot(shares, g_seer, to_value, input_precision=PRECISION)
        to_k_left = tl.dot(slopes_seer, seer_left, to_k_left, input_precision=PRECISION)
        to_k_right = tl.dot(slopes_seer, seer_right, to_k_right, input_precision=PRECISION)
    store_turned_back(
        key, to_query + whole_part, key_gains, sums_of_gains + 2 * HALF, cosines, sines, rows,
        whole_row, num_tokens, epsilon, to_k_left * slope_scale, to_k_right * slope_scale,
        HALF, SIDE, HAS_NORM,
    )  # fmt: skip
    store_rows(to_query + 2 * whole_part, rows, whole_row, to_value, num_tokens, 2 * HALF, PADDED)
