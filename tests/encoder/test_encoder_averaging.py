from __future__ import annotations

import pytest
import torch

from behavior_pipeline.encoder.averaging import AveragedWeights
from behavior_pipeline.encoder.best_weights import BestWeights


def test_the_average_by_hand():
    weights = {"a": torch.zeros(2)}
    averages = AveragedWeights(weights, decay=0.25)
    expected = 0.0
    for number, value in enumerate((1.0, 5.0, -2.0), start=1):
        weights["a"].fill_(value)
        averages.update()
        decay = min(0.25, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * value
        assert averages.averages["a"].tolist() == pytest.approx([expected, expected])
    assert min(0.25, 2 / 11) == 2 / 11  # the first update still warms up


def test_averages_stand_in_and_step_back():
    weights = {"a": torch.tensor([1.0])}
    averages = AveragedWeights(weights, decay=0.5)
    parameter = torch.nn.Parameter(torch.tensor([9.0], dtype=torch.bfloat16))
    with averages.standing_in({"a": parameter}):
        assert parameter.item() == 1.0
    assert parameter.item() == 9.0
    assert parameter.dtype == torch.bfloat16


def test_the_best_weights_are_kept_as_they_were():
    module = torch.nn.Linear(1, 1, bias=False)
    best = BestWeights()
    for step, loss in enumerate((3.0, 1.0, 2.0, 1.0), start=1):
        module.weight.data.fill_(float(step))
        best.offer(step, loss, dict(module.named_parameters()), is_averaged=False)
    assert (best.step, best.loss, best.num_worse) == (2, 1.0, 2)
    best.put_into(module)
    assert module.weight.item() == 2.0
