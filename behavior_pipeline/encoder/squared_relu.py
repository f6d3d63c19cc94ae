"""relu(x W')^2 V' of which only relu(x W')^2 is kept: an operation for training on a GPU.

A product that squares before it writes saves a pass over the widest tensor of a block, and the
backward product the pass that would multiply by the slope of the square; that slope, 2 relu(x W'),
is 2 sqrt of what is kept. The kernel is in `squaring_kernel.py`. The operations are opaque to
torch.compile, which takes them as they are.

Legend of shapes: N tokens, D width, F inner width.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Final

import torch
from torch import Tensor

_ALIGNMENT: Final = 8  # numbers of 2 bytes: rows that the memory accelerator reads begin at 16
_CAPABILITY: Final = (9, 0)  # the first that has one

_FORWARD: Final = {
    "ROWS": 128,
    "COLUMNS": 256,
    "DEPTH": 64,
    "num_warps": 8,
    "num_stages": 3,
    "FLAT": True,
}
_BACKWARD: Final = {
    "ROWS": 128,
    "COLUMNS": 256,
    "DEPTH": 64,
    "num_warps": 8,
    "num_stages": 3,
    "FLAT": True,
}
_BAND: Final = 8


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def has_kernel() -> bool:
    """Tell whether there are Triton and a GPU that the kernel is for."""
    is_there = torch.cuda.is_available() and find_spec("triton") is not None
    return is_there and torch.cuda.get_device_capability() >= _CAPABILITY


def is_suited(x: Tensor, widen: Tensor) -> bool:
    """Tell whether the kernel takes an input (N, D) and weights (F, D): bfloat16, on such a GPU."""
    is_short = widen.dtype == torch.bfloat16 and x.is_cuda
    return is_short and not any(size % _ALIGNMENT for size in widen.shape) and has_kernel()


def squared_feedforward(x: Tensor, widen: Tensor, narrow: Tensor) -> Tensor:
    """Return relu(x W')^2 V', (N, D).

    Args:
        x: (N, D), of the weights' type.
        widen: W, (F, D).
        narrow: V, (D, F).
    """
    out: Tensor = _feedforward(x, widen, narrow)[0]
    return out


def _launch(
    left: Tensor, right: Tensor, squares: Tensor | None, out: Tensor, how: dict[str, int]
) -> None:
    """Write a finished product into `out`, (N, C).

    Args:
        left: (N, K).
        right: (C, K), or backwards (K, C).
        squares: (N, C); None forwards.
        out: (N, C).
        how: tiles and settings.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: PLC0415 - needs Triton

    from behavior_pipeline.encoder.squaring_kernel import product_kernel  # noqa: PLC0415

    (num_rows, depth), num_columns = left.shape, out.shape[1]
    rows, columns, deep = how["ROWS"], how["COLUMNS"], how["DEPTH"]
    num_tiles = -(-num_rows // rows) * -(-num_columns // columns)
    num_programs = min(num_tiles, _num_processors(left) * how.get("per_processor", 1))
    known = out if squares is None else squares
    how = {name: value for name, value in how.items() if name != "per_processor"}
    with torch.cuda.device_of(left):  # type: ignore[no-untyped-call]
        product_kernel[(num_programs,)](
            TensorDescriptor.from_tensor(left, [rows, deep]),
            TensorDescriptor.from_tensor(
                right, [columns, deep] if squares is None else [deep, columns]
            ),
            TensorDescriptor.from_tensor(known, [rows, columns // 2]),
            TensorDescriptor.from_tensor(out, [rows, columns // 2]),
            num_rows, num_columns, depth, num_programs,
            BAND=_BAND, IS_BACKWARD=squares is not None, **how,
        )  # fmt: skip


def _num_processors(x: Tensor) -> int:
    """Return the multiprocessors of a tensor's device; in Triton's interpreter two."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2


@torch.library.custom_op(
    "behavior_pipeline::squared_feedforward",
    mutates_args=(),
    schema="(Tensor x, Tensor widen, Tensor narrow) -> (Tensor, Tensor)",
)
def _feedforward(x: Tensor, widen: Tensor, narrow: Tensor) -> tuple[Tensor, Tensor]:
    """Return relu(x W')^2 V', (N, D), and relu(x W')^2, (N, F)."""
    squares = x.new_empty((len(x), len(widen)))
    _launch(x.contiguous(), widen.contiguous(), None, squares, _FORWARD)
    return squares @ narrow.T, squares


@_feedforward.register_fake
def _feedforward_shapes(x: Tensor, widen: Tensor, _narrow: Tensor) -> tuple[Tensor, Tensor]:
    """Return empty tensors of the shapes that `_feedforward` returns."""
    return x.new_empty(x.shape), x.new_empty((len(x), len(widen)))


@torch.library.custom_op(
    "behavior_pipeline::squared_feedforward_slopes",
    mutates_args=(),
    schema="(Tensor given, Tensor narrow, Tensor squares) -> Tensor",
)
def _slopes(given: Tensor, narrow: Tensor, squares: Tensor) -> Tensor:
    """Return the gradient of x W', (N, F), from that of the result, (N, D)."""
    made = torch.empty_like(squares)
    _launch(given.contiguous(), narrow.contiguous(), squares, made, _BACKWARD)
    return made


@_slopes.register_fake
def _slopes_shape(_given: Tensor, _narrow: Tensor, squares: Tensor) -> Tensor:
    """Return an empty tensor of the shape that `_slopes` returns."""
    return torch.empty_like(squares)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep what the backward pass needs."""
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])


def _pass_back(ctx: Any, given: Tensor, _for_squares: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of x, W and V."""
    x, widen, narrow, squares = ctx.saved_tensors
    made = _slopes(given, narrow, squares)
    return made @ widen, made.T @ x, given.T @ squares


_feedforward.register_autograd(_pass_back, setup_context=_keep)
