"""The best weights so far, and when to stop looking for better ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class BestWeights:
    """The weights with the lowest validation loss so far.

    Attributes:
        step: when they were met; 0 before the first.
        loss: their validation loss.
        num_worse: validations since without a better loss.
        is_averaged: whether they are moving averages.
        weights: by name, on the host, in float32.
    """

    step: int = 0
    loss: float = math.inf
    num_worse: int = 0
    is_averaged: bool = False
    weights: dict[str, Tensor] = field(default_factory=dict)

    def offer(
        self, step: int, loss: float, weights: Mapping[str, Tensor], *, is_averaged: bool
    ) -> None:
        """Keep the weights if their loss is the lowest so far."""
        if loss < self.loss:
            self.step, self.loss, self.num_worse = step, loss, 0
            self.is_averaged = is_averaged
            self.weights = {name: value.detach().cpu().clone() for name, value in weights.items()}
        else:
            self.num_worse += 1

    def facts(self) -> dict[str, float | bool]:
        """Return all but the weights as JSON values."""
        return {
            "step": self.step, "loss": self.loss, "num_worse": self.num_worse,
            "is_averaged": self.is_averaged,
        }  # fmt: skip

    @torch.no_grad()
    def put_into(self, module: nn.Module) -> None:
        """Give a module's parameters, in float32, the values of their names."""
        for name, parameter in module.named_parameters():
            parameter.data = self.weights[name].to(parameter.device)
