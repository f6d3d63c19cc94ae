"""A comparison in a few words: per task the probe that serves RFM best, and what beats it there.

Choosing the probe by RFM makes the baseline as hard as it can be.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from behavior_pipeline.downstream.representations import BASELINE, STRONG_BASELINE

HEADLINES: Final = (
    ("churn", "is_churned", "auroc"),
    ("propensity", "macro", "auroc"),
    ("next_action", "next_event_type", "accuracy"),
    ("next_action", "next_event_type", "macro_recall"),
    ("segments", "is_churned", "auroc"),
)
"""Task, target and metric of the figures that stand for a comparison."""

FURTHER: Final = (
    ("churn", "is_churned", "average_precision"),
    ("propensity", "macro", "average_precision"),
)
"""Figures that stand beside the headline ones in tables, without a verdict of their own."""

OUTCOMES: Final = {1: "win", 0: "tie", -1: "loss"}

TITLES: Final = {
    ("churn", "average_precision"): "Churn (average precision)",
    ("propensity", "average_precision"): "Propensity (average precision)",
    ("churn", "auroc"): "Churn",
    ("propensity", "auroc"): "Propensity",
    ("next_action", "accuracy"): "Next action (accuracy)",
    ("next_action", "macro_recall"): "Next action (macro recall)",
    ("segments", "auroc"): "Segments (by churn)",
}


@dataclass(frozen=True)
class Score:
    """A value with its interval, which is None where it could not be computed."""

    value: float
    ci_low: float | None
    ci_high: float | None

    @classmethod
    def of(cls, row: dict[str, Any]) -> Score:
        """Read a row of `results`, `lifts` or `naive`."""
        return cls(row["value"], row["ci_low"], row["ci_high"])

    @property
    def sign(self) -> int:
        """1 or -1 where the whole interval is above or below zero, else 0."""
        if self.ci_low is not None and self.ci_low > 0:
            return 1
        return -1 if self.ci_high is not None and self.ci_high < 0 else 0

    @property
    def outcome(self) -> str:
        """A difference as a win, a tie or a loss."""
        return OUTCOMES[self.sign]


@dataclass(frozen=True)
class Verdict:
    """One task and metric under one probe.

    Attributes:
        task, target, metric, probe: what is measured.
        scores: by representation.
        lifts: by representation other than RFM, the paired difference to RFM.
        further_lifts: by representation other than aggregates, that to aggregates.
    """

    task: str
    target: str
    metric: str
    probe: str
    scores: dict[str, Score]
    lifts: dict[str, Score]
    further_lifts: dict[str, Score]

    @property
    def title(self) -> str:
        """The task and metric in words."""
        return TITLES[self.task, self.metric]


def verdicts(comparison: dict[str, Any]) -> list[Verdict]:
    """Return the headline figures, each under the probe that serves RFM best."""
    found = []
    for task, target, metric in HEADLINES:
        candidates = probe_verdicts(comparison, task, target, metric)
        if candidates:
            found.append(max(candidates, key=lambda verdict: verdict.scores[BASELINE].value))
    return found


def probe_verdicts(
    comparison: dict[str, Any], task: str, target: str, metric: str
) -> list[Verdict]:
    """Return the figures of one target and metric, one entry per probe."""
    wanted = (task, target, metric)
    rows = [row for row in comparison["results"] if _key(row) == wanted]
    lifts = [row for row in comparison["lifts"] if _key(row) == wanted]
    probes = dict.fromkeys(row["probe"] for row in rows)
    return [
        Verdict(
            task,
            target,
            metric,
            probe,
            _by_representation(rows, probe),
            _by_representation(lifts, probe, BASELINE),
            _by_representation(lifts, probe, STRONG_BASELINE),
        )
        for probe in probes
    ]


def _key(row: dict[str, Any]) -> tuple[str, str, str]:
    """Return what a row measures."""
    return row["task"], row["target"], row["metric"]


def _by_representation(
    rows: list[dict[str, Any]], probe: str, baseline: str | None = None
) -> dict[str, Score]:
    """Return the scores under one probe, or the lifts against one baseline."""
    return {
        row["representation"]: Score.of(row)
        for row in rows
        if row["probe"] == probe and row.get("baseline") == baseline
    }
