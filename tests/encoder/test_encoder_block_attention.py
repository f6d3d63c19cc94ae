from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from behavior_pipeline.encoder.layouts import PackedLayout
from behavior_pipeline.encoder.run_attention import BLOCK, Stretches, attend_in_stretches

CHECKS = Path(__file__).with_name("block_attention_checks.py")
NEEDS_TRITON = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="KERNELS NOT CHECKED: Triton is not installed; `pip install triton` and run this again",
)


@NEEDS_TRITON
def test_kernels_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CHECKS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@NEEDS_TRITON
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("width", [16, 32, 64])
def test_kernels_on_a_gpu(width):
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    lengths = [random.integers(1, 257, 200), random.integers(1, 257, 50)]
    layout = PackedLayout.of(lengths, [int(each.sum()) + 9 for each in lengths], 200, 256, "blocks")
    whole = torch.randn(sum(layout.sizes), 3, 4, width)
    exact = whole.clone().requires_grad_()
    expected = layout.attend(*exact.unbind(1))
    expected.square().sum().backward()
    short = whole.cuda().bfloat16().requires_grad_()
    mixed = layout.to("cuda").attend(*short.unbind(1))
    (
        mixed.float().square().sum()
        - mixed[layout.sizes[0] - 9 : layout.sizes[0]].float().square().sum()
        - mixed[-9:].float().square().sum()
    ).backward()
    is_filler = expected.abs().sum((1, 2)) == 0
    assert (mixed.float().cpu() - expected)[~is_filler].abs().max() < 0.05
    error = (short.grad.float().cpu() - exact.grad).norm() / exact.grad.norm()
    assert error < 0.02


def brute(first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Find what `Stretches.reach` must cover from all pairs of tokens."""
    tokens = np.arange(len(first))
    sees = (tokens >= first[:, None]) & (tokens <= last[:, None])
    count = -(-len(first) // BLOCK)
    blocks = tokens // BLOCK
    pairs = np.zeros((count, count), bool)
    np.maximum.at(pairs, (blocks[:, None], blocks[None, :]), sees)
    ends = [(np.flatnonzero(row).min(), np.flatnonzero(row).max()) for row in pairs]
    seen = [(np.flatnonzero(row).min(), np.flatnonzero(row).max()) for row in pairs.T]
    return np.hstack((ends, seen))


@pytest.mark.parametrize("seed", range(5))
def test_blocks_reach_as_far_as_their_tokens_see(seed):
    random = np.random.default_rng(seed)
    lengths = [random.integers(0, 200, 8), random.integers(0, 200, 5)]
    sizes = [int(each.sum()) + 100 for each in lengths]
    stretches = Stretches.of_runs(lengths, sizes)
    first, last = stretches.first.numpy(), stretches.last.numpy()
    assert stretches.reach.dtype == torch.int32
    assert (stretches.reach.numpy() == brute(first, last)).all()
    assert (first <= np.arange(len(first))).all()
    causal = np.arange(sizes[0])
    assert (last[: sizes[0]] == causal).all()
    assert (first[sizes[0] - 100 : sizes[0]] == causal[-100:]).all()


def test_a_layout_moves_and_pins_its_stretches():
    layout = PackedLayout.of([np.array([3, 5])], [16], 4, 8, "blocks")
    assert layout.stretches is not None
    assert layout.stretches.first.tolist() == [0, 0, 0, 3, 3, 3, 3, 3, *range(8, 16)]
    assert PackedLayout.of([np.array([3, 5])], [16], 4, 8, "varlen").stretches is None
    with torch.device("meta"):
        shapes = attend_in_stretches(
            *(torch.empty(16, 2, 32) for _ in range(3)), layout.stretches.to("meta")
        )
    assert shapes.shape == (16, 2, 32)
