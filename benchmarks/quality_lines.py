"""Figures of a data set as flat records: scores, comparisons, low-label curves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from quality_cells import EVERYONE, REPRESENTATIONS, SPLITS
from quality_cutoffs import TASKS
from quality_statistics import (
    COMPARISONS,
    RULES,
    Judged,
    average_precision,
    compare,
    over_cells,
    probe_mean,
)

Line = dict[str, Any]


def lines_of(judged: list[Judged]) -> Iterator[Line]:
    """Yield the scores and then the comparisons of a data set, task by task, split by split."""
    for task in TASKS:
        for split in SPLITS:
            for representation in REPRESENTATIONS:
                yield from score_lines(judged, task, representation, split)
            for ours, theirs in COMPARISONS:
                for rule in rules_of(split):
                    yield from comparison_lines(judged, task, ours, theirs, split, rule)


def rules_of(split: str) -> tuple[str, ...]:
    """Return how probes are chosen: with few labels boosting cannot be named beforehand.

    A tree needs 20 users a leaf, so that with a few dozen labels it would tell nothing.
    """
    return RULES if split in {EVERYONE, "new users"} else RULES[1:]


def score_lines(judged: list[Judged], task: str, representation: str, split: str) -> Iterator[Line]:
    """Yield the mean AUROC of a representation over cutoffs and seeds, with its interval."""
    for rule in rules_of(split):
        found = over_cells(judged, task, representation, split, rule)
        if found is None:
            continue
        yield {
            "kind": "score", "task": task, "split": split, "representation": representation,
            "rule": rule, "value": found.value, "unit": "macro AUROC",
            "interval": rounded(found.interval),
            "average_precision": rounded(
                average_precision(judged, task, representation, split, rule)
            ),
            "by_probe": {
                probe: round(value, 4)
                for probe, value in probe_mean(judged, task, representation, split).items()
            },
            "by_cutoff": by_cutoff(judged, task, representation, split, rule),
            "spread_over_seeds": spread_over_seeds(judged, task, representation, split, rule),
        }  # fmt: skip


def comparison_lines(
    judged: list[Judged], task: str, ours: str, theirs: str, split: str, rule: str
) -> Iterator[Line]:
    """Yield the difference of two representations on the same users."""
    pair = [over_cells(judged, task, name, split, rule) for name in (ours, theirs)]
    if pair[0] is None or pair[1] is None:
        return
    found = compare(pair[0], pair[1])
    yield {
        "kind": "comparison", "task": task, "split": split, "rule": rule, "ours": ours,
        "theirs": theirs, "value": found["difference"], "unit": "difference of macro AUROC",
        "interval": rounded(found["difference_interval"]),
        "relative": rounded(found["relative"]),
        "relative_interval": rounded(found["relative_interval"]),
        "verdict": found["verdict"],
    }  # fmt: skip


def by_cutoff(
    judged: list[Judged], task: str, representation: str, split: str, rule: str
) -> list[float]:
    """Return the mean over seeds at each cutoff, in order."""
    pairs = sorted({each.cell.pair for each in judged})
    groups = [[each for each in judged if each.cell.pair == pair] for pair in pairs]
    found = [over_cells(group, task, representation, split, rule) for group in groups]
    return [round(each.value, 4) for each in found if each is not None]


def spread_over_seeds(
    judged: list[Judged], task: str, representation: str, split: str, rule: str
) -> float | None:
    """Return the standard deviation of the means over cutoffs; None with one seed."""
    seeds = sorted({each.cell.seed for each in judged})
    groups = [[each for each in judged if each.cell.seed == seed] for seed in seeds]
    found = [over_cells(group, task, representation, split, rule) for group in groups]
    values = [each.value for each in found if each is not None]
    return round(float(np.std(values, ddof=1)), 4) if len(values) > 1 else None


def rounded(value: Any) -> Any:
    """Return numbers with four digits after the point."""
    if isinstance(value, tuple):
        return [rounded(each) for each in value]
    return None if value is None else round(float(value), 4)
