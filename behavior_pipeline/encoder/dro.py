"""Distributionally robust loss over behaviours: the worst mix of classes that the data allow.

BehaveGPT (Gong et al. 2025), equation 4: with the loss l_b of behaviour b, minimise

    sup { sum over b of p(b) l_b : eps_b p(b) <= p_train(b) for all b, p >= 0, sum p = 1 }.

With one eps for all behaviours this is the conditional value at risk of l at level eps
(Rockafellar and Uryasev 2000): the mean loss of the worst eps of the data. Behaviours with little
data get a smaller eps_b, that is, a larger uncertainty set.

The supremum is a fractional knapsack: behaviours in order of falling loss take p_train(b) / eps_b
each until 1 is used up. Its gradient is sum over b of p*(b) times the gradient of l_b, with p* held
fixed (Danskin 1967; wherever p* is unique, that is, but for ties of losses).

Nothing here waits for a device or has a shape that depends on data.

Legend of shapes: N predictions, V behaviours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor, nn

SMALLEST_SCALE: Final = 1e-4
"""Lowest eps_b of `tail_scales`: no behaviour counts for more than 10,000 times its share."""


def tail_scales(shares: Tensor, level: float, tail_power: float) -> Tensor:
    """Return eps_b = level (p_train(b) / max p_train) ** tail_power, (V,) in [SMALLEST_SCALE, 1].

    The rarer a behaviour, the smaller its eps and the larger its uncertainty set. `tail_power` 0
    gives all behaviours the same eps; 1 allows each of them as much as the most frequent one.

    Args:
        shares: p_train, (V,), any scale; 0 for behaviours never seen.
        level: eps of the most frequent behaviour, in (0, 1]; 1 with `tail_power` 0 is the mean.
        tail_power: how much rare behaviours are favoured, at least 0.
    """
    relative = shares / shares.amax().clamp(min=torch.finfo(shares.dtype).tiny)
    return (level * relative**tail_power).clamp(SMALLEST_SCALE, 1.0)


def worst_distribution(losses: Tensor, shares: Tensor, scales: Tensor) -> Tensor:
    """Return the p (V,) with eps_b p(b) <= p_train(b) and sum 1 that maximises sum of p(b) l_b.

    Args:
        losses: l_b, (V,).
        shares: p_train, (V,), summing to 1.
        scales: eps_b, (V,) in (0, 1], so that p_train itself is allowed.
    """
    order = torch.argsort(losses, descending=True, stable=True)
    capacities = (shares / scales)[order]
    used_before = capacities.cumsum(0) - capacities
    filled = torch.minimum(capacities, (1.0 - used_before).clamp(min=0.0))
    return torch.zeros_like(filled).index_copy(0, order, filled)


def class_sums(values: Tensor, classes: Tensor, num_classes: int) -> Tensor:
    """Return the sums (V,) float32 of values (N,) by class (N,)."""
    zeros = torch.zeros(num_classes, dtype=torch.float32, device=values.device)
    return zeros.index_add(0, classes, values.float())


def robust_loss(
    losses: Tensor,
    classes: Tensor,
    num_classes: int,
    level: float,
    tail_power: float,
    valid: Tensor | None = None,
) -> Tensor:
    """Return equation 4 (scalar) for one batch taken by itself: p_train and l_b are the batch's.

    Args:
        losses: loss of each prediction, (N,).
        classes: behaviour of each, (N,) int64.
        num_classes: V.
        level: see `tail_scales`.
        tail_power: see `tail_scales`.
        valid: which predictions count, (N,) bool; default all.
    """
    counted = torch.ones_like(losses) if valid is None else valid.to(losses.dtype)
    counts = class_sums(counted.detach(), classes, num_classes)
    means = class_sums(losses * counted, classes, num_classes) / counts.clamp(min=1.0)
    shares = counts / counts.sum().clamp(min=1.0)
    scales = tail_scales(shares, level, tail_power)
    return (worst_distribution(means.detach(), shares, scales) * means).sum()


def identity(values: Tensor) -> Tensor:
    """Return what was given: the reduction over ranks where there is one rank."""
    return values


class RobustLoss(nn.Module):
    """Equation 4 estimated over mini-batches.

    p_train is counted over all batches so far and l_b is a running mean, so that the worst
    distribution does not depend on which behaviours a batch happens to hold. A batch then gives

        mean over its predictions i of (p*(b_i) / p_train(b_i)) l_i,

    whose expectation over batches is sum of p*(b) l_b; by Danskin's theorem its gradient is that
    of equation 4. The weights lie in [0, 1 / eps_b]; with level 1 and tail_power 0 all are 1, which
    is the mean.

    The worst distribution gives the easiest behaviours no weight at all, and these are the frequent
    ones. With `share` below 1 the mixes are (1 - share) p_train + share p, p as in equation 4: none
    is let go. The weights are mixed alike.

    In evaluation mode the running statistics stay as they are.

    Args:
        num_classes: V.
        level: see `tail_scales`.
        tail_power: see `tail_scales`.
        share: how much of the mix may be as bad as equation 4 allows, in [0, 1]; 0 is the mean.
        momentum: share of its old value that a running l_b keeps at a batch with that behaviour.
        reduce: adds a tensor up over ranks, in training over several; default one rank.
    """

    counts: Tensor
    means: Tensor

    def __init__(
        self,
        num_classes: int,
        level: float,
        tail_power: float,
        share: float = 1.0,
        momentum: float = 0.9,
        reduce: Callable[[Tensor], Tensor] = identity,
    ) -> None:
        super().__init__()
        if not 0 < level <= 1 or tail_power < 0:
            raise ValueError("level is in (0, 1], tail_power at least 0")
        if not 0 <= share <= 1 or not 0 <= momentum < 1:
            raise ValueError("share is in [0, 1], momentum in [0, 1)")
        self.num_classes = num_classes
        self.level = level
        self.tail_power = tail_power
        self.share = share
        self.momentum = momentum
        self.reduce = reduce
        # float64 counts every event of any run exactly.
        self.register_buffer("counts", torch.zeros(num_classes, dtype=torch.float64))
        self.register_buffer("means", torch.zeros(num_classes))

    def forward(self, losses: Tensor, classes: Tensor, valid: Tensor | None = None) -> Tensor:
        """Return the loss (scalar) of predictions with losses (N,) at behaviours (N,).

        Args:
            losses: loss of each prediction, (N,).
            classes: behaviour of each, (N,) int64 in [0, V).
            valid: which predictions count, (N,) bool; default all.
        """
        counted = torch.ones_like(losses) if valid is None else valid.to(losses.dtype)
        if self.training:
            self._observe(losses.detach(), classes, counted)
        weighted = losses * counted * self.weights()[classes].to(losses.dtype)
        return weighted.sum() / counted.sum().clamp(min=1.0)

    @torch.no_grad()
    def _observe(self, losses: Tensor, classes: Tensor, counted: Tensor) -> None:
        """Take a batch into the running statistics."""
        sums = class_sums(losses * counted, classes, self.num_classes)
        counts = class_sums(counted, classes, self.num_classes)
        sums, counts = self.reduce(torch.stack((sums, counts))).unbind()
        rate = torch.where(self.counts > 0, 1.0 - self.momentum, 1.0) * (counts > 0)
        found = sums / counts.clamp(min=1.0)
        self.means.add_((rate * (found - self.means)).to(self.means.dtype))
        self.counts.add_(counts.double())

    @torch.no_grad()
    def weights(self) -> Tensor:
        """Return the mix over p_train (V,) float32 under the running statistics; 1 when unseen."""
        shares = self.counts / self.counts.sum().clamp(min=1.0)
        scales = tail_scales(shares, self.level, self.tail_power)
        worst = worst_distribution(self.means.double(), shares, scales)
        is_seen = self.counts > 0
        ratios = torch.where(is_seen, worst / torch.where(is_seen, shares, 1.0), 1.0)
        return (1.0 - self.share + self.share * ratios).float()
