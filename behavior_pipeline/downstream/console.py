"""The comparison as a table for the terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from rich import box
from rich.table import Table

from behavior_pipeline.downstream.verdict import (
    HEADLINES,
    Score,
    Verdict,
    probe_verdicts,
    verdicts,
)
from behavior_pipeline.downstream.wording import (
    DASH,
    headline_sentence,
    joined,
    left_out_sentences,
    number,
    signed,
)

COLUMNS: Final = {
    "rfm": "RFM",
    "aggregates": "aggre-\ngates",
    "embedding": "embed-\nding",
    "rfm+embedding": "RFM +\nembed.",
    "aggregates+embedding": "aggr. +\nembed.",
    "untrained": "un-\ntrained",
}
TASKS: Final = {"churn": "Churn", "propensity": "Propensity", "next_action": "Next action"}
METRICS: Final = {"auroc": "AUROC", "accuracy": "accuracy"}
PROBES: Final = {"logistic_regression": "logistic", "gradient_boosting": "boosting"}
STYLES: Final = {1: "green", 0: "dim", -1: "red"}


def comparison_table(comparison: dict[str, Any]) -> Table:
    """Return churn, propensity and next action, with 95 % intervals; a control at the right.

    Under the scores of the embedding stands their lift against RFM, or against aggregates where
    these are beside it. Fits 80 columns, and so leaves random vectors to the caption.
    """
    table = Table(
        title=_title(comparison),
        caption=_caption(comparison),
        caption_justify="left",
        box=box.SIMPLE,
        padding=(0, 0),  # the box has a space between columns; intervals fill the rest
    )
    table.add_column("task", no_wrap=True)
    for heading in COLUMNS.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for task, target, metric in HEADLINES:
        if task in TASKS and metric in METRICS:
            for verdict in probe_verdicts(comparison, task, target, metric):
                table.add_row(_name(verdict), *[_cell(verdict, name) for name in COLUMNS])
    return table


def _title(comparison: dict[str, Any]) -> str:
    """Say what was compared, and that it is simulated where it is."""
    note = " (simulated events)" if comparison["is_simulated"] else ""
    return (
        f"{comparison['source']}{note}: fitted at {comparison['train_cutoff']}, "
        f"judged at {comparison['test_cutoff']}"
    )


def _caption(comparison: dict[str, Any]) -> str:
    """Give the verdict and what could not be measured."""
    found = verdicts(comparison)
    lines = [headline_sentence(found)]
    controls = [
        f"{_short(number(verdict.scores['random'].value))} ({PROBES[verdict.probe]})"
        for verdict in probe_verdicts(comparison, *HEADLINES[0])
    ]
    if controls:
        lines.append(f"Random vectors on churn: {joined(controls)}.")
    left_out = left_out_sentences(comparison)
    lines += left_out[:1]
    if len(left_out) > 1:
        lines.append(f"{len(left_out) - 1} more notes are in the report.")
    return "\n".join(lines)


def _name(verdict: Verdict) -> str:
    """Name a task, its metric and its probe."""
    probe = PROBES[verdict.probe]
    return f"{TASKS[verdict.task]}\n[dim]{METRICS[verdict.metric]}\n{probe}[/dim]"


def _cell(verdict: Verdict, name: str) -> str:
    """Write a score, its interval and, for the embedding, the lift with its own."""
    score = verdict.scores[name]
    lines = [_short(number(score.value)), f"[dim]{_span(score, number)}[/dim]"]
    lifts = verdict.further_lifts if name == "aggregates+embedding" else verdict.lifts
    if name in {"embedding", "rfm+embedding", "aggregates+embedding"}:
        lift = lifts[name]
        style = STYLES[lift.sign]
        lines.append(f"[{style}]{_short(signed(lift.value))}[/{style}]")
        lines.append(f"[{style}]{_span(lift, signed)}[/{style}]")
    return "\n".join(lines)


def _span(score: Score, write: Callable[[float | None], str]) -> str:
    """Write an interval as narrow as it goes."""
    return f"{_short(write(score.ci_low))}{DASH}{_short(write(score.ci_high))}"


def _short(text: str) -> str:
    """Leave out the zero before the point."""
    return text.replace("0.", ".", 1)
