"""Every representation under every probe on a task: estimates that share their resamples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from behavior_pipeline.downstream import naive
from behavior_pipeline.downstream.blocks import Blocks, take
from behavior_pipeline.downstream.clusters import fit_clusters
from behavior_pipeline.downstream.probes import PROBES, FittedProbes, ProbeName, fit_probes
from behavior_pipeline.downstream.representations import REPRESENTATIONS
from behavior_pipeline.downstream.statistics import (
    Counts,
    Estimate,
    estimate_accuracy,
    estimate_auroc,
    estimate_average_precision,
    estimate_macro_recall,
    mean_estimate,
    resample_counts,
)
from behavior_pipeline.downstream.tasks import (
    MACRO_TARGET,
    NEXT_ACTION_TARGET,
    Task,
    class_codes,
)
from behavior_pipeline.downstream.users import Population
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage

AUROC: Final = "auroc"
AVERAGE_PRECISION: Final = "average_precision"
ACCURACY: Final = "accuracy"
MACRO_RECALL: Final = "macro_recall"

Floats = NDArray[np.float64]

BINARY_METRICS: Final[dict[str, Callable[[NDArray[np.bool_], Floats, Counts], Estimate]]] = {
    AUROC: estimate_auroc,
    AVERAGE_PRECISION: estimate_average_precision,
}
"""Metrics of a target that a user meets or not, all on the same resamples."""


@dataclass(frozen=True)
class Bench:
    """Users, labels and representations at both cutoffs."""

    train: Population
    test: Population
    train_representations: dict[str, Blocks]
    test_representations: dict[str, Blocks]
    checkpoint_id: str


@dataclass(frozen=True)
class Measure:
    """One estimate with what it is an estimate of."""

    task: str
    target: str
    representation: str
    probe: str
    metric: str
    estimate: Estimate
    num_train: int
    num_test: int
    positive_rate: float | None


def measure_task(
    bench: Bench, task: Task, settings: Settings, step: Callable[[str], None]
) -> tuple[list[Measure], dict[tuple[str, str], list[Floats]]]:
    """Fit both probes on every representation at the train cutoff and judge them at the test one.

    Returns:
        The measures, and by representation and probe the (N, K) test probabilities per target.
    """
    counts = resample_counts(int(task.test_rows.sum()), settings.bootstrap_samples, settings.seed)
    measures: list[Measure] = []
    scores: dict[tuple[str, str], list[Floats]] = {}
    for representation in REPRESENTATIONS if task.targets else ():
        train, test = _task_blocks(bench, task, representation, settings)
        for probe in PROBES:
            step(f"{task.name}: {representation} under {probe.replace('_', ' ')}")
            fitted = fit_probes(probe, train, task.train_labels, settings.seed, settings.threads)
            scores[representation, probe] = fitted.predict(test)
            measures += _measures(
                bench, task, representation, probe, fitted, scores[representation, probe], counts
            )
    return measures, scores


def measure_naive(bench: Bench, task: Task, storage: Storage, settings: Settings) -> list[Measure]:
    """Judge the predictors of the next action that learn nothing, on the same users."""
    if not task.targets:
        return []
    counts = resample_counts(int(task.test_rows.sum()), settings.bootstrap_samples, settings.seed)
    users = bench.test.user_ids.filter(task.test_rows)
    known = bench.train.next_event_types.drop_null()
    predictions = {
        "most_frequent": naive.most_frequent(known, len(users)),
        "most_recent": naive.most_recent(storage, settings, bench.test.cutoff, users),
    }
    actual = bench.test.next_event_types.filter(task.test_rows)
    return [
        Measure(task.name, NEXT_ACTION_TARGET, name, "none", metric, estimate, 0, len(users), None)
        for name, predicted in predictions.items()
        if predicted is not None
        for metric, estimate in _class_estimates(
            class_codes(actual), naive.is_correct(predicted, actual), counts
        )
    ]


def _task_blocks(
    bench: Bench, task: Task, representation: str, settings: Settings
) -> tuple[Blocks, Blocks]:
    """Return what the probes of a task read of its train and of its test users."""
    train = take(bench.train_representations[representation], task.train_rows)
    test = take(bench.test_representations[representation], task.test_rows)
    if task.name != "segments":
        return train, test
    clusters = fit_clusters(train, settings.num_segments, settings.seed)
    return clusters.membership(train), clusters.membership(test)


def _measures(
    bench: Bench,
    task: Task,
    representation: str,
    probe: ProbeName,
    fitted: FittedProbes,
    probabilities: list[Floats],
    counts: Counts,
) -> Iterator[Measure]:
    """Yield the estimates of one representation under one probe, the macro mean last."""
    num_train, num_test = int(task.train_rows.sum()), int(task.test_rows.sum())

    def measure(target: str, metric: str, estimate: Estimate, rate: float | None) -> Measure:
        return Measure(
            task.name, target, representation, probe, metric, estimate, num_train, num_test, rate
        )

    if task.classes:
        actual = class_codes(bench.test.next_event_types.filter(task.test_rows))
        predicted = fitted.models[0].classes_[probabilities[0].argmax(axis=1)]
        hits = predicted == task.test_labels[0]
        for metric, estimate in _class_estimates(actual, hits, counts):
            yield measure(NEXT_ACTION_TARGET, metric, estimate, None)
        return
    rates = [float(y.mean()) for y in task.test_labels]
    for metric, estimated in BINARY_METRICS.items():
        estimates = [
            estimated(y, p[:, 1], counts)
            for y, p in zip(task.test_labels, probabilities, strict=True)
        ]
        for target, estimate, rate in zip(task.targets, estimates, rates, strict=True):
            yield measure(target, metric, estimate, rate)
        if task.name == "propensity":
            yield measure(MACRO_TARGET, metric, mean_estimate(estimates), float(np.mean(rates)))


def _class_estimates(
    actual: NDArray[np.int64], hits: NDArray[np.bool_], counts: Counts
) -> list[tuple[str, Estimate]]:
    """Return accuracy and macro recall of a multiclass prediction."""
    return [
        (ACCURACY, estimate_accuracy(hits, counts)),
        (MACRO_RECALL, estimate_macro_recall(actual, hits, counts)),
    ]
