"""Drift in Dagster: what a night's figures are beside those of the nights before, and an alarm."""

from math import isfinite
from typing import Any

import dagster as dg

from behavior_pipeline.defs.drift_checks import markdown_table
from behavior_pipeline.defs.loggers import report_to
from behavior_pipeline.defs.metadata import drawing
from behavior_pipeline.defs.partitions import ONE_NIGHT_A_RUN, nights
from behavior_pipeline.defs.resources import Night, PipelineResource, now
from behavior_pipeline.downstream.drift.figures import measure_night
from behavior_pipeline.downstream.drift.history import read_history
from behavior_pipeline.downstream.drift.judgement import Judged
from behavior_pipeline.downstream.drift.picture import drift_png
from behavior_pipeline.downstream.drift.verdicts import Verdict, judge_nights

FIGURES_HEADER = ("figure", "", "value", "expected", "from", "to")
DRAWN = "Figures of drift by night, with the limits of their alarms"


def drift_metadata(verdicts: list[Verdict]) -> dict[str, Any]:
    """Return what the page shows of the last of some nights: verdict, figures, picture."""
    last = verdicts[-1]
    return {
        "verdict": last.words,
        "kind": str(last.kind),
        "figures": markdown_table(FIGURES_HEADER, _rows(last)),
        "picture": drawing(drift_png(verdicts), DRAWN),
    }


def _rows(verdict: Verdict) -> list[tuple[str, ...]]:
    """Return the figures of a night beside what was expected, then what is not judged."""
    judged = verdict.judgement.figures
    rows = [
        (name, "alarm" if each.is_alarm else "", *map(_short, _numbers(each)))
        for name, each in sorted(judged.items(), key=lambda pair: not pair[1].is_alarm)
    ]
    others = sorted(verdict.night.figures.keys() - judged.keys())
    return rows + [(name, "", _short(verdict.night.figures[name]), "", "", "") for name in others]


def _numbers(judged: Judged) -> tuple[float, ...]:
    """Return a figure, what was expected, and the limits of the alarm."""
    return judged.value, judged.expected, judged.low, judged.high


def _short(value: float) -> str:
    """Write a number in few digits, a limit that there is not yet as nothing."""
    return f"{value:.4g}" if isfinite(value) else ""


@dg.asset(
    group_name="downstream",
    deps=["segments", "published_embeddings", "arrived_events", "marts"],
    partitions_def=nights,
    backfill_policy=ONE_NIGHT_A_RUN,
    kinds={"numpy", "json"},
)
def drift(
    context: dg.AssetExecutionContext, pipeline: PipelineResource
) -> dg.MaterializeResult[None]:
    """The night beside those before: embeddings, segments, users, events; kept as a history."""
    night = Night(context, pipeline)
    opened = night.pipeline
    measured = measure_night(
        opened.storage,
        opened.settings,
        night.cutoff,
        now(),
        report=report_to(context, "measuring drift"),
    )
    verdicts = judge_nights(read_history(opened.storage, night.cutoff), opened.settings)
    numbers = {f"figure/{name}": value for name, value in measured.figures.items()}
    return dg.MaterializeResult(metadata=drift_metadata(verdicts) | numbers)


@dg.asset_check(asset=drift, partitions_def=nights)
def is_night_like_those_before(
    context: dg.AssetCheckExecutionContext, pipeline: PipelineResource
) -> dg.AssetCheckResult:
    """No drift of data, and none of embeddings without it; a retraining is named, no alarm."""
    night = Night(context, pipeline)
    opened = night.pipeline
    verdicts = judge_nights(read_history(opened.storage, night.cutoff), opened.settings)
    return dg.AssetCheckResult(
        passed=not verdicts[-1].is_alarm,
        severity=dg.AssetCheckSeverity.WARN,
        metadata=drift_metadata(verdicts),
    )
