from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from encoder_builders import SIZES

from behavior_pipeline.contracts import PAD_ID
from behavior_pipeline.encoder import losses
from behavior_pipeline.encoder.architecture import Encoder
from behavior_pipeline.encoder.configuration import EncoderConfig, TrainingConfig
from behavior_pipeline.encoder.objectives import EventPrediction


@pytest.mark.parametrize("chunk_logits", [40, 2**25])
def test_chunks_give_the_losses_and_gradients_of_the_whole(monkeypatch, chunk_logits):
    monkeypatch.setattr(losses, "CHUNK_LOGITS", chunk_logits)
    torch.manual_seed(0)
    hidden, weight, bias = (torch.randn(*size).double() for size in ((11, 4), (9, 4), (9,)))
    own, scale = torch.randint(9, (11,)), torch.randn(11).double()
    parts = [part.requires_grad_() for part in (hidden, weight, bias)]
    logits = hidden @ weight.T + bias
    expected = F.cross_entropy(logits, own, reduction="none")
    wanted = torch.autograd.grad((expected * scale).sum(), parts)
    found = losses.cross_entropies(hidden, weight, bias, own)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    gradients = torch.autograd.grad((found * scale).sum(), parts)
    torch.testing.assert_close(gradients, wanted, atol=1e-5, rtol=1e-5)
    ids = torch.tensor([0, 3, 3, 5, 8, 7, 1, 2, 4])
    logits = (hidden @ weight.T + bias).masked_fill(own[:, None] == ids, -math.inf)
    wanted = torch.autograd.grad((logits.logsumexp(1) * scale).sum(), parts)
    found = losses.other_log_sum_exp(hidden, weight, bias, own, ids)
    gradients = torch.autograd.grad((found * scale).sum(), parts)
    torch.testing.assert_close(gradients, wanted, atol=1e-5, rtol=1e-5)


def test_padding_is_never_predicted_and_its_row_stays_as_it_is():
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig.named("tiny", SIZES))
    heads = EventPrediction(encoder, TrainingConfig.named("tiny")).heads
    table = encoder.embedder.fields["action"].table
    heads["action"](torch.randn(4, 48), torch.tensor([5, PAD_ID, 7, PAD_ID])).backward()
    assert not table.weight.grad[PAD_ID].any()
    assert table.weight.grad[4].any()
