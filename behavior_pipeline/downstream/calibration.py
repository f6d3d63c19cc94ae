"""Probabilities that mean what they say: Platt scaling on scores that no model had seen.

Each training user is scored by a model that was fitted without them (three stratified folds); a
logistic curve from these log-odds to the labels is the calibrator; the model itself is fitted on
everyone. Platt, "Probabilistic outputs for support vector machines" (1999); the scheme is that of
scikit-learn's `CalibratedClassifierCV(ensemble=False)`, for many targets over the same columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold

from behavior_pipeline.downstream.blocks import Blocks
from behavior_pipeline.downstream.probes import (
    MIN_PROBABILITY,
    PROBES,
    FittedProbes,
    ProbeName,
    fit_model,
    in_parallel,
    prepare,
)

Floats = NDArray[np.float64]
Labels = NDArray[np.bool_]

NUM_FOLDS: Final = 3
NUM_BINS: Final = 10
WEAK_PENALTY: Final = 1e6  # C of the calibrating curve: two parameters need no shrinking


@dataclass(frozen=True)
class CalibratedProbe:
    """A fitted probe with one calibrating curve per target.

    Attributes:
        probes: models on all training users.
        slopes, intercepts: (T,) of the curve on the log-odds.
        log_loss: mean over targets, of calibrated probabilities of users left out of the fit.
    """

    probes: FittedProbes
    slopes: Floats
    intercepts: Floats
    log_loss: float

    def predict(self, blocks: Blocks) -> Floats:
        """Return (N, T) calibrated probabilities of the positive class of each target."""
        scores = [_log_odds(probabilities[:, 1]) for probabilities in self.probes.predict(blocks)]
        return _sigmoid(np.column_stack(scores) * self.slopes + self.intercepts)


@dataclass(frozen=True)
class ReliabilityBin:
    """Users of like predicted probability.

    Attributes:
        predicted: mean predicted probability.
        observed: share that was positive.
        num_users: how many.
    """

    predicted: float
    observed: float
    num_users: int


def fit_calibrated(
    name: ProbeName, blocks: Blocks, labels: Sequence[Labels], seed: int, threads: int
) -> CalibratedProbe:
    """Fit and calibrate a probe for targets that each have at least `NUM_FOLDS` users per class."""
    columns, penalty = prepare(name, blocks, labels, seed, threads)
    matrix = columns(blocks)

    def held_out_scores(y: Labels) -> Floats:
        scores = np.empty(len(y))
        folds = StratifiedKFold(NUM_FOLDS, shuffle=True, random_state=seed)
        for kept, held_out in folds.split(matrix, y):
            model = fit_model(name, matrix[kept], y[kept], penalty)
            scores[held_out] = _log_odds(model.predict_proba(matrix[held_out])[:, 1])
        return scores

    models = in_parallel(lambda y: fit_model(name, matrix, y, penalty), labels, threads)
    scores = in_parallel(held_out_scores, labels, threads)
    curves = np.array([_fit_curve(s, y) for s, y in zip(scores, labels, strict=True)])
    slopes, intercepts = curves[:, 0], curves[:, 1]
    calibrated = _sigmoid(np.column_stack(scores) * slopes + intercepts)
    return CalibratedProbe(
        FittedProbes(name, penalty, columns, tuple(models)),
        slopes,
        intercepts,
        _log_loss(calibrated, np.column_stack(labels)),
    )


def choose_calibrated(
    blocks: Blocks, labels: Sequence[Labels], seed: int, threads: int
) -> CalibratedProbe:
    """Fit both probes and return the one of the lower log loss on users left out of the fit."""
    candidates = [fit_calibrated(name, blocks, labels, seed, threads) for name in PROBES]
    return min(candidates, key=lambda candidate: candidate.log_loss)


def brier_score(labels: Labels, probabilities: Floats) -> float:
    """Return the mean squared difference of probability and outcome: 0 is perfect."""
    return float(np.mean((probabilities - labels) ** 2))


def reliability(labels: Labels, probabilities: Floats) -> list[ReliabilityBin]:
    """Return ten bins of as many users each, from the lowest probabilities to the highest."""
    order = np.argsort(probabilities, kind="stable")
    return [
        ReliabilityBin(float(probabilities[rows].mean()), float(labels[rows].mean()), len(rows))
        for rows in np.array_split(order, NUM_BINS)
        if len(rows)
    ]


def _fit_curve(scores: Floats, labels: Labels) -> tuple[float, float]:
    """Return slope and intercept of the calibrating curve."""
    curve = LogisticRegression(C=WEAK_PENALTY, max_iter=1000).fit(scores[:, None], labels)
    return float(curve.coef_[0, 0]), float(curve.intercept_[0])


def _log_odds(probabilities: Floats) -> Floats:
    """Return log-odds, finite also for a model that is certain."""
    clipped = probabilities.clip(MIN_PROBABILITY, 1 - MIN_PROBABILITY)
    return np.asarray(np.log(clipped) - np.log1p(-clipped))


def _sigmoid(log_odds: Floats) -> Floats:
    """Return probabilities of log-odds."""
    return np.asarray(1 / (1 + np.exp(-log_odds)))


def _log_loss(probabilities: Floats, labels: Labels) -> float:
    """Return the mean negative log probability of what happened."""
    chosen = np.where(labels, probabilities, 1 - probabilities)
    return float(-np.log(chosen.clip(min=MIN_PROBABILITY)).mean())
