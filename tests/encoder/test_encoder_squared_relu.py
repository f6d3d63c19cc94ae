from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from behavior_pipeline.encoder.squared_relu import is_suited, squared_feedforward

CHECKS = Path(__file__).with_name("squared_relu_checks.py")
NEEDS_TRITON = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="KERNELS NOT CHECKED: Triton is not installed; `pip install triton` and run this again",
)


@NEEDS_TRITON
def test_products_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CHECKS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_processor_takes_the_plain_path():
    x, widen = torch.zeros(4, 8), torch.zeros(16, 8)
    assert not is_suited(x, widen)
    assert not is_suited(x.bfloat16(), widen.bfloat16())


@NEEDS_TRITON
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_products_on_a_gpu_are_as_exact_as_the_plain_path():
    torch.manual_seed(0)
    shapes = ((1000, 768), (3072, 768), (768, 3072))
    exact = [torch.randn(shape, device="cuda") / shape[1] ** 0.5 for shape in shapes]
    ours = [tensor.bfloat16().requires_grad_() for tensor in exact]
    wide = [tensor.bfloat16().float().requires_grad_() for tensor in exact]
    given = torch.randn(1000, 768, device="cuda").bfloat16()
    squared_feedforward(*ours).backward(given)
    x, widen, narrow = wide
    (torch.relu(x @ widen.T).square() @ narrow.T).backward(given.float())
    for one, other in zip(ours, wide, strict=True):
        distance = (one.grad.float() - other.grad).norm() / other.grad.norm()
        assert distance < 1e-2
