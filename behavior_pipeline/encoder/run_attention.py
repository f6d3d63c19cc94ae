"""Attention in which each token sees one stretch of tokens: an operation for short runs on a GPU.

Runs, causal or not, filler, and padding all come to the same: a token sees the tokens from `first`
to `last`. The kernels are in `block_attention.py`. The operation is opaque to torch.compile, which
takes it into its graph as it is.

Legend of shapes: N tokens, H heads, W width of a head, B tokens of a block.
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

BLOCK: Final = 64
"""Tokens of a block, of queries and of keys. Runs of 33 tokens on average, arranged, look at a
quarter fewer pairs than in blocks of 128, and what the backward pass sums up fits in registers."""

_MIN_WIDTH: Final = 16  # of a tensor core's operands
_WARPS: Final = 4  # one group of four multiplies 64 rows
_STAGES: Final = 1  # most blocks look at one or two: there is nothing to fetch ahead

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


def attend_in_stretches(query: Tensor, key: Tensor, value: Tensor, stretches: Stretches) -> Tensor:
    """Mix values by attention, each token over its stretch; all (N, H, W), in one precision.

    Products are summed in float32 whatever the precision. Needs a GPU, or Triton's interpreter.
    """
    parts = (stretches.first, stretches.last, stretches.reach)
    mixed: Tensor = _attend(query, key, value, *parts)[0]
    return mixed


def _launch(
    kernel: Any, like: Tensor, tensors: list[Tensor], rows: list[Tensor], *scales: float
) -> None:
    """Start a kernel with a program for every block and head.

    Args:
        kernel: of `block_attention`.
        like: what is attended with, (N, H, W).
        tensors: what it reads and writes.
        rows: (N, H, W) each, in whose memory its steps from token to token and head to head lie.
        scales: further numbers.
    """
    num_tokens, num_heads, width = like.shape
    steps = [step for each in rows for step in each.stride()[:2]]
    with torch.cuda.device_of(like):  # type: ignore[no-untyped-call]
        kernel[(-(-num_tokens // BLOCK) * num_heads,)](
            *tensors, *steps, num_tokens, num_heads, *scales,
            WIDTH=width,
            PADDED=max(_MIN_WIDTH, 1 << (width - 1).bit_length()),
            BLOCK=BLOCK,
            PRECISION="tf32x3" if like.dtype == torch.float32 else "tf32",
            num_warps=_WARPS,
            num_stages=_STAGES,
        )  # fmt: skip


def _scale(query: Tensor) -> float:
    """Return what scores are multiplied by: 1 / sqrt(W), and log2 e, as powers are of 2."""
    return math.log2(math.e) / math.sqrt(query.shape[-1])


def _in_rows(part: Tensor) -> Tensor:
    """Return (N, H, W) numbers with those of a head side by side, in place if they are so."""
    return part if part.stride(-1) == 1 else part.contiguous()


@torch.library.custom_op(
    "behavior_pipeline::attend_in_stretches",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor first, Tensor last, Tensor reach)"
    " -> (Tensor, Tensor)",
)
def _attend(
    query: Tensor, key: Tensor, value: Tensor, first: Tensor, last: Tensor, reach: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what is mixed, (N, H, W), and the log2 of the softmax's sums, (H, N) float32."""
    from behavior_pipeline.encoder import block_attention  # noqa: PLC0415 - needs Triton

    query, key, value = (_in_rows(part) for part in (query, key, value))
    mixed, sums = _attend_shapes(query, key, value, first, last, reach)
    rows = [query, key, value, mixed]
    tensors = [*rows, sums, first, last, reach]
    _launch(block_attention.forward_kernel, query, tensors, rows, _scale(query))
    return mixed, sums


@_attend.register_fake
def _attend_shapes(
    query: Tensor, _key: Tensor, _value: Tensor, _first: Tensor, _last: Tensor, _reach: Tensor
) -> tuple[Tensor, Tensor]:
    """Return empty tensors of the shapes that `_attend` returns."""
    sums = query.new_empty(query.shape[1::-1], dtype=torch.float32)
    return query.new_empty(query.shape), sums


@torch.library.custom_op(
    "behavior_pipeline::attend_in_stretches_backward",
    mutates_args=(),
    schema="(Tensor given, Tensor query, Tensor key, Tensor value, Tensor mixed, Tensor sums,"
    " Tensor first, Tensor last, Tensor reach) -> (Tensor, Tensor, Tensor)",
)
def _attend_backward(
    given: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mixed: Tensor,
    sums: Tensor,
    first: Tensor,
    last: Tensor,
    reach: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, (N, H, W) each."""
    from behavior_pipeline.encoder import block_attention  # noqa: PLC0415 - needs Triton

    query, key, value, given = (_in_rows(part) for part in (query, key, value, given))
    made: tuple[Tensor, Tensor, Tensor]
    made = _backward_shapes(given, query, key, value, mixed, sums, first, last, reach)
    rows = [query, key, value, mixed, given]
    scale = _scale(query)
    _launch(
        block_attention.backward_kernel,
        query,
        [*rows, sums, first, last, reach, *made],
        [*rows, made[0]],
        scale,
        scale * math.log(2),
    )
    return made


@_attend_backward.register_fake
def _backward_shapes(
    _given: Tensor, query: Tensor, *_others: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return empty tensors of the shapes that `_attend_backward` returns."""
    return query.new_empty(query.shape), query.new_empty(query.shape), query.new_empty(query.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep what the backward pass needs."""
    query, key, value, *stretches = inputs
    ctx.save_for_backward(query, key, value, *output, *stretches)
    ctx.mark_non_differentiable(output[1])


def _pass_back(ctx: Any, given: Tensor, _for_sums: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of what `_attend` was given."""
    return (*_attend_backward(given, *ctx.saved_tensors), None, None, None)


_attend.register_autograd(_pass_back, setup_context=_keep)
