"""Checks of the attention kernels in Triton's interpreter.

`test_encoder_block_attention.py` runs them in a process of their own: the interpreter must be
chosen before Triton is imported.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import Tensor

from behavior_pipeline.encoder.architecture import Block
from behavior_pipeline.encoder.configuration import EncoderConfig
from behavior_pipeline.encoder.layers import NORM_EPSILON
from behavior_pipeline.encoder.layouts import PackedLayout
from behavior_pipeline.encoder.run_attention import Stretches, attend_in_stretches
from behavior_pipeline.encoder.time_encoding import RotaryClock, rotate

LONGEST = 256


def random_lengths(seed: int, count: int = 5) -> np.ndarray:
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


def turn_of(num_tokens: int, width: int) -> tuple[Tensor, Tensor]:
    days = torch.rand(num_tokens, dtype=torch.float64) * 1000
    return RotaryClock(width)(torch.arange(num_tokens) % 300, days)


def prepared(whole: Tensor, gains: Tensor | None, turn: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Queries and keys, normalised and turned, and values."""
    query, key, value = whole.unbind(1)
    if gains is not None:
        shape = whole.shape[-1:]
        query, key = (
            F.rms_norm(part, shape, gain, NORM_EPSILON)
            for part, gain in ((query, gains[0]), (key, gains[1]))
        )
    return [rotate(query, *turn), rotate(key, *turn), value]


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


@pytest.mark.parametrize("has_norm", [True, False])
@pytest.mark.parametrize(("width", "seed"), [(16, 0), (32, 1), (64, 2), (24, 3)])
def test_mixtures_and_gradients_equal_those_of_plain_attention(
    width: int, seed: int, has_norm: bool
) -> None:
    torch.manual_seed(seed)
    lengths = [random_lengths(seed), random_lengths(seed + 10, 4)]
    layout = layout_of(lengths, 70)
    turn = turn_of(sum(layout.sizes), width)
    whole = torch.randn(sum(layout.sizes), 3, 2, width, requires_grad=True)
    gains = (1 + torch.rand(2, width)).requires_grad_() if has_norm else None
    events = is_event(layout, lengths)
    given = torch.randn(sum(layout.sizes), 2, width) * events[:, None, None]
    learned = [whole] if gains is None else [whole, gains]
    mixtures = (
        attend_in_stretches(whole, gains, turn, layout.stretches),
        layout.attend(*prepared(whole, gains, turn)),  # in groups of like lengths, as on a CPU
        one_by_one(prepared(whole, gains, turn), lengths, 70),
    )
    found = [
        (mixed.detach()[events], torch.autograd.grad(mixed, learned, given)) for mixed in mixtures
    ]
    for mixed, gradients in found[1:]:
        torch.testing.assert_close(found[0][0], mixed, atol=4e-6, rtol=1e-5)
        torch.testing.assert_close(found[0][1], gradients, atol=2e-5, rtol=1e-4)


def test_filler_sees_itself_alone_and_everything_is_finite() -> None:
    layout = layout_of([np.array([5, 0]), np.array([], np.int64)], 100)
    whole = torch.randn(205, 3, 1, 16)
    whole[100:] = 0  # the norm of nothing
    whole.requires_grad_()
    gains = torch.ones(2, 16, requires_grad=True)
    mixed = attend_in_stretches(whole, gains, turn_of(205, 16), layout.stretches)
    torch.testing.assert_close(mixed[5:], whole[5:, 2])
    gradients = torch.autograd.grad(mixed.sum(), (whole, gains))
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert gradients[0][5:, :2].abs().max() < 1e-5


def test_large_scores_do_not_overflow() -> None:
    lengths = [np.array([150]), np.array([30])]
    layout = layout_of(lengths, 3)
    whole, turn = 100 * torch.randn(186, 3, 1, 16), turn_of(186, 16)
    mixed = attend_in_stretches(whole, None, turn, layout.stretches)
    expected = layout.attend(*prepared(whole, None, turn))
    events = is_event(layout, lengths)
    torch.testing.assert_close(mixed[events], expected[events], atol=0.1, rtol=1e-3)


def test_the_gradients_are_the_same_every_time() -> None:
    lengths = [random_lengths(5), random_lengths(6)]
    layout = layout_of(lengths, 1)
    whole = torch.randn(sum(layout.sizes), 3, 1, 16, requires_grad=True)
    gains = torch.ones(2, 16, requires_grad=True)
    mixed = attend_in_stretches(whole, gains, turn_of(len(whole), 16), layout.stretches)
    first, second = (
        torch.autograd.grad(mixed.square().sum(), (whole, gains), retain_graph=True)
        for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


def test_short_numbers_come_close() -> None:
    # The interpreter multiplies no bfloat16.
    torch.manual_seed(0)
    layout = layout_of([np.array([70, 3, 120]), np.array([100])], 5)
    whole, turn = torch.randn(sum(layout.sizes), 3, 2, 32), turn_of(sum(layout.sizes), 32)
    found = []
    for precision in (torch.float32, torch.float16):
        short = whole.to(precision).requires_grad_()
        gains = torch.ones(2, 32, dtype=precision, requires_grad=True)
        mixed = attend_in_stretches(short, gains, turn, layout.stretches)
        assert mixed.dtype == precision
        gradients = torch.autograd.grad(mixed.sum(), (short, gains))
        assert {gradient.dtype for gradient in gradients} == {precision}
        found.append([part.float() for part in (mixed, *gradients)])
    torch.testing.assert_close(found[1][:2], found[0][:2], atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(found[1][2], found[0][2], atol=0.1, rtol=1e-2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("has_norm", [True, False])
def test_a_compiled_graph_holds_the_operation_whole(has_norm: bool) -> None:
    layout = layout_of([np.array([70, 3]), np.array([20])], 5)
    whole = torch.randn(sum(layout.sizes), 3, 2, 16, requires_grad=True)
    gains, turn = torch.ones(2, 16) if has_norm else None, turn_of(len(whole), 16)

    def loss(whole: Tensor, stretches: Stretches) -> Tensor:
        return attend_in_stretches(whole * 2, gains, turn, stretches).square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=False)
    plain = torch.autograd.grad(loss(whole, layout.stretches), whole)[0]
    found = torch.autograd.grad(compiled(whole, layout.stretches), whole)[0]
    torch.testing.assert_close(found, plain)


def test_the_operation_keeps_what_it_promises() -> None:
    layout = layout_of([np.array([9, 3]), np.array([4])], 2)
    whole = torch.randn(sum(layout.sizes), 3, 1, 16, requires_grad=True)
    seen = layout.stretches
    torch.library.opcheck(
        torch.ops.behavior_pipeline.attend_in_stretches.default,
        (whole, torch.ones(2, 16), *turn_of(len(whole), 16), seen.first, seen.last, seen.reach),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.parametrize(
    "changes", [{}, {"has_query_key_norm": False}, {"norm": "layer"}], ids=["rms", "none", "layer"]
)
def test_a_block_s_pass_and_gradients_are_those_of_a_cpu(
    monkeypatch: pytest.MonkeyPatch, changes: dict
) -> None:
    torch.manual_seed(0)
    block = Block(EncoderConfig.named("tiny", {"action": 9}, dropout=0.0, **changes))
    lengths = [np.array([20, 31, 70]), np.array([32, 9])]
    layout = layout_of(lengths, 2)
    hidden = torch.randn(sum(layout.sizes), 48, requires_grad=True)
    learned = [hidden, *block.parameters()]
    turn, events = turn_of(len(hidden), 24), is_event(layout, lengths)
    found = []
    for stretches in (None, layout.stretches):
        monkeypatch.setattr(PackedLayout, "stretches_for", lambda *_, kept=stretches: kept)
        mixed = block(hidden, turn, layout)[events]
        found.append((mixed, *torch.autograd.grad(mixed.square().sum(), learned)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
