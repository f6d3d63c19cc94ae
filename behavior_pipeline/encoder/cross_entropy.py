"""Exact cross-entropy over a large vocabulary without ever holding the logits (N, V).

The rows are taken a chunk at a time: forwards only the log of each row's sum is kept, backwards the
chunk's logits are made again. That costs one more product with the table and saves 2 N V numbers:
with 8,192 predictions over 200,000 values 6.5 GB in float32, and as much again for the gradient.

Legend of shapes: N predictions, W width, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import Tensor

MAX_LOGITS: Final = 2**25
"""Logits that exist at once, at the most: 128 MiB in float32."""


def chunked_cross_entropy(
    hidden: Tensor,
    table: Tensor,
    bias: Tensor,
    targets: Tensor,
    max_logits: int = MAX_LOGITS,
) -> Tensor:
    """Return -log softmax(hidden table^T + bias)[target] of each row, (N,) float32.

    Under autocast products are made in its type, sums always in float32, as
    `torch.nn.functional.cross_entropy` does. Rows that do not count are left to the caller: a loss
    multiplied by 0 gives them no gradient.

    Args:
        hidden: (N, W).
        table: (V, W).
        bias: (V,).
        targets: (N,) int64 in [0, V).
        max_logits: numbers in a chunk of logits at the most; at least one row is taken.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, table, bias = (part.to(dtype) for part in (hidden, table, bias))
    function: Any = _ChunkedCrossEntropy  # torch leaves `apply` without types
    losses: Tensor = function.apply(hidden, table, bias, targets, max_logits)
    return losses


def _chunks(num_rows: int, num_values: int, max_logits: int) -> Iterator[slice]:
    """Yield the rows of each chunk."""
    size = max(1, max_logits // num_values)
    for begin in range(0, num_rows, size):
        yield slice(begin, min(begin + size, num_rows))


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The loss of each row, with logits made again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, table: Tensor, bias: Tensor, targets: Tensor, max_logits: int
    ) -> Tensor:
        """Return losses (N,) float32; keep the logs of the rows' sums."""
        log_sums, losses = [], []
        for rows in _chunks(len(hidden), len(table), max_logits):
            logits = F.linear(hidden[rows], table, bias).float()
            log_sums.append(torch.logsumexp(logits, 1))
            losses.append(log_sums[-1] - logits.gather(1, targets[rows, None]).squeeze(1))
        log_sum = torch.cat(log_sums) if log_sums else hidden.new_zeros(0, dtype=torch.float32)
        ctx.save_for_backward(hidden, table, bias, targets, log_sum)
        ctx.max_logits = max_logits
        return torch.cat(losses) if losses else log_sum.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """Return the gradients of hidden, table and bias: softmax minus target, times the loss's.

        Those of table and bias are summed over chunks in float32.
        """
        hidden, table, bias, targets, log_sum = ctx.saved_tensors
        by_row: list[Tensor] = []
        table_grad = torch.zeros_like(table, dtype=torch.float32)
        bias_grad = torch.zeros_like(bias, dtype=torch.float32)
        for rows in _chunks(len(hidden), len(table), ctx.max_logits):
            logits = F.linear(hidden[rows], table, bias).float()
            slope = torch.exp(logits - log_sum[rows, None])
            slope.scatter_add_(1, targets[rows, None], slope.new_full((len(slope), 1), -1.0))
            slope = (slope * grads[0][rows, None].float()).to(hidden.dtype)
            by_row.append(slope @ table)
            table_grad += (slope.T @ hidden[rows]).float()
            bias_grad += slope.float().sum(0)
        hidden_grad = torch.cat(by_row) if by_row else torch.zeros_like(hidden)
        return hidden_grad, table_grad.to(table.dtype), bias_grad.to(bias.dtype), None, None
