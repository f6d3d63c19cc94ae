"""What a pass costs: the arithmetic of the model itself, counted in FLOPs (2 per multiply-add)."""

from __future__ import annotations

import numpy as np

from behavior_pipeline.encoder.configuration import EncoderConfig
from behavior_pipeline.encoder.layers import inner_width
from behavior_pipeline.encoder.layouts import Ints


def pass_flops(config: EncoderConfig, lengths: Ints, *, causal: bool) -> int:
    """Return the FLOPs of the matrix products of a forward pass: embedder, blocks and attention.

    Attention over a user of n events takes 4 n^2 D FLOPs in every layer, query times key and
    attention times value; half of that when causal. Heads, pooling and readout are left out.
    """
    exact = np.asarray(lengths, np.int64)
    tokens, pairs = int(exact.sum()), int((exact**2).sum())
    attention = 4 * pairs * config.width * config.num_layers
    return tokens * token_flops(config) + (attention // 2 if causal else attention)


def token_flops(config: EncoderConfig) -> int:
    """Return the FLOPs that each token takes whatever it attends to."""
    width, inner = config.width, inner_width(config)
    widened = 2 * inner if config.feedforward == "swiglu" else inner
    block = 4 * width * width + width * widened + inner * width
    return 2 * (config.num_layers * block + _embedder_weights(config))


def _embedder_weights(config: EncoderConfig) -> int:
    """Return the weights of the matrix that widens the fields' tables and the gap's waves."""
    narrow = min(config.wide_table_width, config.width)
    num_fields = len(config.field_sizes) + len(config.number_edges) + len(config.code_sizes)
    tables = num_fields * narrow if narrow < config.width else 0
    waves = 2 * config.num_sinusoids if config.has_gap else 0
    return (tables + waves) * config.width
