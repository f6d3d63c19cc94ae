"""Asset checks on schema drift: what a source shows against what was known of it."""

from collections.abc import Iterable, Sequence
from typing import Any

import dagster as dg

from behavior_pipeline.defs.partitions import nights
from behavior_pipeline.defs.resources import Night, PipelineResource, partition_key_of
from behavior_pipeline.encoder.live import checkpoint_folder
from behavior_pipeline.ingest.arrivals import HISTORY
from behavior_pipeline.ingest.drift import Drift, Severity, drift_of
from behavior_pipeline.ingest.schemas import read_schemas
from behavior_pipeline.ingest.unseen import UnseenTypes, find_unseen_types
from behavior_pipeline.pipeline import Pipeline
from behavior_pipeline.sequences.files import unknown_share
from behavior_pipeline.sequences.vocabulary import load_vocabulary

SCHEMA_CHECK = "is_source_schema_as_known"
MAX_ROWS = 50  # of a table on the page


@dg.asset_check(asset="historical_events", name=SCHEMA_CHECK, blocking=True)
def is_history_schema_as_known(pipeline: PipelineResource) -> dg.AssetCheckResult:
    """The source has the columns and types that the history had when it was last loaded."""
    return _is_schema_as_known(pipeline.open(), HISTORY)


@dg.asset_check(asset="arrived_events", name=SCHEMA_CHECK, blocking=True, partitions_def=nights)
def is_arrival_schema_as_known(
    context: dg.AssetCheckExecutionContext, pipeline: PipelineResource
) -> dg.AssetCheckResult:
    """The source has the columns and types that it had in the arrivals before."""
    return _is_schema_as_known(pipeline.open(), partition_key_of(context))


@dg.asset_check(asset="sequences", partitions_def=nights)
def are_event_types_known(
    context: dg.AssetCheckExecutionContext, pipeline: PipelineResource
) -> dg.AssetCheckResult:
    """The live checkpoint knows the event types of the night's arrivals and of all tokens."""
    night = Night(context, pipeline)
    storage = night.pipeline.storage
    vocabulary = load_vocabulary(checkpoint_folder(storage.checkpoints))
    unseen = find_unseen_types(
        read_schemas(storage),
        partition_key_of(context),
        vocabulary.values["action"],
        vocabulary.ignored_event_types,
    )
    token_share = unknown_share(storage.sequences(night.cutoff), "action")
    max_share = night.pipeline.settings.max_unknown_event_share
    return dg.AssetCheckResult(
        passed=max(unseen.arrived_share or 0.0, token_share) <= max_share,
        severity=dg.AssetCheckSeverity.WARN,
        metadata=_unseen_metadata(unseen, token_share, max_share),
    )


def _is_schema_as_known(opened: Pipeline, arrival: str) -> dg.AssetCheckResult:
    """Judge an arrival as its load recorded it; only what is blocking holds the run back."""
    known = read_schemas(opened.storage)
    if arrival not in known.arrivals:
        note = "the arrival was loaded before schemas were recorded; load it again"
        return dg.AssetCheckResult(passed=True, metadata={"note": note})
    drift = drift_of(known, arrival, opened.preset)
    is_blocking = drift.severity is Severity.BLOCKING
    severity = dg.AssetCheckSeverity.ERROR if is_blocking else dg.AssetCheckSeverity.WARN
    return dg.AssetCheckResult(
        passed=drift.severity in {None, Severity.REPORTED},
        severity=severity,
        metadata=_drift_metadata(drift, is_first=known.before(arrival) is None),
    )


def _drift_metadata(drift: Drift, *, is_first: bool) -> dict[str, Any]:
    """Count the changes, and show them as a table."""
    if is_first:
        return {"note": "nothing was known before this load"}
    counts = {
        f"num_{severity}": sum(item.severity is severity for item in drift.items)
        for severity in Severity
    }
    rows = [
        (item.severity, item.change, item.name, item.details, item.outcome) for item in drift.items
    ]
    header = ("severity", "change", "name", "details", "outcome")
    gravest = [line for line in drift.lines if not line.startswith(Severity.REPORTED)]
    table = {"drift": markdown_table(header, rows)} if rows else {}
    return {**counts, "gravest": gravest[:MAX_ROWS], **table}


def _unseen_metadata(unseen: UnseenTypes, token_share: float, max_share: float) -> dict[str, Any]:
    """Show both shares, and which event types are behind them."""
    arrived: dict[str, Any] = {"note": "the event types of this arrival are not recorded"}
    if unseen.arrived_share is not None:
        arrived = {"unknown_share_arrived": unseen.arrived_share}
    rows = [
        (row.event_type, f"{row.num_arrived:,}", f"{row.num_so_far:,}", row.first_arrival)
        for row in unseen.types
    ]
    header = ("event type", "events of this arrival", "events so far", "first arrival")
    table = {"unseen_event_types": markdown_table(header, rows)} if rows else {}
    return {
        **arrived,
        "unknown_share_of_tokens": token_share,
        "max_unknown_event_share": max_share,
        "num_unseen_event_types": len(rows),
        **table,
    }


def markdown_table(
    header: Sequence[str], rows: Sequence[Sequence[str]]
) -> dg.MarkdownMetadataValue:
    """Return a table for the page, cut after MAX_ROWS rows; names are shown as they are."""
    lines = [_row(header), _row(["---"] * len(header))]
    lines += [_row(_as_it_is(cell) for cell in row) for row in rows[:MAX_ROWS]]
    if len(rows) > MAX_ROWS:
        lines.append(f"\n{len(rows) - MAX_ROWS:,} more")
    return dg.MetadataValue.md("\n".join(lines))


def _row(cells: Iterable[str]) -> str:
    """Return one line of a table."""
    return f"| {' | '.join(cells)} |"


def _as_it_is(text: str) -> str:
    """Escape what Markdown would read as its own, such as the bar of a table or a tag."""
    escaped = "".join(f"\\{char}" if char in "\\`*_|<>[]" else char for char in text)
    return " ".join(escaped.split())
