"""Losses that cost no more memory than they must: nothing of size N x V is kept.

Legend of shapes: N predictions, W width, V values, M sampled values.
"""

from __future__ import annotations

import math
from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import Tensor, nn

from behavior_pipeline.contracts import PAD_ID
from behavior_pipeline.encoder.embedder import FieldEmbedding
from behavior_pipeline.encoder.layers import Linear

CHUNK_LOGITS: Final = 2**25
"""Logits that are in memory at once: 128 MiB in float32."""

_NO_LOGIT: Final = -1e9  # finite: a row without any other logit has gradients still


def log_uniform_log_probability(ids: Tensor, num_values: int) -> Tensor:
    """Return the log of P(id) = log((id + 2) / (id + 1)) / log(V + 1): ids by falling frequency."""
    return torch.log(torch.log1p(1.0 / (ids + 1.0)) / math.log(num_values + 1.0))


def sample_log_uniform(
    num_samples: int, num_values: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Draw ids (num_samples,) with replacement from `log_uniform_log_probability`."""
    uniform = torch.rand(num_samples, dtype=torch.float64, device=device)
    ids = torch.exp(uniform * math.log(num_values + 1.0)) - 1
    return ids.long().clamp(max=num_values - 1)


def sampled_cross_entropy(
    true_logits: Tensor,
    sampled_logits: Tensor,
    log_expected: Tensor,
    is_hit: Tensor,
) -> Tensor:
    """Return the mean cross-entropy (scalar) against sampled negatives, corrected by their chance.

    The sum over the vocabulary in the softmax is estimated as the true value's term plus the
    sampled terms over their expected counts, hits of the true value left out: an unbiased estimate
    of the full sum (Bengio and Senecal 2008; the logQ correction of Yi et al. 2019).

    Args:
        true_logits: (N,).
        sampled_logits: (N, M).
        log_expected: log of how often each sample is expected to be drawn, M times P, (M,).
        is_hit: where a sample is the true value, (N, M).
    """
    corrected = (sampled_logits - log_expected).masked_fill(is_hit, float("-inf"))
    total = torch.logsumexp(torch.cat((true_logits[:, None], corrected), dim=1), dim=1)
    return (total - true_logits).mean()


class _Softmax(torch.autograd.Function):
    """A softmax's loss, chunk by chunk of rows; its logits are computed again backwards."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        own: Tensor,
        ids: Tensor,
        has_own: bool,
    ) -> Tensor:
        """Return (N,) float32; see `cross_entropies` (`has_own`) and `other_log_sum_exp`."""
        size = _chunk_rows(len(weight))
        totals, losses = [], []
        for h, o in zip(torch.split(hidden, size), torch.split(own, size), strict=True):
            logits, is_own = _logits(h, weight, bias), o[:, None] == ids
            # Adding up one number and zeros finds the own logit without an index.
            kept = logits if has_own else logits.masked_fill(is_own, _NO_LOGIT)
            true = torch.where(is_own, logits, 0.0).sum(1) if has_own else 0.0
            totals.append(torch.logsumexp(kept, 1))
            losses.append(totals[-1] - true)
        ctx.save_for_backward(hidden, weight, bias, own, ids, torch.cat(totals))
        ctx.has_own = has_own
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of hidden, weight and bias; all come from matrix products."""
        hidden, weight, bias, own, ids, total = ctx.saved_tensors
        size = _chunk_rows(len(weight))
        for_hidden, for_weight = [], torch.zeros_like(weight, dtype=torch.float32)
        for_bias = torch.zeros_like(bias, dtype=torch.float32)
        chunks = (torch.split(part, size) for part in (hidden, own, total, gradient))
        for h, o, t, g in zip(*chunks, strict=True):
            share, is_own = (_logits(h, weight, bias) - t[:, None]).exp(), o[:, None] == ids
            share = share - is_own.float() if ctx.has_own else share.masked_fill(is_own, 0.0)
            share = share * g[:, None]
            for_bias += share.sum(0)
            short = share.to(weight.dtype)
            for_hidden.append(short @ weight)
            for_weight += short.T @ h
        return (
            torch.cat(for_hidden).to(hidden.dtype),
            for_weight.to(weight.dtype),
            for_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def _chunk_rows(num_values: int) -> int:
    """Return how many rows of logits are computed at once."""
    return max(1, CHUNK_LOGITS // num_values)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return logits (n, V) float32."""
    return F.linear(hidden, weight).float() + bias.float()


def cross_entropies(hidden: Tensor, weight: Tensor, bias: Tensor, own: Tensor) -> Tensor:
    """Return log sum_v exp(h_n . w_v + b_v) - (the same at the own value), (N,) float32.

    Memory: chunks of CHUNK_LOGITS logits, in both directions.

    Args:
        hidden: h, (N, W).
        weight: w, (V, W), in the precision of hidden.
        bias: b, (V,).
        own: the true value of each row, (N,) int64.
    """
    ids = torch.arange(len(weight), device=own.device)
    losses: Tensor = _Softmax.apply(hidden, weight, bias, own, ids, True)  # type: ignore[no-untyped-call]  # noqa: FBT003
    return losses


def other_log_sum_exp(
    hidden: Tensor, weight: Tensor, bias: Tensor, own: Tensor, ids: Tensor
) -> Tensor:
    """Return log sum over v with id_v != own_n of exp(h_n . w_v + b_v), (N,) float32.

    Memory as in `cross_entropies`.

    Args:
        hidden: h, (N, W).
        weight: w, (V, W), in the precision of hidden.
        bias: b, (V,).
        own: the value of each row that is left out, (N,) int64.
        ids: which value each row of `weight` stands for, (V,) int64.
    """
    total: Tensor = _Softmax.apply(hidden, weight, bias, own, ids, False)  # type: ignore[no-untyped-call]  # noqa: FBT003
    return total


class FieldPrediction(nn.Module):
    """Predicts a field's value through the table that embeds it (Press and Wolf 2017).

    Args:
        embedding: the field's embedding, shared with the encoder.
        width: D, width of what predicts.
        num_negatives: sampled values where the vocabulary exceeds `max_full_softmax`.
        max_full_softmax: vocabularies up to this size are predicted by an exact softmax. That never
            holds the logits, so memory sets no limit, but its time grows with the vocabulary.
    """

    def __init__(
        self, embedding: FieldEmbedding, width: int, num_negatives: int, max_full_softmax: int
    ) -> None:
        super().__init__()
        self.table = embedding.table
        self.transform = Linear(width, self.table.embedding_dim)
        self.bias = nn.Parameter(torch.zeros(self.table.num_embeddings))
        self.num_negatives = num_negatives
        self.max_full_softmax = max_full_softmax

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of hidden states (N, D) at targets (N,); PAD is no target."""
        return mean_over_targets(self.losses(hidden, targets), targets)

    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each hidden state (N, D) at its target, (N,) float32.

        What stands where the target is PAD means nothing.
        """
        known = self.transform(hidden)
        if self.table.num_embeddings > self.max_full_softmax:
            return self._sampled(known, targets)
        return cross_entropies(known, self.table.weight.to(known.dtype), self._bias(), targets)

    def _sampled(self, known: Tensor, targets: Tensor) -> Tensor:
        """Return the losses (N,) against sampled values; see `sampled_cross_entropy`."""
        num_values, bias = self.table.num_embeddings, self._bias()
        true = (known * self.table(targets).to(known.dtype)).float().sum(1)
        true = true + bias.index_select(0, targets)
        ids = sample_log_uniform(self.num_negatives, num_values, targets.device)
        chance = log_uniform_log_probability(ids, num_values) + math.log(self.num_negatives)
        shift = bias.index_select(0, ids) - chance
        others = other_log_sum_exp(known, self.table(ids).to(known.dtype), shift, targets, ids)
        losses: Tensor = torch.logaddexp(true, others) - true
        return losses

    def _bias(self) -> Tensor:
        """Return the biases (V,); PAD is no value, and its row learns nothing from being none."""
        no_logit = self.bias.new_full((1,), _NO_LOGIT)
        bias: Tensor = torch.cat((no_logit, self.bias[PAD_ID + 1 :])).float()
        return bias


def mean_over_targets(losses: Tensor, targets: Tensor) -> Tensor:
    """Return the mean of losses (N,) over the targets (N,) that are not PAD; 0 without any."""
    is_target = targets != PAD_ID
    return torch.where(is_target, losses, 0.0).sum() / is_target.sum().clamp(min=1)
