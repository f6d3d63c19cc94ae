"""Paired bootstrap over users of all cutoffs and seeds, and what wins.

A user is drawn with all that was predicted for them, at every cutoff and by every seed: within a
resample the macro AUROC is averaged over cutoffs and seeds, and a difference is one of averages.
All representations share the resamples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from kept_results import Result
from quality_cells import COMBINED, Cell, Place, read_arrays, rows_of
from quality_cutoffs import Moments

from behavior_pipeline.downstream.statistics import (
    Estimate,
    estimate_auroc,
    mean_estimate,
    resample_counts,
)

BOOSTING = "gradient_boosting"
STATED = {"rfm": BOOSTING, "aggregates": BOOSTING}
"""Representations whose probe is named beforehand; others take the lower held-out loss."""
RULES = ("stated", "held_out")
COMPARISONS = (
    ("embedding", "rfm"),
    ("embedding", "aggregates"),
    (COMBINED, "aggregates"),
    ("embedding", "coles"),
    ("embedding", "supervised"),
    ("embedding", "untrained"),
)
BOOTSTRAP_SEED = 0


@dataclass(frozen=True)
class Judged:
    """A cell with what was measured.

    Attributes:
        result: by `task/probe` AUROC and held-out loss.
        estimates: by `task/probe` the macro AUROC on the judged users and on each resample.
    """

    cell: Cell
    result: Result
    estimates: dict[str, Estimate]

    def chosen(self, task: str, rule: str) -> Estimate | None:
        """Return the estimate under the probe that a rule chooses; None without the task."""
        probe = chosen_probe(self.result, self.cell.representation, task, rule)
        return None if probe is None else self.estimates[f"{task}/{probe}"]


def average_precision(
    judged: Iterable[Judged], task: str, representation: str, split: str, rule: str
) -> float:
    """Return the mean average precision over targets, cutoffs and seeds under the chosen probe."""
    found = []
    for each in judged:
        probe = chosen_probe(each.result, representation, task, rule)
        if (each.cell.representation, each.cell.split) == (representation, split) and probe:
            found.append(each.result[f"{task}/{probe}"]["average_precision"])
    return float(np.mean(found))


def chosen_probe(result: Result, representation: str, task: str, rule: str) -> str | None:
    """Return the probe named beforehand, or that of the lower loss held out at the train cutoff."""
    losses = {
        name.partition("/")[2]: found["held_out_loss"]
        for name, found in result.items()
        if name.partition("/")[0] == task
    }
    if not losses:
        return None
    if rule == "stated" and STATED.get(representation) in losses:
        return STATED[representation]
    return min(losses, key=lambda probe: losses[probe])


def judge(place: Place, cell: Cell, result: Result, num_samples: int) -> Judged:
    """Estimate the macro AUROC of a finished cell on shared resamples."""
    data = _opened(place.data)
    pair = data.pairs[cell.pair]
    before, after = (data.users(moment) for moment in pair)
    _, rows = rows_of(cell, before, after)
    counts = _counts(place.data, num_samples)[cell.pair][:, rows]
    scores = read_arrays(place.scores(cell))
    labels = {task.name: task.test_labels for task in data.tasks(pair)}
    estimates = {
        name: macro_auroc([each[rows] for each in labels[name.partition("/")[0]]], found, counts)
        for name, found in scores.items()
    }
    return Judged(cell, result, estimates)


@lru_cache(maxsize=4)
def _opened(folder: Path) -> Moments:
    """Open a folder once a process."""
    return Moments.at(folder)


@lru_cache(maxsize=4)
def _counts(folder: Path, num_samples: int) -> list[np.ndarray]:
    """Return the shared resamples of a folder's test users, once a process."""
    data = _opened(folder)
    people = [data.users(after).user_ids.to_pylist() for _, after in data.pairs]
    return shared_resamples(people, num_samples)


def shared_resamples(people: list[list[str]], num_samples: int) -> list[np.ndarray]:
    """Return per cutoff (S, N) counts: whoever is drawn is drawn at all cutoffs, as often.

    Args:
        people: ids of the users judged at each cutoff; the unit is the user, whatever the cutoff.
        num_samples: S.
    """
    everyone = sorted(set().union(*people))
    place_of = {user: place for place, user in enumerate(everyone)}
    counts = resample_counts(len(everyone), num_samples, BOOTSTRAP_SEED)
    return [counts[:, [place_of[user] for user in users]] for users in people]


def macro_auroc(labels: list[np.ndarray], scores: np.ndarray, counts: np.ndarray) -> Estimate:
    """Return the mean AUROC over targets that have both classes among the users.

    Args:
        labels: (N,) booleans per target.
        scores: (N, targets).
        counts: (S, N).
    """
    found = [
        estimate_auroc(each, scores[:, place].astype(np.float64), counts)
        for place, each in enumerate(labels)
        if 0 < each.sum() < len(each)
    ]
    return mean_estimate(found)


def over_cells(
    judged: Iterable[Judged], task: str, representation: str, split: str, rule: str
) -> Estimate | None:
    """Return the mean over cutoffs and seeds; None if nothing was measured.

    A representation without a seed counts once a cutoff.
    """
    wanted = (representation, split)
    cells = [each for each in judged if (each.cell.representation, each.cell.split) == wanted]
    found = [each.chosen(task, rule) for each in cells]
    estimates = [each for each in found if each is not None]
    return mean_estimate(estimates) if estimates else None


def probe_mean(
    judged: Iterable[Judged], task: str, representation: str, split: str
) -> dict[str, float]:
    """Return by probe the mean AUROC over cutoffs and seeds."""
    values: dict[str, list[float]] = {}
    for each in judged:
        if (each.cell.representation, each.cell.split) != (representation, split):
            continue
        for name, estimate in each.estimates.items():
            if name.partition("/")[0] == task:
                values.setdefault(name.partition("/")[2], []).append(estimate.value)
    return {probe: float(np.mean(found)) for probe, found in values.items()}


def relative(ours: Estimate, theirs: Estimate) -> Estimate:
    """Return by which share ours is higher."""
    return Estimate(ours.value / theirs.value - 1, ours.samples / theirs.samples - 1)


def verdict(difference: Estimate) -> str:
    """Return win or loss where the whole interval is on one side of zero, else tie."""
    interval = difference.interval
    if interval is None:
        return "tie"
    low, high = interval
    return "win" if low > 0 else "loss" if high < 0 else "tie"


def compare(ours: Estimate, theirs: Estimate) -> Mapping[str, object]:
    """Return difference and relative lift with intervals, and the verdict."""
    difference, lift = ours - theirs, relative(ours, theirs)
    return {
        "difference": difference.value,
        "difference_interval": difference.interval,
        "relative": lift.value,
        "relative_interval": lift.interval,
        "verdict": verdict(difference),
    }
