"""Stage 0 in Dagster: raw files, the history, nightly arrivals."""

from datetime import date
from typing import Any

import dagster as dg

from behavior_pipeline.contracts import CANONICAL_EVENTS
from behavior_pipeline.defs.loggers import report_to
from behavior_pipeline.defs.metadata import contract_metadata, row_count
from behavior_pipeline.defs.partitions import DUCKDB_WRITER, ONE_NIGHT_A_RUN, nights
from behavior_pipeline.defs.resources import PipelineResource, now, partition_key_of
from behavior_pipeline.ingest.arrivals import HISTORY, LoadSummary
from behavior_pipeline.ingest.load import load_arrival
from behavior_pipeline.ingest.simulator import simulate
from behavior_pipeline.pipeline import SIMULATED


@dg.asset(group_name="ingest", kinds={"parquet"})
def raw_events(
    context: dg.AssetExecutionContext, pipeline: PipelineResource
) -> dg.MaterializeResult[None]:
    """The source's files as they are; the simulated source is written here."""
    opened = pipeline.open()
    if opened.preset.name != SIMULATED or opened.settings.path is not None:
        return dg.MaterializeResult(
            metadata={"path": opened.raw_path, "is_simulated": opened.preset.is_simulated}
        )
    settings = opened.settings
    summary = simulate(
        opened.storage.raw / SIMULATED,
        settings.simulated_users,
        settings.simulated_days,
        settings.seed,
        report=report_to(context, "simulating"),
    )
    return dg.MaterializeResult(
        metadata={
            "num_events": summary.num_events,
            "num_users": summary.num_users,
            "is_simulated": True,
        }
    )


@dg.asset(
    group_name="ingest",
    deps=[raw_events],
    kinds={"duckdb", "parquet"},
    pool=DUCKDB_WRITER,
    metadata=contract_metadata(CANONICAL_EVENTS),
)
def historical_events(
    context: dg.AssetExecutionContext, pipeline: PipelineResource
) -> dg.MaterializeResult[None]:
    """Canonical events of everything that the source holds now; loading again changes nothing."""
    opened = pipeline.open()
    summary = load_arrival(
        opened.preset,
        opened.raw_path.replace("{date}", "*"),
        opened.storage,
        opened.settings,
        HISTORY,
        now(),
        report=report_to(context, "loading"),
    )
    return dg.MaterializeResult(metadata=_load_metadata(summary, is_partition=False))


@dg.asset(
    group_name="ingest",
    deps=[raw_events, historical_events],
    partitions_def=nights,
    backfill_policy=ONE_NIGHT_A_RUN,
    kinds={"duckdb", "parquet"},
    pool=DUCKDB_WRITER,
    metadata=contract_metadata(CANONICAL_EVENTS),
)
def arrived_events(
    context: dg.AssetExecutionContext, pipeline: PipelineResource
) -> dg.MaterializeResult[None]:
    """Canonical events that arrived on the night's day and were not known before."""
    opened = pipeline.open()
    night = partition_key_of(context)
    summary = load_arrival(
        opened.preset,
        opened.raw_path,
        opened.storage,
        opened.settings,
        night,
        now(),
        day=date.fromisoformat(night),
        report=report_to(context, "loading"),
    )
    return dg.MaterializeResult(metadata=_load_metadata(summary, is_partition=True))


def _load_metadata(summary: LoadSummary, *, is_partition: bool) -> dict[str, Any]:
    """Show what came, whom it touches, and that nothing was lost."""
    return row_count(summary.num_stored, is_partition=is_partition) | {
        "num_users_touched": summary.num_users_touched,
        "num_repeated": summary.num_repeated,
        "num_quarantined": summary.num_quarantined,
        "num_corrected": summary.num_corrected,
        "num_deletions": summary.num_deletions,
        "num_read": summary.num_read,
        "num_accepted": summary.num_accepted,
        "num_users": summary.num_users,
        "late_events_by_age": dg.MetadataValue.json(summary.late),
        "quarantine_reasons": dg.MetadataValue.json(summary.reasons),
        "first_event_at": str(summary.first_event_at),
        "last_event_at": str(summary.last_event_at),
        "schema_drift": dg.MetadataValue.json(summary.drift),
    }
