"""The comparison: is the embedding worth more than RFM, than aggregates, than the controls?

Probes are fitted on the users, features and labels of the train cutoff, and judged on those of the
test cutoff, one horizon later. Written beside `comparison.json`: `calibration.json` (how far the
calibrated churn probability can be believed) and `churn_scores.parquet` (every test user's score).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from behavior_pipeline.downstream.aggregates import load_aggregates
from behavior_pipeline.downstream.calibration import brier_score, choose_calibrated, reliability
from behavior_pipeline.downstream.measurement import (
    AUROC,
    Bench,
    Measure,
    measure_naive,
    measure_task,
)
from behavior_pipeline.downstream.population import load_population, load_targets
from behavior_pipeline.downstream.probes import PROBES
from behavior_pipeline.downstream.representations import (
    BASELINE,
    REPRESENTATIONS,
    STRONG_BASELINE,
    build_representations,
)
from behavior_pipeline.downstream.tasks import Task, churn_task, next_action_task, propensity_task
from behavior_pipeline.downstream.users import Population
from behavior_pipeline.downstream.verdict import Score, verdicts
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.ingest.presets import Preset
from behavior_pipeline.progress import Report, report_nothing
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage, write_json, writing_file
from behavior_pipeline.windows import EvaluationWindows

COMPARISON_FILE: Final = "comparison.json"
CALIBRATION_FILE: Final = "calibration.json"
SCORES_FILE: Final = "churn_scores.parquet"
SCORING_REPRESENTATION: Final = "rfm+embedding"
DIGITS: Final = 6

Floats = NDArray[np.float64]


def compare(
    storage: Storage,
    settings: Settings,
    preset: Preset,
    windows: EvaluationWindows,
    report: Report = report_nothing,
) -> dict[str, Any]:
    """Measure every task, representation and probe; write `comparison.json` and return it.

    The result holds no time of its own making: the same inputs give the same bytes.

    Raises:
        PipelineError: if a mart or an embedding is missing, if embeddings of the two cutoffs come
            from different checkpoints, or if nobody is in the population.
    """
    bench = _load_bench(storage, settings, preset, windows)
    churn, propensity, next_action, segments = tasks = _tasks(bench)
    step = _Steps(report, len(REPRESENTATIONS) * len(PROBES) * sum(bool(t.targets) for t in tasks))
    measures: list[Measure] = []
    for task in (churn, propensity, next_action, segments):
        found, scores = measure_task(bench, task, settings, step)
        measures += found
        if task is churn:
            _write_scores(storage.reports(windows.cutoff), bench.test, scores)
    naive = measure_naive(bench, next_action, storage, settings)
    content = _content(bench, settings, preset, windows, tasks, measures, naive)
    _write_calibration(storage.reports(windows.cutoff), bench, churn, settings)
    write_json(storage.reports(windows.cutoff) / COMPARISON_FILE, content)
    return content


def headline(comparison: dict[str, Any]) -> dict[str, Any]:
    """Return the few figures that stand for a comparison, by readable keys, as plain values."""
    figures: dict[str, Any] = {
        "checkpoint_id": comparison["checkpoint_id"],
        "is_simulated": comparison["is_simulated"],
    }
    for verdict in verdicts(comparison):
        for representation, score in verdict.scores.items():
            figures[f"{verdict.task} {verdict.metric}, {representation}"] = score.value
    return figures


class _Steps:
    """Counts what is done, for the progress bar."""

    def __init__(self, report: Report, total: int) -> None:
        self._report, self._total, self._done = report, total, 0

    def __call__(self, message: str) -> None:
        self._done += 1
        self._report(self._done, self._total, message)


def _load_bench(
    storage: Storage, settings: Settings, preset: Preset, windows: EvaluationWindows
) -> Bench:
    """Load both cutoffs; the targets are those of the train cutoff at both."""
    targets = load_targets(storage, windows.train_cutoff, settings.num_targets)
    train = load_population(storage, settings, windows.train_cutoff, targets)
    test = load_population(storage, settings, windows.test_cutoff, targets)
    features = [
        load_aggregates(storage, settings, preset, windows, population)
        for population in (train, test)
    ]
    before, checkpoint_before = build_representations(storage, train, features[0], settings.seed)
    after, checkpoint_after = build_representations(storage, test, features[1], settings.seed)
    if checkpoint_before != checkpoint_after:
        raise PipelineError(
            f"Embeddings at {_day(train.cutoff)} come from checkpoint {checkpoint_before}, those "
            f"at {_day(test.cutoff)} from {checkpoint_after}.",
            "A probe cannot cross checkpoints: embed both cutoffs with the live one.",
        )
    return Bench(train, test, before, after, checkpoint_before)


def _tasks(bench: Bench) -> tuple[Task, Task, Task, Task]:
    """Return churn, propensity, next action and segments."""
    train, test = bench.train, bench.test
    return (
        churn_task(train, test),
        propensity_task(train, test),
        next_action_task(train, test),
        churn_task(train, test, "segments"),
    )


def _content(
    bench: Bench,
    settings: Settings,
    preset: Preset,
    windows: EvaluationWindows,
    tasks: Sequence[Task],
    measures: list[Measure],
    naive: list[Measure],
) -> dict[str, Any]:
    """Return what `comparison.json` holds."""
    return {
        "source": preset.name,
        "is_simulated": preset.is_simulated,
        "checkpoint_id": bench.checkpoint_id,
        "train_cutoff": _day(windows.train_cutoff),
        "test_cutoff": _day(windows.test_cutoff),
        "horizon_days": windows.horizon.days,
        "lookback_days": windows.lookback.days,
        "seed": settings.seed,
        "bootstrap_samples": settings.bootstrap_samples,
        "population": {
            "train": _population_row(bench.train),
            "test": _population_row(bench.test),
        },
        "results": [_result_row(measure) for measure in measures],
        "lifts": _lift_rows(measures),
        "naive": [_naive_row(measure) for measure in naive],
        "left_out": [asdict(left_out) for task in tasks for left_out in task.left_out],
    }


def _population_row(population: Population) -> dict[str, Any]:
    """Return how many users there are, how many were used and how many of those churned."""
    return {
        "num_users": population.num_users,
        "num_sampled": len(population),
        "churn_rate": _rounded(float(population.is_churned.mean())),
    }


def _result_row(measure: Measure) -> dict[str, Any]:
    """Return one row of `results`."""
    rate = measure.positive_rate
    return {
        "task": measure.task,
        "target": measure.target,
        "representation": measure.representation,
        "probe": measure.probe,
        "metric": measure.metric,
        **_estimate_columns(measure),
        "num_train": measure.num_train,
        "num_test": measure.num_test,
        "positive_rate": None if rate is None else _rounded(rate),
    }


def _naive_row(measure: Measure) -> dict[str, Any]:
    """Return one row of `naive`."""
    return {
        "task": measure.task,
        "target": measure.target,
        "predictor": measure.representation,
        "metric": measure.metric,
        **_estimate_columns(measure),
        "num_test": measure.num_test,
    }


def _lift_rows(measures: list[Measure]) -> list[dict[str, Any]]:
    """Return the paired difference of all to RFM, then to aggregates, under the same probe."""

    def key(measure: Measure) -> tuple[str, str, str, str]:
        return measure.task, measure.target, measure.probe, measure.metric

    named = {(m.representation, *key(m)): m for m in measures}
    return [
        {
            "task": measure.task,
            "target": measure.target,
            "representation": measure.representation,
            "baseline": baseline,
            "probe": measure.probe,
            "metric": measure.metric,
            **_difference_columns(measure, named[baseline, *key(measure)]),
        }
        for baseline in (BASELINE, STRONG_BASELINE)
        for measure in measures
        if measure.representation != baseline
    ]


def _estimate_columns(measure: Measure) -> dict[str, float | None]:
    """Return value and interval of a measure."""
    low, high = measure.estimate.interval or (None, None)
    return {
        "value": _rounded(measure.estimate.value),
        "ci_low": None if low is None else _rounded(low),
        "ci_high": None if high is None else _rounded(high),
    }


def _difference_columns(measure: Measure, baseline: Measure) -> dict[str, Any]:
    """Return value and interval of a paired difference, and whether it is a win, tie or loss."""
    difference = measure.estimate - baseline.estimate
    low, high = difference.interval or (None, None)
    columns = {
        "value": _rounded(difference.value),
        "ci_low": None if low is None else _rounded(low),
        "ci_high": None if high is None else _rounded(high),
    }
    return {**columns, "verdict": Score.of(columns).outcome}


def _write_scores(
    folder: Path, test: Population, scores: dict[tuple[str, str], list[Floats]]
) -> None:
    """Write every test user's churn score, one column per representation and probe."""
    if not scores:
        (folder / SCORES_FILE).unlink(missing_ok=True)
        return
    columns: dict[str, Any] = {
        "user_id": test.user_ids,
        "is_churned": pa.array(test.is_churned),
    }
    for (representation, probe), probabilities in scores.items():
        columns[f"{representation} {probe}"] = pa.array(probabilities[0][:, 1])
    with writing_file(folder / SCORES_FILE) as aside:
        pq.write_table(pa.table(columns), aside)


def _write_calibration(folder: Path, bench: Bench, churn: Task, settings: Settings) -> None:
    """Judge, at the test cutoff, a churn probability calibrated at the train cutoff."""
    if not churn.targets:
        (folder / CALIBRATION_FILE).unlink(missing_ok=True)
        return
    train = bench.train_representations[SCORING_REPRESENTATION]
    test = bench.test_representations[SCORING_REPRESENTATION]
    probe = choose_calibrated(train, churn.train_labels, settings.seed, settings.threads)
    probabilities = probe.predict(test)[:, 0]
    labels = churn.test_labels[0]
    base_rate = np.full(len(labels), churn.train_labels[0].mean())
    content = {
        "representation": SCORING_REPRESENTATION,
        "probe": probe.probes.name,
        "metric_of_ranking": AUROC,
        "brier_score": _rounded(brier_score(labels, probabilities)),
        "brier_score_of_base_rate": _rounded(brier_score(labels, base_rate)),
        "mean_predicted": _rounded(float(probabilities.mean())),
        "mean_observed": _rounded(float(labels.mean())),
        "bins": [
            {
                "predicted": _rounded(b.predicted),
                "observed": _rounded(b.observed),
                "num_users": b.num_users,
            }
            for b in reliability(labels, probabilities)
        ],
    }
    write_json(folder / CALIBRATION_FILE, content)


def _rounded(value: float) -> float:
    """Return a number short enough to be the same on any machine."""
    return round(value, DIGITS)


def _day(cutoff: datetime) -> str:
    """Return a cutoff as a date."""
    return f"{cutoff:%Y-%m-%d}"
