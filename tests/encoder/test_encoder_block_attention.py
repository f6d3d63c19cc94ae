from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from behavior_pipeline.encoder.architecture import Block
from behavior_pipeline.encoder.configuration import EncoderConfig
from behavior_pipeline.encoder.layouts import PackedLayout
from behavior_pipeline.encoder.run_attention import BLOCK, Stretches, attend_in_stretches
from behavior_pipeline.encoder.time_encoding import RotaryClock

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
@pytest.mark.parametrize(("width", "precision", "bound"), [
    (16, torch.bfloat16, 0.02), (32, torch.bfloat16, 0.02), (64, torch.bfloat16, 0.02),
    (24, torch.bfloat16, 0.02), (64, torch.float32, 1e-4),
])  # fmt: skip
def test_a_block_on_a_gpu_is_that_on_a_cpu(width, precision, bound):
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    lengths = [random.integers(1, 257, 200), random.integers(1, 257, 50)]
    layout = PackedLayout.of(lengths, [int(each.sum()) for each in lengths], 200, 256, "blocks")
    config = EncoderConfig.named("tiny", {"action": 9}, width=2 * width, dropout=0.0)
    block = Block(config)
    hidden = torch.randn(sum(layout.sizes), 2 * width)
    days = torch.rand(len(hidden), dtype=torch.float64) * 1000
    turn = RotaryClock(width)(torch.arange(len(hidden)) % 256, days)
    found = []
    for device, kind in (("cpu", torch.float32), ("cuda", precision)):
        block = block.to(device, kind)
        given = hidden.to(device, kind).requires_grad_()
        moved = tuple(part.to(device) for part in turn)
        mixed = block(given, moved, layout.to(device))
        gradients = torch.autograd.grad(mixed.float().square().mean(), (given, *block.parameters()))
        found.append([part.float().cpu() for part in (mixed, *gradients)])
    for exact, ours in zip(*found, strict=True):
        assert (ours - exact).norm() < bound * exact.norm()


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
    moved = layout.to("meta").stretches
    assert moved is not None
    assert moved.reach.is_meta
    # What the compiler is told of the operation's results.
    turn = (torch.empty(16, 1, 16, device="meta"),) * 2
    mixed = attend_in_stretches(torch.empty(16, 3, 2, 32, device="meta"), None, turn, moved)
    assert mixed.shape == (16, 2, 32)
