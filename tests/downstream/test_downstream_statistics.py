from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    recall_score,
    roc_auc_score,
)

from behavior_pipeline.downstream.statistics import (
    Estimate,
    estimate_accuracy,
    estimate_auroc,
    estimate_average_precision,
    estimate_macro_recall,
    mean_estimate,
    resample_counts,
    weighted_auroc,
    weighted_average_precision,
)

users = st.lists(
    st.tuples(st.booleans(), st.integers(-3, 3), st.integers(0, 4)), min_size=1, max_size=40
)


@given(users)
def test_weighted_auroc_is_that_of_repeated_users(rows: list[tuple[bool, int, int]]) -> None:
    labels = np.array([row[0] for row in rows])
    scores = np.array([row[1] for row in rows], dtype=float)
    counts = np.array([[row[2] for row in rows]], dtype=np.uint16)
    repeated = np.repeat(labels, counts[0]), np.repeat(scores, counts[0])
    value = weighted_auroc(labels, scores, counts)[0]
    if len(set(repeated[0])) < 2:
        assert np.isnan(value)
    else:
        assert value == pytest.approx(roc_auc_score(*repeated), abs=1e-12)


@given(users)
def test_weighted_average_precision_is_that_of_repeated_users(
    rows: list[tuple[bool, int, int]],
) -> None:
    labels = np.array([row[0] for row in rows])
    scores = np.array([row[1] for row in rows], dtype=float)
    counts = np.array([[row[2] for row in rows]], dtype=np.uint16)
    repeated = np.repeat(labels, counts[0]), np.repeat(scores, counts[0])
    value = weighted_average_precision(labels, scores, counts)[0]
    if not repeated[0].any():
        assert np.isnan(value)
    else:
        assert value == pytest.approx(average_precision_score(*repeated), abs=1e-12)


def test_average_precision_by_hand() -> None:
    """Positives at places 1 and 3 of 4: the mean of 1/1 and 2/3; drawn twice, the third of 3/4."""
    labels = np.array([True, False, True, False])
    scores = np.array([4.0, 3.0, 2.0, 1.0])
    counts = np.array([[1, 1, 2, 0]], dtype=np.uint16)
    estimate = estimate_average_precision(labels, scores, counts)
    assert estimate.value == pytest.approx((1 + 2 / 3) / 2)
    assert estimate.samples == pytest.approx([(1 + 2 * 3 / 4) / 3])


def test_interval_is_that_of_drawing_users_again() -> None:
    rng = np.random.default_rng(3)
    labels = rng.random(150) < 0.3
    scores = np.round(rng.normal(size=150) + labels, 1)
    counts = resample_counts(150, 60, seed=4)
    assert (counts.sum(axis=1) == 150).all()
    estimate = estimate_auroc(labels, scores, counts)
    drawn = [np.repeat(np.arange(150), row) for row in counts]
    brute = [roc_auc_score(labels[rows], scores[rows]) for rows in drawn]
    np.testing.assert_allclose(estimate.samples, brute, atol=1e-12)
    assert estimate.value == pytest.approx(roc_auc_score(labels, scores))
    assert estimate.interval == pytest.approx(tuple(np.quantile(brute, [0.025, 0.975])))


def test_resamples_depend_on_the_seed_and_nothing_else() -> None:
    assert (resample_counts(20, 5, 1) == resample_counts(20, 5, 1)).all()
    assert (resample_counts(20, 5, 1) != resample_counts(20, 5, 2)).any()


def test_paired_difference_of_the_same_scores_is_exactly_nothing() -> None:
    labels = np.arange(30) % 3 == 0
    scores = np.sin(np.arange(30.0))
    counts = resample_counts(30, 40, 0)
    one = estimate_auroc(labels, scores, counts)
    assert (one - estimate_auroc(labels, 2 * scores + 1, counts)).interval == (0.0, 0.0)


def test_accuracy_and_macro_recall_agree_with_sklearn() -> None:
    rng = np.random.default_rng(0)
    actual = rng.integers(0, 4, size=80)
    predicted = np.where(rng.random(80) < 0.6, actual, rng.integers(0, 4, size=80))
    counts = resample_counts(80, 10, 0)
    accuracy = estimate_accuracy(predicted == actual, counts)
    recall = estimate_macro_recall(actual, predicted == actual, counts)
    assert accuracy.value == pytest.approx(accuracy_score(actual, predicted))
    assert recall.value == pytest.approx(recall_score(actual, predicted, average="macro"))
    rows = np.repeat(np.arange(80), counts[7])
    again = recall_score(
        actual[rows], predicted[rows], average="macro", labels=np.unique(actual[rows])
    )
    assert recall.samples[7] == pytest.approx(again)


def test_macro_mean_leaves_out_what_a_resample_does_not_define() -> None:
    estimates = [
        Estimate(0.5, np.array([0.4, np.nan, np.nan])),
        Estimate(0.9, np.array([0.8, 0.6, np.nan])),
    ]
    mean = mean_estimate(estimates)
    assert mean.value == pytest.approx(0.7)
    np.testing.assert_allclose(mean.samples, [0.6, 0.6, np.nan])
    assert mean.interval == pytest.approx((0.6, 0.6))


def test_without_a_defined_resample_there_is_no_interval() -> None:
    assert Estimate(0.5, np.array([np.nan])).interval is None
