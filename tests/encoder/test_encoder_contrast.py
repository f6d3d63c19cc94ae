from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere

from behavior_pipeline.encoder.contrast import hard_info_nce


def info_nce(left: torch.Tensor, right: torch.Tensor, temperature: float) -> torch.Tensor:
    """van den Oord et al. 2018, equation 4, in both directions, as a cross-entropy."""
    scores = F.normalize(left, dim=1) @ F.normalize(right, dim=1).T / temperature
    own = torch.arange(len(left))
    return (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2


def windows(count: int = 12, width: int = 8, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(count, width, generator=generator)
    return left, left + torch.randn(count, width, generator=generator)


def direct(left, right, temperature, beta, tau, floor) -> torch.Tensor:
    """The formula as it stands, anchor by anchor, without logarithms of sums."""
    scores = (F.normalize(left, dim=1) @ F.normalize(right, dim=1).T / temperature).double()
    losses = []
    for part in (scores, scores.T):
        for anchor in range(len(part)):
            others = torch.cat((part[anchor, :anchor], part[anchor, anchor + 1 :]))
            weights = (beta * others).exp()
            weighted = (weights / weights.mean() * others.exp()).sum()
            own = part[anchor, anchor].exp()
            total = (weighted - len(others) * tau * own) / (1 - tau)
            total = total.clamp(min=len(others) * floor)
            losses.append(-torch.log(own / (own + total)))
    return torch.stack(losses).mean().float()


def test_without_hardness_it_is_info_nce_in_value_and_gradient():
    left, right = windows()
    left.requires_grad_()
    ours, theirs = hard_info_nce(left, right, 0.1), info_nce(left, right, 0.1)
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(loss, left)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients)


def test_two_pairs_by_hand():
    left = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    right = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    # Cosines: [[1, s], [0, s]] with s = 1 / sqrt 2, over temperature 0.5.
    s = 1 / math.sqrt(2)
    rows = [math.log(1 + math.exp((s - 1) / 0.5)), math.log(1 + math.exp((0 - s) / 0.5))]
    columns = [math.log(1 + math.exp((0 - 1) / 0.5)), math.log(1 + math.exp((s - s) / 0.5))]
    expected = (sum(rows) / 2 + sum(columns) / 2) / 2
    assert hard_info_nce(left, right, 0.5).item() == pytest.approx(expected, rel=1e-6)


def test_rows_that_are_no_pairs_count_as_if_they_were_not_there():
    torch.manual_seed(0)
    left, right = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4)
    is_pair = torch.tensor([True, False, True, True, False])
    loss = hard_info_nce(left, right, 0.1, valid=is_pair)
    torch.testing.assert_close(loss, info_nce(left[is_pair], right[is_pair], 0.1))
    for nobody in (torch.zeros(5, dtype=torch.bool), torch.arange(5) == 2):
        loss = hard_info_nce(left, right, 0.1, valid=nobody)
        assert loss.item() == 0
        assert not torch.autograd.grad(loss, left)[0].any()


@pytest.mark.parametrize("beta", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("tau", [0.0, 0.1, 0.4])
def test_it_is_the_formula(beta, tau):
    left, right = windows()
    expected = direct(left, right, 0.5, beta, tau, math.exp(-1 / 0.5))
    found = hard_info_nce(left, right, 0.5, beta, tau)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_the_nearest_other_user_is_pushed_away_harder():
    left = torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.3, 0.0], [-0.5, 0.0, 1.0]], requires_grad=True)
    pulls = []
    for beta in (0.0, 2.0):
        scores = hard_info_nce(left, left.detach().clone(), 0.5, beta)
        (gradient,) = torch.autograd.grad(scores, left)
        pulls.append(gradient[0] @ torch.tensor([0.0, 1.0, 0.0]))
    # The first user's gradient points to the near second user: descent moves away from it.
    assert pulls[1] > 1.2 * pulls[0] > 0


def test_invalid_pairs_are_neither_anchors_nor_negatives():
    left, right = windows()
    valid = torch.arange(12) % 3 != 1
    spoiled = torch.where(valid[:, None], left, 1e3 * torch.ones_like(left))
    found = hard_info_nce(spoiled, right, 0.1, 1.0, 0.1, valid)
    expected = hard_info_nce(left[valid], right[valid], 0.1, 1.0, 0.1)
    torch.testing.assert_close(found, expected)


def test_windows_of_one_user_are_no_negatives_of_each_other():
    left, right = windows(4)
    users = torch.tensor([0, 1, 2, 2])
    parts = []
    for anchor, others in ((0, [1, 2, 3]), (1, [0, 2, 3]), (2, [0, 1]), (3, [0, 1])):
        scores = F.normalize(left, dim=1) @ F.normalize(right, dim=1).T / 0.2
        for part in (scores, scores.T):
            kept = part[anchor, [anchor, *others]]
            parts.append(torch.logsumexp(kept, 0) - kept[0])
    found = hard_info_nce(left, right, 0.2, users=users)
    torch.testing.assert_close(found, torch.stack(parts).mean())


def test_pairs_without_a_negative_cost_nothing_and_spoil_nothing():
    left, right = windows(3)
    left.requires_grad_()
    for valid in (torch.zeros(3, dtype=torch.bool), torch.tensor([False, True, False])):
        loss = hard_info_nce(left, right, 0.1, 1.0, 0.2, valid)
        (gradient,) = torch.autograd.grad(loss, left)
        assert loss.item() == 0
        assert (gradient == 0).all()


def test_low_temperatures_stay_finite():
    left, right = windows()
    left.requires_grad_()
    loss = hard_info_nce(left, right, 0.005, 2.0, 0.1)
    (gradient,) = torch.autograd.grad(loss, left)
    assert loss.isfinite()
    assert gradient.isfinite().all()


def test_it_compiles_without_a_break():
    left, right = windows()
    valid = torch.arange(12) < 9
    compiled = torch.compile(hard_info_nce, backend="aot_eager", fullgraph=True)
    found = compiled(left, right, 0.1, 1.0, 0.1, valid)
    torch.testing.assert_close(found, hard_info_nce(left, right, 0.1, 1.0, 0.1, valid))
