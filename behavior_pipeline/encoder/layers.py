"""The layers that blocks and heads are built of; free of float32 copies when weights are bfloat16.

Legend of shapes: N tokens, D width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import Tensor, nn

from behavior_pipeline.encoder.configuration import EncoderConfig
from behavior_pipeline.encoder.squared_relu import is_suited, squared_feedforward

NORM_EPSILON = 1e-6


class Linear(nn.Linear):
    """A linear layer that takes its input in any precision and computes in its weights'."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.Linear gives it
        """Map (..., in) to (..., out)."""
        return F.linear(input.to(self.weight.dtype), self.weight, self.bias)


def make_norm(config: EncoderConfig, width: int) -> nn.Module:
    """Return the configured norm over the last dimension.

    RMSNorm (Zhang and Sennrich 2019) drops LayerNorm's mean and bias: the same losses with one
    statistic less to compute. Its statistics are taken in float32 whatever the precision.
    """
    if config.norm == "layer":
        return nn.LayerNorm(width)
    return nn.RMSNorm(width, eps=NORM_EPSILON)


class FeedForward(nn.Module):
    """The feed-forward part of a block, in one of three kinds of equal FLOPs.

    `squared_relu`: relu(x W)^2 V (So et al. 2021), cheaper than GELU to compute and to keep for
    the backward pass; `gelu`: gelu(x W) V; `swiglu`: (silu(x W) * x U) V at two thirds of the inner
    width (Shazeer 2020, section 2).
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.kind = config.feedforward
        self.is_plain = self.kind == "squared_relu" and not config.has_biases
        inner = inner_width(config)
        widened = 2 * inner if self.kind == "swiglu" else inner
        self.widen = Linear(config.width, widened, bias=config.has_biases)
        self.narrow = Linear(inner, config.width, bias=config.has_biases)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, D) to (N, D)."""
        if self.is_plain and is_suited(x, self.widen.weight):
            x = x.to(self.widen.weight.dtype)
            return squared_feedforward(x, self.widen.weight, self.narrow.weight)
        inner = self.widen(x)
        if self.kind == "swiglu":
            gate, value = inner.chunk(2, dim=-1)
            inner = F.silu(gate) * value
        elif self.kind == "gelu":
            inner = F.gelu(inner)
        else:
            # In place where nothing needs what was there: a pass over memory takes as long as a
            # quarter of the product on a CPU. The gradient of the square needs what is squared.
            inner = F.relu(inner, inplace=True)
            inner = inner.square() if torch.is_grad_enabled() else inner.square_()
        narrowed: Tensor = self.narrow(inner)
        return narrowed


def inner_width(config: EncoderConfig) -> int:
    """Return the inner width of the feed-forward part; two thirds, in steps of 8, when gated."""
    if config.feedforward != "swiglu":
        return config.feedforward_width
    return 8 * math.ceil(config.feedforward_width * 2 / 3 / 8)


def initialise(module: nn.Module) -> None:
    """Start matrices and tables normal with spread 1 / sqrt(width), biases and PAD rows zero."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        with torch.no_grad():
            module.weight[module.padding_idx].zero_()
