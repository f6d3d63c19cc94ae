"""What is said of the vectors of two nights."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from behavior_pipeline.embeddings.drift import (
    NUM_NEIGHBOURS,
    compare_nights,
    neighbours,
    rigidly_moved,
)

NUM_USERS, WIDTH = 200, 8


def vectors(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(NUM_USERS, WIDTH)).astype(np.float32)


def rotation(seed: int) -> np.ndarray:
    square = np.random.default_rng(seed).normal(size=(WIDTH, WIDTH))
    return np.linalg.qr(square)[0]


def test_a_night_that_changes_nothing() -> None:
    found = compare_nights(vectors(), vectors())
    assert found is not None
    overlaps = (found.neighbour_overlap, found.cross_overlap, found.aligned_overlap)
    assert overlaps == (1.0, 1.0, 1.0)
    assert found.moved == 0.0
    assert found.moved_aligned == pytest.approx(0.0, abs=1e-6)
    assert found.num_users == NUM_USERS


@given(seed=st.integers(0, 1000), shift=st.floats(-5, 5))
@hypothesis_settings(max_examples=20)
def test_a_rotation_and_shift_keep_neighbours_but_leave_the_space(seed: int, shift: float) -> None:
    before = vectors(seed)
    found = compare_nights((before @ rotation(seed) + shift).astype(np.float32), before)
    assert found is not None
    assert found.neighbour_overlap > 0.995  # ties of float32 may fall the other way
    assert found.aligned_overlap > 0.995
    assert found.cross_overlap < 0.6
    assert found.moved_aligned < 1e-5 < found.moved


def test_vectors_that_have_nothing_to_do_with_each_other_share_neighbours_by_chance() -> None:
    found = compare_nights(vectors(1), vectors(2))
    assert found is not None
    by_chance = NUM_NEIGHBOURS / (NUM_USERS - 1)
    assert found.neighbour_overlap == pytest.approx(by_chance, abs=0.03)


def test_neighbours_by_hand() -> None:
    points = np.array([[0.0], [1.0], [3.0]])
    assert np.sort(neighbours(points, points), axis=1).tolist() == [[1, 2], [0, 2], [0, 1]]
    line = np.arange(30.0)[:, None]
    assert 0 not in neighbours(line, line)[0]
    assert set(neighbours(line, line)[0]) == set(range(1, NUM_NEIGHBOURS + 1))


def test_encoders_of_another_width_share_no_space() -> None:
    found = compare_nights(vectors()[:, :4], vectors())
    assert found is not None
    assert found.cross_overlap == found.aligned_overlap == 0.0
    assert np.isinf(found.moved)
    assert found.neighbour_overlap > 0


def test_too_few_users_say_nothing() -> None:
    assert compare_nights(vectors()[:2], vectors()[:2]) is None


def test_vectors_of_zeros_have_not_moved() -> None:
    zeros = np.zeros((20, WIDTH), np.float32)
    found = compare_nights(zeros, zeros)
    assert found is not None
    assert found.moved == 0.0


def test_the_best_motion_undoes_a_motion() -> None:
    before = vectors().astype(np.float64)
    moved = before @ rotation(3) - 2.0
    np.testing.assert_allclose(rigidly_moved(moved, before), before, atol=1e-10)
