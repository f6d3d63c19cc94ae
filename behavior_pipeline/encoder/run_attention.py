"""Attention in which each token sees one stretch of tokens: an operation for short runs on a GPU.

Runs, causal or not, filler, and padding all come to the same: a token sees the tokens from `first`
to `last`. Queries and keys are normalised and turned on the way. The kernels are in
`block_attention.py`. The operation is opaque to torch.compile, which takes it as it is.

Legend of shapes: N tokens, H heads, W width of a head, an even number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from behavior_pipeline.encoder.layers import NORM_EPSILON

BLOCK: Final = 64
"""Tokens of a block, of queries and of keys. Runs of 33 tokens on average, arranged, look at a
quarter fewer pairs than in blocks of 128, and what the backward pass sums up fits in registers."""

_MIN_WIDTH: Final = 16  # of a tensor core's operands
# Four warps multiply 64 rows together. Most blocks look at one or two: there is nothing to fetch
# ahead. With half of the registers that it would take, the forward pass runs four programs at once.
_FORWARD: Final = {"num_warps": 4, "num_stages": 1, "maxnreg": 128}
_BACKWARD: Final = {"num_warps": 4, "num_stages": 1}

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Stretches:
    """Which tokens each token sees.

    Attributes:
        first: the first token that each sees, (N,) int32.
        last: the last one, (N,) int32; a token sees itself.
        reach: of each block of BLOCK tokens the first and last block that its tokens see, and the
            first and last block whose tokens see it, (ceil(N / BLOCK), 4) int32.
    """

    first: Tensor
    last: Tensor
    reach: Tensor

    @classmethod
    def of(cls, first: Ints, last: Ints) -> Stretches:
        """Find out which blocks see which.

        Args:
            first: as in the attributes; a token's own place or before.
            last: as in the attributes; a token's own place or after.
        """
        starts = np.arange(0, len(first), BLOCK)
        begin = np.minimum.reduceat(first, starts) // BLOCK
        end = np.maximum.reduceat(last, starts) // BLOCK
        blocks = np.arange(len(starts))
        # Whoever sees a block from afar sees all that lies between: the extremes are enough.
        seen_from, seen_until = blocks.copy(), blocks.copy()
        np.maximum.at(seen_until, begin, blocks)
        np.minimum.at(seen_from, end, blocks)
        seen_until = np.maximum.accumulate(seen_until)
        seen_from = np.minimum.accumulate(seen_from[::-1])[::-1]
        reach = np.stack((begin, end, seen_from, seen_until), axis=1)
        return cls(*(torch.from_numpy(part.astype(np.int32)) for part in (first, last, reach)))

    @classmethod
    def of_runs(cls, lengths: Sequence[Ints], sizes: Sequence[int]) -> Stretches:
        """Let runs of the first part see themselves causally, those of the others both ways.

        Args:
            lengths: tokens of each part's runs, from the part's first token on.
            sizes: tokens of each part; those behind its runs are filler and see themselves alone.
        """
        first, last = np.arange(sum(sizes)), np.arange(sum(sizes))
        base = 0
        for number, (each, size) in enumerate(zip(lengths, sizes, strict=True)):
            ends = base + np.cumsum(each)
            filled = slice(base, base + int(each.sum()))
            first[filled] = np.repeat(ends - each, each)
            if number:
                last[filled] = np.repeat(ends - 1, each)
            base += size
        return cls.of(first, last)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Stretches:
        """Return the stretches on a device."""
        how: dict[str, Any] = {"device": device, "non_blocking": non_blocking}
        return Stretches(self.first.to(**how), self.last.to(**how), self.reach.to(**how))

    def pin_memory(self) -> Stretches:
        """Return the stretches in memory that a GPU can fetch from while others work."""
        return Stretches(self.first.pin_memory(), self.last.pin_memory(), self.reach.pin_memory())


def attend_in_stretches(
    whole: Tensor, gains: Tensor | None, turn: tuple[Tensor, Tensor], stretches: Stretches
) -> Tensor:
    """Mix values by attention, each token over its stretch.

    Queries and keys are divided by their root mean square and multiplied by gains, if there are
    any, and turned, as `rotate` does it. Products are summed in float32 whatever the precision.
    Needs a GPU, or Triton's interpreter.

    Args:
        whole: queries, keys and values, (N, 3, H, W).
        gains: of queries and of keys, (2, W).
        turn: cosines and sines of a rotary clock, (N, 1, W / 2) float32 each.
        stretches: which tokens each token sees.

    Returns:
        What is mixed, (N, H, W), in the precision of `whole`.
    """
    parts = (stretches.first, stretches.last, stretches.reach)
    if whole.dtype != torch.float32:
        # Half the bytes, which every head reads again; finer than what is turned (2^-12 to 2^-9).
        turn = turn[0].half(), turn[1].half()
    mixed: Tensor = _attend(whole, gains, *turn, *parts)[0]
    return mixed


def _launch(
    kernel: Any,
    whole: Tensor,
    tensors: list[Tensor],
    steps: list[int],
    *,
    has_norm: bool,
    **how: Any,
) -> None:
    """Start a kernel with a program for every block and head.

    Args:
        kernel: of `block_attention`.
        whole: as in `attend_in_stretches`; the first of what it reads.
        tensors: what else it reads and writes.
        steps: from number to number in those that need not lie side by side.
        has_norm: whether queries and keys are normalised.
        how: further settings.
    """
    num_tokens, _, num_heads, width = whole.shape
    with torch.cuda.device_of(whole):  # type: ignore[no-untyped-call]
        kernel[(-(-num_tokens // BLOCK) * num_heads,)](
            whole, *tensors, *whole.stride()[:3], *steps, num_tokens, num_heads,
            scale=_scale(width),
            epsilon=NORM_EPSILON,
            HALF=width // 2,
            SIDE=_padded(width // 2),
            PADDED=_padded(width),
            BLOCK=BLOCK,
            HAS_NORM=has_norm,
            PRECISION="tf32x3" if whole.dtype == torch.float32 else "tf32",
            **how,
        )  # fmt: skip


def _scale(width: int) -> float:
    """Return what scores are multiplied by: 1 / sqrt(W), and log2 e, as powers are of 2."""
    return math.log2(math.e) / math.sqrt(width)


def _padded(width: int) -> int:
    """Return the power of two that a width is padded to, no less than a tensor core takes."""
    return max(_MIN_WIDTH, 1 << (width - 1).bit_length())


@torch.library.custom_op(
    "behavior_pipeline::attend_in_stretches",
    mutates_args=(),
    schema="(Tensor whole, Tensor? gains, Tensor cosines, Tensor sines, Tensor first, Tensor last,"
    " Tensor reach) -> (Tensor, Tensor)",
)
def _attend(
    whole: Tensor,
    gains: Tensor | None,
    cosines: Tensor,
    sines: Tensor,
    first: Tensor,
    last: Tensor,
    reach: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return what is mixed, (N, H, W), and the log2 of the softmax's sums, (H, N) float32."""
    from behavior_pipeline.encoder import block_attention  # noqa: PLC0415 - needs Triton

    whole = whole.contiguous()
    mixed, sums = _attend_shapes(whole)
    _launch(
        block_attention.forward_kernel,
        whole,
        [
            whole if gains is None else gains.contiguous(), cosines.contiguous(),
            sines.contiguous(), mixed, sums, first, last, reach,
        ],
        list(mixed.stride()[:2]),
        has_norm=gains is not None,
        **_FORWARD,
    )  # fmt: skip
    return mixed, sums


@_attend.register_fake
def _attend_shapes(whole: Tensor, *_others: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return empty tensors of the shapes that `_attend` returns."""
    num_tokens, _, num_heads, width = whole.shape
    sums = whole.new_empty((num_heads, num_tokens), dtype=torch.float32)
    return whole.new_empty((num_tokens, num_heads, width)), sums


@torch.library.custom_op(
    "behavior_pipeline::attend_in_stretches_backward",
    mutates_args=(),
    schema="(Tensor given, Tensor whole, Tensor? gains, Tensor cosines, Tensor sines, Tensor first,"
    " Tensor last, Tensor reach, Tensor mixed, Tensor sums) -> (Tensor, Tensor)",
)
def _attend_backward(
    given: Tensor,
    whole: Tensor,
    gains: Tensor | None,
    cosines: Tensor,
    sines: Tensor,
    first: Tensor,
    last: Tensor,
    reach: Tensor,
    mixed: Tensor,
    sums: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `whole` and of the gains, (2, W); the latter empty without gains."""
    from behavior_pipeline.encoder import block_attention  # noqa: PLC0415 - needs Triton

    whole = whole.contiguous()
    given = given if given.stride(-1) == 1 else given.contiguous()
    made, for_gains = _backward_shapes(given, whole, gains)
    width = whole.shape[3]
    # One row for each program, added up afterwards: in the same order every time.
    num_rows = 0 if gains is None else len(reach) * whole.shape[2]
    rows = sums.new_empty(num_rows, 2, width)
    _launch(
        block_attention.backward_kernel,
        whole,
        [
            whole if gains is None else gains.contiguous(), cosines.contiguous(),
            sines.contiguous(), mixed, given, sums, first, last, reach, made, rows,
        ],
        [*mixed.stride()[:2], *given.stride()[:2]],
        has_norm=gains is not None,
        **_BACKWARD,
    )  # fmt: skip
    return made, for_gains if gains is None else rows.sum(0).to(gains.dtype)


@_attend_backward.register_fake
def _backward_shapes(
    _given: Tensor, whole: Tensor, gains: Tensor | None, *_others: Tensor
) -> tuple[Tensor, Tensor]:
    """Return empty tensors of the shapes that `_attend_backward` returns."""
    for_gains = whole.new_empty(0) if gains is None else gains.new_empty(gains.shape)
    return whole.new_empty(whole.shape), for_gains


def _keep(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep what the backward pass needs."""
    ctx.has_gains = inputs[1] is not None
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _pass_back(ctx: Any, given: Tensor, _for_sums: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of what `_attend` was given."""
    made, for_gains = _attend_backward(given, *ctx.saved_tensors)
    return (made, for_gains if ctx.has_gains else None, None, None, None, None, None)


_attend.register_autograd(_pass_back, setup_context=_keep)
