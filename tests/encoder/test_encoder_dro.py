from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from behavior_pipeline.encoder.dro import (
    SMALLEST_SCALE,
    RobustLoss,
    robust_loss,
    tail_scales,
    worst_distribution,
)


@st.composite
def problems(draw):
    """Losses, shares and scales of up to 12 behaviours; some never seen, some losses equal."""
    size = draw(st.integers(1, 12))
    losses = draw(st.lists(st.integers(0, 8), min_size=size, max_size=size))
    counts = draw(st.lists(st.integers(0, 50), min_size=size, max_size=size))
    counts[draw(st.integers(0, size - 1))] += 1
    scales = draw(st.lists(st.floats(0.01, 1.0), min_size=size, max_size=size))
    shares = np.array(counts) / sum(counts)
    return np.array(losses) / 2, shares, np.array(scales)


@settings(max_examples=300, deadline=None)
@given(problems())
def test_the_knapsack_solves_the_linear_program(problem):
    losses, shares, scales = problem
    worst = worst_distribution(*(torch.from_numpy(part) for part in problem)).numpy()
    bounds = [(0, share / scale) for share, scale in zip(shares, scales, strict=True)]
    solved = linprog(-losses, A_eq=np.ones((1, len(losses))), b_eq=[1], bounds=bounds)
    assert solved.status == 0
    assert worst @ losses == pytest.approx(-solved.fun, abs=1e-9)
    assert worst.sum() == pytest.approx(1, abs=1e-9)
    assert (worst >= 0).all()
    assert (scales * worst <= shares + 1e-12).all()


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    classes = torch.tensor([0] * 20 + [1] * 9 + [2] * 4 + [3] * 2)
    logits = torch.randn(len(classes), 6, generator=generator, dtype=torch.float64)
    return logits, classes


def test_a_scale_of_one_is_cross_entropy():
    logits, classes = batch()
    losses = F.cross_entropy(logits, classes, reduction="none")
    torch.testing.assert_close(robust_loss(losses, classes, 6, 1.0, 0.0), losses.mean().float())
    module = RobustLoss(6, 1.0, 0.0)
    for _ in range(3):
        torch.testing.assert_close(module(losses, classes), losses.mean())


def test_a_scale_towards_zero_is_the_worst_behaviour():
    logits, classes = batch()
    losses = F.cross_entropy(logits, classes, reduction="none")
    worst = max(losses[classes == b].mean().item() for b in range(4))
    assert robust_loss(losses, classes, 6, 1e-4, 0.0).item() == pytest.approx(worst, rel=1e-6)
    module = RobustLoss(6, 1e-4, 0.0)
    assert module(losses, classes).item() == pytest.approx(worst, rel=1e-6)


def test_one_scale_is_the_conditional_value_at_risk():
    losses = torch.tensor([4.0, 3.0, 2.0, 1.0])
    shares = torch.full((4,), 0.25)
    worst = worst_distribution(losses, shares, torch.full((4,), 0.4))
    # The worst 40 % of the data: all of the first, three fifths of the second.
    torch.testing.assert_close(worst, torch.tensor([0.625, 0.375, 0.0, 0.0]))


def test_rare_behaviours_get_the_larger_uncertainty_set():
    shares = torch.tensor([0.8, 0.15, 0.04, 0.01, 0.0])
    scales = tail_scales(shares, 0.9, 0.5)
    assert scales[0].item() == pytest.approx(0.9)
    assert (scales.diff() < 0).all()
    assert scales[-1].item() == pytest.approx(SMALLEST_SCALE)
    assert (tail_scales(shares, 0.9, 0.0) == 0.9).all()
    allowed = shares / tail_scales(shares, 1.0, 1.0)
    torch.testing.assert_close(allowed[:4], torch.full((4,), 0.8))


@pytest.mark.parametrize(("level", "tail_power"), [(0.5, 0.0), (0.9, 0.6)])
def test_the_gradient_is_that_of_finite_differences(level, tail_power):
    logits, classes = batch()
    # float32 sums by class would hide small differences: central ones of a step of 1e-2 do not.
    logits.requires_grad_()

    def value(at: torch.Tensor) -> torch.Tensor:
        losses = F.cross_entropy(at, classes, reduction="none")
        return robust_loss(losses, classes, 6, level, tail_power)

    (gradient,) = torch.autograd.grad(value(logits), logits)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        way = torch.randn(logits.shape, generator=generator, dtype=torch.float64)
        step = 1e-2
        ahead, behind = (value(logits.detach() + sign * step * way).item() for sign in (1, -1))
        slope = (ahead - behind) / (2 * step)
        assert (gradient * way).sum().item() == pytest.approx(slope, rel=2e-3, abs=1e-4)


def test_batches_give_the_gradient_of_the_whole():
    torch.manual_seed(0)
    classes = torch.multinomial(torch.tensor([0.7, 0.2, 0.1]), 6000, replacement=True)
    scores = torch.tensor([1.0, 0.5, 0.1], requires_grad=True)
    noise = 0.1 * torch.randn(6000)

    def losses(part: slice) -> torch.Tensor:
        return (scores[classes[part]] - 2.0) ** 2 + noise[part]

    whole = robust_loss(losses(slice(None)), classes, 3, 0.8, 0.5)
    (expected,) = torch.autograd.grad(whole, scores)
    module = RobustLoss(3, 0.8, 0.5)
    module(losses(slice(None)), classes)  # the running statistics are those of the whole
    module.eval()
    parts = [slice(begin, begin + 60) for begin in range(0, 6000, 60)]
    mean = torch.stack([module(losses(part), classes[part]) for part in parts]).mean()
    (found,) = torch.autograd.grad(mean, scores)
    torch.testing.assert_close(mean, whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_share_lies_between_the_mean_and_the_worst_mix():
    logits, classes = batch()
    losses = F.cross_entropy(logits, classes, reduction="none")
    found = [RobustLoss(6, 0.5, 0.3, share)(losses, classes).item() for share in (0.0, 0.25, 1.0)]
    assert found[0] == pytest.approx(losses.mean().item(), rel=1e-6)
    assert found[1] == pytest.approx(0.75 * found[0] + 0.25 * found[2], rel=1e-6)
    assert found[2] > found[0]


def test_invalid_predictions_count_for_nothing():
    logits, classes = batch()
    losses = F.cross_entropy(logits, classes, reduction="none")
    valid = torch.arange(len(classes)) % 3 > 0
    filled = torch.where(valid, losses, 1e6)
    torch.testing.assert_close(
        RobustLoss(6, 0.7, 0.3)(filled, classes, valid),
        RobustLoss(6, 0.7, 0.3)(losses[valid], classes[valid]),
    )
    torch.testing.assert_close(
        robust_loss(filled, classes, 6, 0.7, 0.3, valid),
        robust_loss(losses[valid], classes[valid], 6, 0.7, 0.3),
    )
    nothing = RobustLoss(6, 0.7, 0.3)(losses, classes, torch.zeros_like(valid))
    assert nothing.item() == 0


def test_evaluation_changes_no_statistics_and_they_are_saved():
    logits, classes = batch()
    losses = F.cross_entropy(logits, classes, reduction="none")
    module = RobustLoss(6, 0.7, 0.3)
    module(losses, classes)
    kept = {name: value.clone() for name, value in module.state_dict().items()}
    assert set(kept) == {"counts", "means"}
    module.eval()
    module(2 * losses, classes)
    assert all(torch.equal(value, kept[name]) for name, value in module.state_dict().items())


def test_two_ranks_see_the_statistics_of_both():
    logits, classes = batch()
    losses = F.cross_entropy(logits, classes, reduction="none").float()
    whole = RobustLoss(6, 0.7, 0.3)
    whole(losses, classes)
    halves = [slice(0, 35, 2), slice(1, 35, 2)]
    seen: list[torch.Tensor] = []
    for part in halves:
        RobustLoss(6, 0.7, 0.3, reduce=lambda x: seen.append(x) or x)(losses[part], classes[part])
    rank = RobustLoss(6, 0.7, 0.3, reduce=lambda _: seen[0] + seen[1])
    rank(losses[halves[0]], classes[halves[0]])
    torch.testing.assert_close(rank.weights(), whole.weights())


def test_it_compiles_without_a_break():
    module = RobustLoss(5, 0.7, 0.3)
    twin = RobustLoss(5, 0.7, 0.3)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        losses = torch.rand(40, generator=generator, requires_grad=True)
        classes = torch.randint(5, (40,), generator=generator)
        found, expected = compiled(losses, classes), twin(losses, classes)
        torch.testing.assert_close(found, expected)
        ours, theirs = (torch.autograd.grad(loss, losses)[0] for loss in (found, expected))
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(module.counts, twin.counts)


def test_it_refuses_settings_without_meaning():
    for level, power in ((0.0, 0.0), (1.1, 0.0), (0.5, -1.0)):
        with pytest.raises(ValueError, match="level"):
            RobustLoss(3, level, power)
    with pytest.raises(ValueError, match="share"):
        RobustLoss(3, 0.5, 0.0, share=1.5)


def long_tail(num: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points of 8 overlapping classes on a circle, shares falling by two each."""
    generator = torch.Generator().manual_seed(seed)
    shares = 0.5 ** torch.arange(1.0, 9.0)
    classes = torch.multinomial(shares, num, replacement=True, generator=generator)
    angle = classes * (2 * torch.pi / 8)
    centres = torch.stack((angle.cos(), angle.sin()), 1)
    return centres + 0.45 * torch.randn(num, 2, generator=generator), classes


def recalls(level: float, tail_power: float, share: float) -> tuple[float, float]:
    """Macro and weighted recall of a small network trained with the loss on a long tail."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.GELU(), torch.nn.Linear(32, 8))
    loss = RobustLoss(8, level, tail_power, share)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    points, classes = long_tail(20_000, seed=1)
    for step in range(300):
        part = slice(step * 256 % 19_000, step * 256 % 19_000 + 256)
        losses = F.cross_entropy(model(points[part]), classes[part], reduction="none")
        optimizer.zero_grad()
        loss(losses, classes[part]).backward()
        optimizer.step()
    points, classes = long_tail(20_000, seed=2)
    hits = (model(points).argmax(1) == classes).float()
    macro = torch.stack([hits[classes == b].mean() for b in range(8)]).mean()
    return macro.item(), hits.mean().item()


def test_it_finds_more_of_the_tail_than_cross_entropy():
    plain_macro, plain_weighted = recalls(1.0, 0.0, 0.0)
    robust_macro, robust_weighted = recalls(1.0, 0.6, 0.1)
    assert robust_macro > 1.05 * plain_macro
    assert robust_weighted > 0.99 * plain_weighted
