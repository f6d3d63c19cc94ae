"""An exponential moving average of the weights, in float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class AveragedWeights:
    """A moving average of weights; validation may stand it in for them.

    A <- d A + (1 - d) W after every step, with d = min(decay, (1 + t) / (10 + t)) at the t-th
    update: early on the average forgets its random beginning quickly.

    Args:
        weights: float32 weights by name, as the optimizer updates them.
        decay: d in the long run.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        self.weights = weights
        self.decay = decay
        self.num_updates = 0
        self.averages = {name: value.detach().clone() for name, value in weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights as they are now."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        averages, weights = list(self.averages.values()), list(self.weights.values())
        torch._foreach_lerp_(averages, weights, 1 - decay)

    @contextmanager
    def standing_in(self, parameters: Mapping[str, Tensor]) -> Iterator[None]:
        """Give parameters of the same names the averaged values while the context lasts."""
        own = [parameter.detach().clone() for parameter in parameters.values()]
        _copy(parameters, list(self.averages.values()))
        try:
            yield
        finally:
            _copy(parameters, own)

    @torch.no_grad()
    def load(self, averages: Mapping[str, Tensor], num_updates: int) -> None:
        """Take back averages of an earlier time."""
        self.num_updates = num_updates
        _copy(self.averages, [averages[name] for name in self.averages])


@torch.no_grad()
def _copy(targets: Mapping[str, Tensor], values: list[Tensor]) -> None:
    """Copy values into targets of the same order, whatever their types."""
    for target, value in zip(targets.values(), values, strict=True):
        target.copy_(value)
