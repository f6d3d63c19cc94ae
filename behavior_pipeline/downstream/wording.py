"""Numbers and verdicts as people read them; the page and the terminal say the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from behavior_pipeline.downstream.verdict import Score, Verdict

NAMES: Final = {
    "random": "random vectors",
    "untrained": "untrained encoder",
    "rfm": "RFM",
    "embedding": "embedding",
    "aggregates+embedding": "aggregates + embedding",
    "rfm+embedding": "RFM + embedding",
    "logistic_regression": "logistic regression",
    "gradient_boosting": "gradient boosting",
    "most_frequent": "most frequent type",
    "most_recent": "user's last type",
    "is_churned": "churned",
    "next_event_type": "next event type",
    "macro": "mean of all targets",
    "next_action": "next action",
    "auroc": "AUROC",
    "average_precision": "average precision",
    "macro_recall": "macro recall",
}
DASH: Final = "\N{EN DASH}"
MINUS: Final = "\N{MINUS SIGN}"
SIGNS: Final = {1: "better", 0: "no clear difference", -1: "worse"}


def in_words(name: str) -> str:
    """Return a name of the comparison as people say it."""
    return NAMES.get(name, name)


def number(value: float | None) -> str:
    """Write a score with three decimals."""
    return DASH if value is None else f"{value:.3f}"


def signed(value: float | None) -> str:
    """Write a difference with its sign and three decimals."""
    return DASH if value is None else f"{value:+.3f}".replace("-", MINUS)


def interval(score: Score) -> str:
    """Write the interval of a score."""
    return f"{number(score.ci_low)} to {number(score.ci_high)}"


def signed_interval(score: Score) -> str:
    """Write the interval of a difference."""
    return f"{signed(score.ci_low)} to {signed(score.ci_high)}"


def joined(parts: Sequence[str]) -> str:
    """Join words as in a sentence."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def headline_sentence(verdicts: Sequence[Verdict]) -> str:
    """Say where RFM with the embedding beats RFM alone, and aggregates with it aggregates alone."""
    tasks = [verdict for verdict in verdicts if verdict.metric != "macro_recall"]
    if not tasks:
        return "Nothing could be measured on these events."
    told = [verdict for verdict in tasks if verdict.task != "segments"]
    if not told:
        return "Only segments were measured."
    to_rfm = {verdict.task: verdict.lifts["rfm+embedding"] for verdict in told}
    to_aggregates = {
        verdict.task: verdict.further_lifts["aggregates+embedding"] for verdict in told
    }
    return f"{_added('RFM', to_rfm)} {_added('aggregates', to_aggregates)}"


def _added(baseline: str, lifts: Mapping[str, Score]) -> str:
    """Say on which tasks the embedding adds to a baseline."""
    phrases = {
        1: f"beats {baseline} alone on {{}}",
        -1: f"does worse than {baseline} alone on {{}}",
        0: "makes no clear difference on {}",
    }
    by_sign = {
        sign: [in_words(task) for task, lift in lifts.items() if lift.sign == sign]
        for sign in SIGNS
    }
    told = [text.format(joined(by_sign[sign])) for sign, text in phrases.items() if by_sign[sign]]
    name = baseline[0].upper() + baseline[1:]
    are = "; it ".join(told)
    return f"{name} with the embedding {are}."


def verdict_sentence(verdict: Verdict) -> str:
    """Say what the embedding adds on one task to RFM, and to aggregates."""
    to_rfm = _lift_words(verdict, verdict.lifts, ("embedding", "rfm+embedding"))
    to_aggregates = _lift_words(
        verdict, verdict.further_lifts, ("embedding", "aggregates+embedding")
    )
    rfm, aggregates = (number(verdict.scores[name].value) for name in ("rfm", "aggregates"))
    return (
        f"RFM {rfm}; {to_rfm}; under {in_words(verdict.probe)}. "
        f"Against aggregates ({aggregates}): {to_aggregates}."
    )


def _lift_words(verdict: Verdict, lifts: Mapping[str, Score], names: Sequence[str]) -> str:
    """Say how far some representations stand from a baseline."""
    return "; ".join(
        f"{in_words(name)} {number(verdict.scores[name].value)} ({signed(lifts[name].value)}, "
        f"95 % interval {signed_interval(lifts[name])}: {SIGNS[lifts[name].sign]})"
        for name in names
    )


def control_sentence(verdicts: Sequence[Verdict]) -> str:
    """Say how the embedding stands beside the untrained encoder."""
    behind = [
        verdict.title.lower()
        for verdict in verdicts
        if verdict.scores["embedding"].value <= verdict.scores["untrained"].value
    ]
    if not verdicts:
        return ""
    if behind:
        return (
            f"On {joined(behind)} the embedding does not score above the encoder as it was before "
            "training: pretraining has added nothing there."
        )
    return "On every task the embedding scores above the same encoder before training."


def naive_sentence(comparison: dict[str, Any]) -> str:
    """Say what the next action's accuracy is worth without learning anything."""
    told = [
        f"{number(row['value'])} with the {in_words(row['predictor'])}"
        for row in comparison["naive"]
        if row["metric"] == "accuracy"
    ]
    if not told:
        return ""
    return f"Predicting the next action without learning is right for a share of {joined(told)}."


def left_out_sentences(comparison: dict[str, Any]) -> list[str]:
    """Say what could not be measured, reasons that many targets share told once."""
    rows = comparison["left_out"]
    sentences = [
        f"{in_words(row['task']).capitalize()}, {in_words(row['target'])}: {row['reason']}."
        for row in rows
    ]
    measured = {row["task"] for row in comparison["results"]}
    missing = [task for task in ("churn", "propensity", "next_action") if task not in measured]
    if missing:
        words = joined([in_words(task) for task in missing])
        sentences.insert(0, f"Not measured at all: {words}.")
    return sentences
