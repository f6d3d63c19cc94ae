"""Contrast between windows of one user, with hard negatives from the other users of the batch.

InfoNCE (van den Oord et al. 2018, equation 4) with the temperature and cosine of Chen et al. 2020,
equation 1, in which negatives near the anchor count more (Robinson et al. 2021, "Contrastive
Learning with Hard Negative Samples", section 3, equations 3 and 4): negatives are drawn from

    q_beta(x-) proportional to exp(beta s(x, x-)) p(x-),

estimated over the batch by importance weights, and a share tau of them is taken for positives in
disguise and subtracted (Chuang et al. 2020). With s = cosine / temperature, n negatives and weights
w_j = exp(beta s_j) / mean over k of exp(beta s_k), the loss of an anchor is

    -log( exp(s+) / (exp(s+) + G) ),
    G = max((sum over j of w_j exp(s_j) - n tau exp(s+)) / (1 - tau), n exp(-1 / temperature)).

With beta = tau = 0 every weight is 1 and this is InfoNCE. The weights belong to the distribution
that negatives are drawn from, so no gradient flows through them.

Nothing here has a shape that depends on data: pairs that do not count are masked.

Legend of shapes: N pairs, W width.
"""

from __future__ import annotations

import math
from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import Tensor

_ALMOST_ALL: Final = -1e-6
"""Log of the share of the negatives that may be taken for positives, at the most."""


def hard_info_nce(
    left: Tensor,
    right: Tensor,
    temperature: float,
    beta: float = 0.0,
    positive_share: float = 0.0,
    valid: Tensor | None = None,
    users: Tensor | None = None,
) -> Tensor:
    """Return the mean loss (scalar) of pairs of windows, in both directions.

    0 where no valid pair has a negative: a pair alone teaches nothing.

    Args:
        left: one window of each user, (N, W).
        right: another window of the same user, (N, W).
        temperature: t; cosines are divided by it.
        beta: how much near negatives count more; 0 makes all alike.
        positive_share: tau, the share of negatives that are positives in disguise, in [0, 1).
        valid: which pairs count, (N,) bool; the others are neither anchors nor negatives.
        users: user of each pair, (N,) int64; pairs of one user are no negatives of each other.
            Default: all differ.
    """
    scores = F.normalize(left.float(), dim=1) @ F.normalize(right.float(), dim=1).T / temperature
    is_negative = negatives_of(len(left), left.device, valid, users)
    is_anchor = is_negative.any(1)
    floor = -1.0 / temperature
    both = [
        _losses(part, is_negative, is_anchor, beta, positive_share, floor)
        for part in (scores, scores.T)
    ]
    total = (both[0] + both[1]) / 2 * is_anchor
    return total.sum() / is_anchor.sum().clamp(min=1)


def negatives_of(
    count: int, device: torch.device, valid: Tensor | None, users: Tensor | None
) -> Tensor:
    """Return which pair is a negative of which, (N, N) bool and symmetric."""
    rows = torch.arange(count, device=device) if users is None else users
    differ = rows[:, None] != rows
    if valid is None:
        return differ
    return differ & valid[:, None] & valid


def _losses(
    scores: Tensor,
    is_negative: Tensor,
    is_anchor: Tensor,
    beta: float,
    positive_share: float,
    floor: float,
) -> Tensor:
    """Return each row's loss (N,), finite also where the row is no anchor."""
    own = scores.diagonal()
    # A row without a negative takes all columns, lest its sums be empty; it is masked later.
    is_used = is_negative | ~is_anchor[:, None]
    count = is_used.sum(1).float().log()
    counted = scores.masked_fill(~is_used, -torch.inf)
    if beta:
        weights = beta * counted.detach()
        counted = counted + weights - torch.logsumexp(weights, 1, keepdim=True) + count[:, None]
    others = torch.logsumexp(counted, 1)
    if positive_share:
        others = _debias(others, own, count, positive_share, floor)
    return F.softplus(others - own)


def _debias(
    others: Tensor, own: Tensor, count: Tensor, positive_share: float, floor: float
) -> Tensor:
    """Return log G (N,): the log sum of negatives without the share that are positives."""
    # Clamped before the exponential: an overflow behind a clamp has no gradient but NaN.
    log_taken = (math.log(positive_share) + count + own - others).clamp(max=_ALMOST_ALL)
    rest = others + torch.log1p(-log_taken.exp()) - math.log(1.0 - positive_share)
    return torch.maximum(rest, count + floor)
