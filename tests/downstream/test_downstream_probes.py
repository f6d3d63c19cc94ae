from __future__ import annotations

import numpy as np
import pytest
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import QuantileTransformer

from behavior_pipeline.downstream.blocks import Block, Blocks
from behavior_pipeline.downstream.calibration import brier_score, fit_calibrated, reliability
from behavior_pipeline.downstream.clusters import fit_clusters
from behavior_pipeline.downstream.probes import BOOSTING, PROBES, Normalizer, ProbeName, fit_probes

RNG = np.random.default_rng(0)
SEPARABLE = RNG.normal(size=(400, 5))
LABELS = SEPARABLE[:, 0] > 0.2


def vectors(values: np.ndarray = SEPARABLE) -> Blocks:
    return (Block("vector", values.astype(np.float32)),)


@pytest.mark.parametrize("probe", PROBES)
def test_separable_users_are_separated(probe: ProbeName) -> None:
    fitted = fit_probes(probe, vectors(SEPARABLE[:200]), [LABELS[:200], ~LABELS[:200]], 0, 2)
    right, wrong = fitted.predict(vectors(SEPARABLE[200:]))
    assert roc_auc_score(LABELS[200:], right[:, 1]) > 0.98
    assert roc_auc_score(LABELS[200:], wrong[:, 1]) < 0.02


def test_rfm_alone_is_exactly_the_reference_pipeline() -> None:
    rng = np.random.default_rng(5)
    rfm = np.exp(rng.normal(size=(1500, 3)))
    labels = rng.random(1500) < 1 / (1 + rfm[:, 0])
    reference = make_pipeline(
        QuantileTransformer(n_quantiles=1000, output_distribution="normal", random_state=0),
        LogisticRegression(C=1, max_iter=1000),
    ).fit(rfm[:1000], labels[:1000])
    fitted = fit_probes("logistic_regression", (Block("rfm", rfm[:1000]),), [labels[:1000]], 0, 1)
    ours = fitted.predict((Block("rfm", rfm[1000:]),))[0]
    np.testing.assert_array_equal(ours, reference.predict_proba(rfm[1000:]))


@pytest.mark.parametrize("probe", PROBES)
def test_number_of_threads_changes_nothing(probe: ProbeName) -> None:
    labels = [LABELS, SEPARABLE[:, 1] > 0, SEPARABLE[:, 2] > 1]
    one, three = (fit_probes(probe, vectors(), labels, 0, n).predict(vectors()) for n in (1, 3))
    for first, second in zip(one, three, strict=True):
        np.testing.assert_array_equal(first, second)


def test_blocks_weigh_alike_whatever_their_number_of_columns() -> None:
    rng = np.random.default_rng(1)
    blocks = (
        Block("rfm", np.exp(rng.normal(size=(500, 3)))),
        Block("vector", rng.normal(size=(500, 50))),
    )
    columns = Normalizer().fit(blocks).transform(blocks)
    assert (columns[:, 3:] ** 2).sum(axis=1).mean() == pytest.approx(1)
    assert (columns[:, :3] ** 2).sum(axis=1).mean() == pytest.approx(1, abs=0.1)


def test_noise_is_shrunk_and_signal_is_not() -> None:
    rng = np.random.default_rng(2)
    noise = rng.normal(size=(400, 60))
    noisy = fit_probes("logistic_regression", vectors(noise), [rng.random(400) < 0.5], 0, 1)
    clear = fit_probes("logistic_regression", vectors(), [LABELS], 0, 1)
    assert noisy.penalty == 0.1
    assert clear.penalty == 100


@pytest.mark.parametrize("probe", PROBES)
def test_one_class_alone_is_certain(probe: ProbeName) -> None:
    fitted = fit_probes(probe, vectors(), [np.ones(400, dtype=bool)], 0, 1)
    assert (fitted.predict(vectors())[0] == 1).all()


def test_calibrated_probability_means_what_it_says() -> None:
    rng = np.random.default_rng(7)
    signal = rng.normal(size=(6000, 3))
    truth = 1 / (1 + np.exp(-(1.5 * signal[:, 0] - 1)))
    labels = rng.random(6000) < truth
    for probe in PROBES:
        fitted = fit_calibrated(probe, vectors(signal[:3000]), [labels[:3000]], 0, 2)
        ours = fitted.predict(vectors(signal[3000:]))[:, 0]
        assert np.abs(ours - truth[3000:]).mean() < 0.06
        assert brier_score(labels[3000:], ours) < brier_score(labels[3000:], np.full(3000, 0.33))


def test_reliability_bins_hold_every_user_once() -> None:
    probabilities = np.linspace(0, 1, 101)
    labels = probabilities > 0.5
    bins = reliability(labels, probabilities)
    assert sum(row.num_users for row in bins) == 101
    assert [row.observed for row in bins][:5] == [0, 0, 0, 0, 0]
    assert bins[-1].predicted == pytest.approx(0.955, abs=0.01)
    assert brier_score(np.array([True, False]), np.array([0.5, 0.0])) == 0.125


def test_clusters_find_clumps_and_name_each_users_nearest() -> None:
    rng = np.random.default_rng(0)
    clumps = np.repeat(np.array([[0.0, 0], [10, 0], [0, 10]]), 20, axis=0)
    clumps += rng.normal(size=(60, 2)) / 10
    clusters = fit_clusters(vectors(clumps), 3, seed=0)
    nearest, distances = clusters.assign(vectors(clumps))
    assert [len(set(nearest[at : at + 20])) for at in (0, 20, 40)] == [1, 1, 1]
    assert len(set(nearest)) == 3
    columns = clusters.normalizer.transform(vectors(clumps))
    brute = np.linalg.norm(columns[:, None] - clusters.centers, axis=2)
    np.testing.assert_allclose(distances, brute.min(axis=1), atol=1e-6)
    membership = clusters.membership(vectors(clumps))[0].values
    assert (membership.sum(axis=1) == 1).all()


def test_fewer_distinct_users_make_fewer_clusters() -> None:
    same = np.repeat(np.array([[0.0, 1], [2, 3]]), 10, axis=0)
    assert len(fit_clusters(vectors(same), 6, seed=0).centers) == 2


def test_boosted_models_that_share_bins_are_those_fitted_one_by_one() -> None:
    rng = np.random.default_rng(5)
    columns = rng.normal(size=(300, 4))
    columns[rng.random(columns.shape) < 0.1] = 0
    targets = [columns[:, k] + rng.normal(size=300) > 0 for k in range(3)]
    new = rng.normal(size=(50, 4))
    fitted = fit_probes("gradient_boosting", (Block("rfm", columns),), targets, 0, 2)
    shared = fitted.predict((Block("rfm", new),))
    for target, found in zip(targets, shared, strict=True):
        alone = HistGradientBoostingClassifier(**BOOSTING, random_state=0).fit(columns, target)
        np.testing.assert_array_equal(found, alone.predict_proba(new))
