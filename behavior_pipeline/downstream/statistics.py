"""Metrics with bootstrap intervals over test users, and paired lifts.

All estimates on the same users share the same resamples, so that the difference of two of them is
a paired bootstrap. A resample is a row of counts, which is a weight per user: the metrics are
weighted metrics, and nothing is sorted again per resample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Counts = NDArray[np.uint16]

CONFIDENCE: Final = 0.95
CHUNK_CELLS: Final = 4_000_000  # cells of a resample matrix in floating point at once: 32 MB


@dataclass(frozen=True)
class Estimate:
    """A metric on the test users and on each resample of them.

    Attributes:
        value: on the users themselves.
        samples: (S,) values on resamples; NaN where a resample leaves the metric undefined.
    """

    value: float
    samples: Floats

    def __sub__(self, other: Estimate) -> Estimate:
        """Return the paired difference: both must come from the same resamples."""
        return Estimate(self.value - other.value, self.samples - other.samples)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The percentile interval at 95 %, or None where no resample defined the metric."""
        defined = self.samples[~np.isnan(self.samples)]
        if not defined.size:
            return None
        tail = (1 - CONFIDENCE) / 2
        low, high = np.quantile(defined, [tail, 1 - tail])
        return float(low), float(high)


def resample_counts(num_users: int, num_samples: int, seed: int) -> Counts:
    """Return (S, N) counts: how often each user is drawn in each resample with replacement.

    They lie user by user in memory, because metrics pick users, not resamples.
    """
    generator = np.random.default_rng([seed, num_users])
    counts = np.empty((num_samples, num_users), dtype=np.uint16, order="F")
    for row in counts:
        drawn = generator.integers(num_users, size=num_users)
        row[:] = np.bincount(drawn, minlength=num_users)
    return counts


def estimate_auroc(labels: NDArray[np.bool_], scores: Floats, counts: Counts) -> Estimate:
    """Return the area under the ROC curve of (N,) scores, ties counting one half."""
    return _estimate(weighted_auroc, labels, scores, counts)


def estimate_average_precision(
    labels: NDArray[np.bool_], scores: Floats, counts: Counts
) -> Estimate:
    """Return the average precision of (N,) scores: of random ones, the share of positives."""
    return _estimate(weighted_average_precision, labels, scores, counts)


def weighted_auroc(labels: NDArray[np.bool_], scores: Floats, counts: Counts) -> Floats:
    """Return the (S,) areas under the ROC curve for (S, N) weights; NaN without both classes.

    The Mann-Whitney form: a positive wins against every negative of a lower score, and half against
    one of the same score. Negatives are sorted once; their running weights then tell for each
    positive what it wins in every resample.
    """
    negatives = np.flatnonzero(~labels)
    negatives = negatives[np.argsort(scores[negatives], kind="stable")]
    positives = np.flatnonzero(labels)
    running = np.zeros((len(negatives) + 1, len(counts)), dtype=np.int32)
    np.cumsum(counts.T[negatives], axis=0, out=running[1:])
    below = np.searchsorted(scores[negatives], scores[positives], side="left")
    not_above = np.searchsorted(scores[negatives], scores[positives], side="right")
    weights = counts.T[positives].astype(np.float64)
    wins = np.einsum("ns,ns->s", weights, (running[below] + running[not_above]) / 2)
    pairs = weights.sum(axis=0) * running[-1]
    undefined = np.full(len(counts), np.nan)
    return np.asarray(np.divide(wins, pairs, out=undefined, where=pairs > 0))


def weighted_average_precision(labels: NDArray[np.bool_], scores: Floats, counts: Counts) -> Floats:
    """Return the (S,) average precisions for (S, N) weights; NaN without a positive.

    The mean over positives of the precision among users who score at least as high: the step-wise
    area under the precision-recall curve. Users are sorted once, as in `weighted_auroc`.
    """
    order = np.argsort(-scores, kind="stable")
    descending, is_positive = -scores[order], labels[order]
    places = np.flatnonzero(is_positive)
    thresholds = np.unique(descending[places])
    num_at_least = np.searchsorted(descending, thresholds, side="right")
    num_hits = np.searchsorted(descending[places], thresholds, side="right")
    everyone = np.cumsum(counts.T[order], axis=0, dtype=np.int32)[num_at_least - 1]
    hits = np.cumsum(counts.T[order[places]], axis=0, dtype=np.int32)[num_hits - 1]
    precision = np.divide(hits, everyone, out=np.zeros(hits.shape), where=everyone > 0)
    gained = np.diff(hits, axis=0, prepend=np.zeros((1, len(counts)), dtype=np.int32))
    area = np.einsum("gs,gs->s", gained.astype(np.float64), precision)
    total = counts.T[order[places]].sum(axis=0, dtype=np.int64)
    undefined = np.full(len(counts), np.nan)
    return np.asarray(np.divide(area, total, out=undefined, where=total > 0))


def estimate_accuracy(is_correct: NDArray[np.bool_], counts: Counts) -> Estimate:
    """Return the share of users whose class was told right."""
    samples = counts.astype(np.float64) @ is_correct / len(is_correct)
    return Estimate(float(is_correct.mean()), samples)


def estimate_macro_recall(
    classes: NDArray[np.int64], is_correct: NDArray[np.bool_], counts: Counts
) -> Estimate:
    """Return the mean over the true classes of the share told right: rare classes count alike."""
    ones = np.ones((1, len(classes)), dtype=np.uint16)
    value = _macro_recall(classes, is_correct, ones)[0]
    return Estimate(float(value), _macro_recall(classes, is_correct, counts))


def mean_estimate(estimates: list[Estimate]) -> Estimate:
    """Return the mean of estimates on the same resamples, over those that a resample defines."""
    samples = np.stack([estimate.samples for estimate in estimates])
    is_defined = ~np.isnan(samples)
    num_defined = is_defined.sum(axis=0)
    total = np.where(is_defined, samples, 0).sum(axis=0)
    mean = np.divide(total, num_defined, out=np.full(len(total), np.nan), where=num_defined > 0)
    return Estimate(float(np.mean([estimate.value for estimate in estimates])), mean)


def _estimate(
    metric: Callable[[NDArray[np.bool_], Floats, Counts], Floats],
    labels: NDArray[np.bool_],
    scores: Floats,
    counts: Counts,
) -> Estimate:
    """Return a weighted metric on the users and on each resample, some resamples at a time."""
    ones = np.ones((1, len(labels)), dtype=np.uint16)
    value = metric(labels, scores, ones)[0]
    rows = max(1, CHUNK_CELLS // max(len(labels), 1))
    chunks = [counts[at : at + rows] for at in range(0, len(counts), rows)]
    samples = [metric(labels, scores, chunk) for chunk in chunks]
    return Estimate(float(value), np.concatenate(samples) if samples else np.empty(0))


def _macro_recall(
    classes: NDArray[np.int64], is_correct: NDArray[np.bool_], counts: Counts
) -> Floats:
    """Return (S,) mean recalls over the classes that a resample holds."""
    membership = classes[:, None] == np.unique(classes)
    weights = counts.astype(np.float64)
    totals = weights @ membership
    hits = weights @ (membership & is_correct[:, None])
    recalls = np.divide(hits, totals, out=np.zeros_like(hits), where=totals > 0)
    return np.asarray(recalls.sum(axis=1) / (totals > 0).sum(axis=1))
