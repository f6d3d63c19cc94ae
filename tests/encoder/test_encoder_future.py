from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from hypothesis import given, settings
from hypothesis import strategies as st

from behavior_pipeline.contracts import NUM_SPECIAL_IDS
from behavior_pipeline.encoder.contrast import hard_info_nce
from behavior_pipeline.encoder.future import (
    FutureWindow,
    WindowAlignment,
    future_labels,
    scaled_horizons,
)

NUM_TARGETS = 4


@st.composite
def logs(draw):
    """Users' times on a coarse grid (ties and hits of edges occur), ids, cutoffs, an end."""
    lists = draw(st.lists(st.lists(st.integers(0, 20), max_size=8), min_size=1, max_size=5))
    times = [sorted(part) for part in lists]
    ids = [
        [draw(st.integers(0, NUM_SPECIAL_IDS + NUM_TARGETS + 1)) for _ in part] for part in times
    ]
    cutoffs = draw(
        st.lists(
            st.tuples(st.integers(0, len(times) - 1), st.integers(0, 22)), min_size=0, max_size=6
        )
    )
    horizons = draw(st.sampled_from([(1,), (2, 8), (3, 5, 30)]))
    return times, ids, cutoffs, horizons, draw(st.integers(0, 25))


def flat(lists: list[list[int]]) -> np.ndarray:
    return np.array([value for part in lists for value in part], np.int64)


def labels_of(times, ids, cutoffs, horizons, through):
    offsets = np.concatenate(([0], np.cumsum([len(part) for part in times]))).astype(np.int64)
    users = np.array([user for user, _ in cutoffs], np.int64)
    moments = np.array([moment for _, moment in cutoffs], np.int64)
    return future_labels(
        flat(times), flat(ids), offsets, users, moments, horizons, NUM_TARGETS, through
    )


@settings(max_examples=400, deadline=None)
@given(logs())
def test_labels_equal_a_walk_through_every_event(log):
    times, ids, cutoffs, horizons, through = log
    expected = np.zeros((len(cutoffs), len(horizons), NUM_TARGETS), bool)
    for row, (user, cutoff) in enumerate(cutoffs):
        for place, horizon in enumerate(horizons):
            for time, token in zip(times[user], ids[user], strict=True):
                is_in = cutoff <= time < cutoff + horizon and time < through
                if is_in and 0 <= token - NUM_SPECIAL_IDS < NUM_TARGETS:
                    expected[row, place, token - NUM_SPECIAL_IDS] = True
    found = labels_of(*log)
    assert np.array_equal(found.window, expected)
    known = [[cutoff + horizon <= through for horizon in horizons] for _, cutoff in cutoffs]
    assert found.is_known.tolist() == known
    # A shorter window never holds what a longer one lacks.
    assert (found.window[:, :-1] <= found.window[:, 1:]).all()


@settings(max_examples=200, deadline=None)
@given(logs(), st.randoms(use_true_random=False))
def test_nothing_at_or_after_the_end_of_training_is_read(log, random):
    times, ids, cutoffs, horizons, through = log
    other_ids, other_times = [], []
    for part, tokens in zip(times, ids, strict=True):
        late = sum(time >= through for time in part)
        early = len(part) - late
        other_ids.append(tokens[:early] + [random.randint(4, 8) for _ in range(late)])
        later = sorted(random.randint(through, through + 30) for _ in range(late))
        other_times.append(part[:early] + later)
    changed = labels_of(other_times, other_ids, cutoffs, horizons, through)
    assert np.array_equal(changed.window, labels_of(*log).window)


def test_short_data_shorten_both_horizons_alike():
    day = 86_400_000_000
    assert scaled_horizons(30 * day) == (7 * day, 28 * day)
    assert scaled_horizons(14 * day) == (3.5 * day, 14 * day)
    with pytest.raises(ValueError, match="rise"):
        scaled_horizons(30 * day, (28.0, 7.0))


def example() -> tuple[FutureWindow, torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    head = FutureWindow(6, {"action": 3, "category": 5, "item": 0}, 2)
    window = {name: torch.rand(4, 2, size) < 0.4 for name, size in (("action", 3), ("category", 5))}
    return head, torch.randn(4, 6), window


def test_the_loss_is_binary_cross_entropy_over_the_known_windows():
    head, hidden, window = example()
    known = torch.tensor([[True, True], [True, False], [False, False], [True, True]])
    valid = torch.tensor([True, True, True, False])
    logits = head.logits(hidden)
    assert {name: tuple(value.shape) for name, value in logits.items()} == {
        "action": (4, 2, 3), "category": (4, 2, 5),
    }  # fmt: skip
    terms = []
    for row, place in ((0, 0), (0, 1), (1, 0)):
        terms.append(
            sum(
                F.binary_cross_entropy_with_logits(
                    logits[name][row, place], window[name][row, place].float(), reduction="sum"
                )
                / logits[name].shape[2] ** 0.5
                for name in logits
            )
        )
    torch.testing.assert_close(head(hidden, window, known, valid), torch.stack(terms).mean())
    assert head(hidden, window, known, torch.zeros_like(valid)).item() == 0


def test_heads_start_at_the_rates_they_are_given():
    head, hidden, _ = example()
    rates = torch.tensor([[0.01, 0.2, 0.5], [0.05, 0.4, 0.9]])
    head.start_from({"action": rates})
    predicted = head.logits(hidden)["action"].sigmoid()
    torch.testing.assert_close(predicted, rates.expand(4, -1, -1), atol=0.01, rtol=0)


def test_the_alignment_is_the_contrast_of_the_projections():
    torch.manual_seed(0)
    align = WindowAlignment(8, temperature=0.2, beta=0.5)
    state, following = torch.randn(6, 8), torch.randn(6, 8)
    valid = torch.arange(6) != 2
    expected = hard_info_nce(
        align.projection(state), align.projection(following), 0.2, 0.5, valid=valid
    )
    torch.testing.assert_close(align(state, following, valid), expected)


def test_the_cosine_stops_the_gradient_of_the_window():
    torch.manual_seed(0)
    align = WindowAlignment(8, "cosine")
    state, following = torch.randn(5, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    valid = torch.tensor([True, True, False, True, True])
    loss = align(state, following, valid)
    predicted = align.predictor(align.projection(state))
    cosines = F.cosine_similarity(predicted, align.projection(following))
    torch.testing.assert_close(loss, (1 - cosines[valid]).mean())
    ours, theirs = torch.autograd.grad(loss, (state, following), allow_unused=True)
    assert theirs is None
    assert (ours[2] == 0).all()
    assert ours[0].abs().sum() > 0
    assert align(state, following, torch.zeros(5, dtype=torch.bool)).item() == 0
    with pytest.raises(ValueError, match="method"):
        WindowAlignment(8, "nearest")


@pytest.mark.parametrize("method", ["contrast", "cosine"])
def test_alignment_finds_the_own_window_of_a_user(method):
    # What follows is a fixed rotation of the state with noise: alignment has to learn it.
    torch.manual_seed(0)
    turn = torch.linalg.qr(torch.randn(12, 12))[0]
    reader = torch.nn.Linear(12, 12)
    align = WindowAlignment(12, method)
    optimizer = torch.optim.Adam([*align.parameters(), *reader.parameters()], lr=3e-3)
    for _ in range(250):
        past = torch.randn(64, 12)
        loss = align(reader(past), past @ turn, torch.ones(64, dtype=torch.bool))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    past = torch.randn(200, 12)
    with torch.no_grad():
        left = align.projection(reader(past))
        left = left if method == "contrast" else align.predictor(left)
        right = align.projection(past @ turn + 0.1 * torch.randn(200, 12))
        near = (F.normalize(left, dim=1) @ F.normalize(right, dim=1).T).argmax(1)
    assert (near == torch.arange(200)).float().mean() > 0.5  # by chance 0.005


def test_both_compile_without_a_break():
    head, hidden, window = example()
    known, valid = torch.ones(4, 2, dtype=torch.bool), torch.arange(4) < 3
    compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        compiled(hidden, window, known, valid), head(hidden, window, known, valid)
    )
    align = WindowAlignment(6, beta=0.5)
    compiled = torch.compile(align, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        compiled(hidden, hidden + 1, valid), align(hidden, hidden + 1, valid)
    )
