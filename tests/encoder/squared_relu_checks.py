"""Checks of the squaring products in Triton's interpreter.

`test_encoder_squared_relu.py` runs them in a process of their own: the interpreter must be chosen
before Triton is imported.
"""

from __future__ import annotations

import pytest
import torch

from behavior_pipeline.encoder import squared_relu
from behavior_pipeline.encoder.squared_relu import squared_feedforward

TILES = {"ROWS": 16, "COLUMNS": 32, "DEPTH": 16, "FLAT": False}


@pytest.mark.parametrize("num_tokens", [16, 50])  # whole tiles, and some that are cut
def test_result_and_gradients_are_those_of_three_operations(monkeypatch, num_tokens: int):
    monkeypatch.setattr(squared_relu, "_FORWARD", TILES)
    monkeypatch.setattr(squared_relu, "_BACKWARD", TILES)
    torch.manual_seed(0)
    shapes = ((num_tokens, 24), (72, 24), (24, 72))
    ours = [torch.randn(shape, requires_grad=True) for shape in shapes]
    plain = [tensor.detach().clone().requires_grad_() for tensor in ours]
    given = torch.randn(num_tokens, 24)

    found = squared_feedforward(*ours)
    found.backward(given)
    x, widen, narrow = plain
    expected = torch.relu(x @ widen.T).square() @ narrow.T
    expected.backward(given)

    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-3)
