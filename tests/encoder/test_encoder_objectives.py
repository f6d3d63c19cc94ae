from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from encoder_builders import SIZES

from behavior_pipeline.contracts import PAD_ID
from behavior_pipeline.encoder.architecture import Encoder
from behavior_pipeline.encoder.configuration import EncoderConfig, TrainingConfig
from behavior_pipeline.encoder.cutoffs import window_sizes
from behavior_pipeline.encoder.embedder import FieldEmbedding
from behavior_pipeline.encoder.losses import (
    FieldPrediction,
    log_uniform_log_probability,
    sample_log_uniform,
    sampled_cross_entropy,
)
from behavior_pipeline.encoder.objectives import Silence


def test_log_uniform_probabilities_sum_to_one_and_match_the_samples():
    torch.manual_seed(0)
    probabilities = log_uniform_log_probability(torch.arange(50), 50).exp()
    assert probabilities.sum().item() == pytest.approx(1, rel=1e-5)
    counts = torch.bincount(sample_log_uniform(200_000, 50), minlength=50) / 200_000
    torch.testing.assert_close(counts, probabilities, atol=3e-3, rtol=0)


def test_the_sampled_softmax_estimates_the_full_sum_without_bias():
    torch.manual_seed(0)
    logits, true = torch.randn(30), 3
    totals = []
    for _ in range(4000):
        samples = sample_log_uniform(10, 30)
        log_expected = log_uniform_log_probability(samples, 30) + math.log(10)
        loss = sampled_cross_entropy(
            logits[true][None], logits[samples][None], log_expected, (samples == true)[None]
        )
        totals.append((loss + logits[true]).exp())
    expected = logits.exp().sum().item()
    assert torch.stack(totals).mean().item() == pytest.approx(expected, rel=0.02)


def test_a_field_is_predicted_by_the_full_softmax_and_padding_is_no_target():
    torch.manual_seed(0)
    head = FieldPrediction(FieldEmbedding(9, 6, 6), 6, 5, 2000)
    hidden, targets = torch.randn(4, 6), torch.tensor([5, PAD_ID, 8, PAD_ID])
    logits = (head.transform(hidden) @ head.table.weight.T + head.bias)[:, 1:]
    expected = F.cross_entropy(logits[[0, 2]], targets[[0, 2]] - 1)
    torch.testing.assert_close(head(hidden, targets), expected)
    assert head(hidden, torch.zeros(4, dtype=torch.long)).item() == 0


def test_a_large_vocabulary_is_sampled_and_comes_close_to_the_full_softmax():
    torch.manual_seed(0)
    size = 2500
    head = FieldPrediction(FieldEmbedding(size, 4, 4), 4, 2000, 2000)
    hidden, targets = torch.randn(64, 4), torch.randint(4, size, (64,))
    with torch.no_grad():
        full = F.cross_entropy(head.transform(hidden) @ head.table.weight.T, targets)
        sampled = torch.stack([head(hidden, targets) for _ in range(10)]).mean()
    assert sampled.item() == pytest.approx(full.item(), rel=0.02)
    assert sampled.item() != full.item()


def test_a_silence_head_starts_at_the_rates_it_is_given():
    torch.manual_seed(0)
    config = TrainingConfig.named("tiny")
    encoder = Encoder(EncoderConfig.named("tiny", SIZES))
    silence = Silence(encoder, config)
    size = window_sizes(encoder.config, config)["item"]
    rates = torch.linspace(0.01, 0.9, size)
    silence.start_from({"item": rates})
    embedding = torch.randn(3, encoder.embedding_width)
    predicted = silence.window["item"](embedding).sigmoid()
    torch.testing.assert_close(predicted, rates.expand(3, -1), atol=0.01, rtol=0)
