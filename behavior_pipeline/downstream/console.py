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
    left_out_sentences,
    number,
    signed,
)

COLUMNS: Final = {
    "rfm": "RFM",
    "embedding": "embedding",
    "rfm+embedding": "RFM +\nembedding",
    "untrained": "untrained",
    "random": "random",
}
TASKS: Final = {"churn": "Churn", "propensity": "Propensity", "next_action": "Next action"}
METRICS: Final = {"auroc": "AUROC", "accuracy": "accuracy"}
PROBES: Final = {"logistic_regression": "logistic", "gradient_boosting": "boosting"}
STYLES: Final = {1: "green", 0: "dim", -1: "red"}


def comparison_table(comparison: dict[str, Any]) -> Table:
    """Return churn, propensity and next action, with 95 % intervals; the controls at the right.

    Under the scores of the embedding stands their lift against RFM. Fits 80 columns.
    """
    table = Table(
        title=_title(comparison),
        caption=_caption(comparison),
        caption_justify="left",
        box=box.SIMPLE,
        padding=(0, 1),
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
    lines = [headline_sentence(verdicts(comparison))]
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
    if name in {"embedding", "rfm+embedding"}:
        lift = verdict.lifts[name]
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
