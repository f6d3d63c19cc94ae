"""Checks of the attention kernels in Triton's interpreter.

`test_encoder_block_attention.py` runs them in a process of their own: the interpreter must be
chosen before Triton is imported.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from behavior_pipeline.encoder.layouts import PackedLayout
from behavior_pipeline.encoder.run_attention import Stretches, attend_in_stretches

LONGEST = 256


def random_lengths(seed: int, count: int = 9) -> np.ndarray:
    """Lengths from 1 to 256, short ones and long ones alike; 0 among them."""
    random = np.random.default_rng(seed)
    lengths = np.exp(random.uniform(0, np.log(LONGEST), count)).astype(np.int64)
    return np.append(lengths, 0)[random.permutation(count + 1)]


def layout_of(lengths: Sequence[np.ndarray], filler: int) -> PackedLayout:
    """Both parts of a batch, each with filler behind its runs; no part fills whole blocks."""
    sizes = [int(each.sum()) + filler for each in lengths]
    return PackedLayout.of(lengths, sizes, 16, LONGEST, "blocks")


def is_event(layout: PackedLayout, lengths: Sequence[np.ndarray]) -> Tensor:
    return torch.cat(
        [
            torch.arange(size) < int(each.sum())
            for each, size in zip(lengths, layout.sizes, strict=True)
        ]
    )


def one_by_one(parts: Sequence[Tensor], lengths: Sequence[np.ndarray], filler: int) -> Tensor:
    """Plain softmax attention, run by run; filler gets zeros."""
    mixed, base = torch.zeros_like(parts[0]), 0
    for number, each in enumerate(lengths):
        for length in each.tolist():
            run = slice(base, base + length)
            query, key, value = (part[run] for part in parts)
            scores = torch.einsum("qhw,khw->hqk", query, key) / query.shape[-1] ** 0.5
            if number == 0:
                scores = scores.masked_fill(torch.ones(length, length).triu(1) > 0, -torch.inf)
            mixed[run] = torch.einsum("hqk,khw->qhw", scores.softmax(-1), value)
            base += length
        base += filler
    return mixed


@pytest.mark.parametrize(("width", "seed"), [(16, 0), (32, 1), (64, 2), (24, 3)])
def test_mixtures_and_gradients_equal_those_of_plain_attention(width: int, seed: int) -> None:
    torch.manual_seed(seed)
    lengths = [random_lengths(seed), random_lengths(seed + 10, 4)]
    layout = layout_of(lengths, 70)
    whole = torch.randn(sum(layout.sizes), 3, 2, width, requires_grad=True)
    given = torch.randn(sum(layout.sizes), 2, width) * is_event(layout, lengths)[:, None, None]
    found = []
    for attend in (
        lambda *parts: attend_in_stretches(*parts, layout.stretches),
        layout.attend,  # in groups of like lengths, as on a CPU
        lambda *parts: one_by_one(parts, lengths, 70),
    ):
        mixed = attend(*whole.unbind(1))
        found.append((mixed.detach(), torch.autograd.grad(mixed, whole, given)[0]))
    events = is_event(layout, lengths)
    for mixed, gradient in found[1:]:
        torch.testing.assert_close(found[0][0][events], mixed[events], atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(found[0][1], gradient, atol=1e-5, rtol=1e-5)


def test_filler_sees_itself_alone_and_everything_is_finite() -> None:
    layout = layout_of([np.array([5, 0]), np.array([], np.int64)], 100)
    parts = [torch.randn(205, 1, 16, requires_grad=True) for _ in range(3)]
    mixed = attend_in_stretches(*parts, layout.stretches)
    torch.testing.assert_close(mixed[5:], parts[2][5:])
    gradients = torch.autograd.grad(mixed.sum(), parts)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert gradients[0][5:].abs().max() < 1e-5


def test_large_scores_do_not_overflow() -> None:
    layout = layout_of([np.array([150]), np.array([30])], 3)
    parts = [100 * torch.randn(186, 1, 16) for _ in range(3)]
    mixed = attend_in_stretches(*parts, layout.stretches)
    expected = layout.attend(*parts)
    events = is_event(layout, [np.array([150]), np.array([30])])
    torch.testing.assert_close(mixed[events], expected[events], atol=1e-3, rtol=1e-5)


def test_the_gradients_are_the_same_every_time() -> None:
    lengths = [random_lengths(5), random_lengths(6)]
    layout = layout_of(lengths, 1)
    whole = torch.randn(sum(layout.sizes), 3, 1, 16, requires_grad=True)
    mixed = attend_in_stretches(*whole.unbind(1), layout.stretches)
    first, second = (
        torch.autograd.grad(mixed.square().sum(), whole, retain_graph=True)[0] for _ in range(2)
    )
    assert torch.equal(first, second)


def test_short_numbers_come_close() -> None:
    # The interpreter multiplies no bfloat16.
    torch.manual_seed(0)
    lengths = [np.array([70, 3, 120]), np.array([100])]
    layout = layout_of(lengths, 5)
    whole = torch.randn(sum(layout.sizes), 3, 2, 32)
    found = []
    for precision in (torch.float32, torch.float16):
        short = whole.to(precision).requires_grad_()
        mixed = attend_in_stretches(*short.unbind(1), layout.stretches)
        assert mixed.dtype == precision
        found.append((mixed.float(), torch.autograd.grad(mixed.sum(), short)[0].float()))
    torch.testing.assert_close(found[1][0], found[0][0], atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(found[1][1], found[0][1], atol=1e-2, rtol=1e-2)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_graph_holds_the_operation_whole() -> None:
    lengths = [np.array([70, 3]), np.array([20])]
    layout = layout_of(lengths, 5)
    whole = torch.randn(sum(layout.sizes), 3, 2, 16, requires_grad=True)

    def loss(whole: Tensor, stretches: Stretches) -> Tensor:
        query, key, value = whole.unbind(1)
        return attend_in_stretches(query * 2, key, value, stretches).square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=False)
    plain = torch.autograd.grad(loss(whole, layout.stretches), whole)[0]
    found = torch.autograd.grad(compiled(whole, layout.stretches), whole)[0]
    torch.testing.assert_close(found, plain)


def test_the_operations_keep_what_they_promise() -> None:
    layout = layout_of([np.array([9, 3]), np.array([4])], 2)
    whole = torch.randn(sum(layout.sizes), 3, 1, 16, requires_grad=True)
    stretches = layout.stretches
    torch.library.opcheck(
        torch.ops.behavior_pipeline.attend_in_stretches.default,
        (*whole.unbind(1), stretches.first, stretches.last, stretches.reach),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
