"""Jobs and their schedules: `nightly` at 02:00, `pretraining` on Sundays."""

from datetime import timedelta

import dagster as dg

from behavior_pipeline.defs.partitions import nights

HISTORY = dg.AssetSelection.assets("raw_events", "historical_events")

PRETRAINING = (
    dg.AssetSelection.groups("warehouse", "encoder")
    | dg.AssetSelection.assets("vocabulary", "training_sequences")
) - dg.AssetSelection.assets("analytics_database")

ONCE_PER_CHECKPOINT = dg.AssetSelection.groups("encoder") | dg.AssetSelection.assets(
    "vocabulary", "training_sequences"
)

history = dg.define_asset_job(
    "history",
    HISTORY,
    description="Everything that the source holds now becomes canonical events.",
)
pretraining = dg.define_asset_job(
    "pretraining",
    PRETRAINING,
    partitions_def=nights,
    description="A new checkpoint that knows nothing after the night's train cutoff.",
)
nightly = dg.define_asset_job(
    "nightly",
    dg.AssetSelection.all() - HISTORY - ONCE_PER_CHECKPOINT,
    partitions_def=nights,
    description="The day's arrivals become published embeddings, scores and a report.",
)
pretraining_and_nightly = dg.define_asset_job(
    "pretraining_and_nightly",
    dg.AssetSelection.all() - HISTORY,
    partitions_def=nights,
    description="A new checkpoint and a night with it, in one run.",
)

nightly_schedule = dg.build_schedule_from_partitioned_job(
    nightly,
    name="nightly_schedule",
    hour_of_day=2,
    description="02:00 UTC: yesterday's arrivals, with the midnight after them as cutoff.",
)


@dg.schedule(job=pretraining, cron_schedule="0 3 * * 0", execution_timezone="UTC")
def weekly_pretraining(context: dg.ScheduleEvaluationContext) -> dg.RunRequest:
    """Sundays at 03:00 UTC: pretrain on everything up to the latest night's train cutoff."""
    yesterday = context.scheduled_execution_time - timedelta(days=1)
    return dg.RunRequest(partition_key=f"{yesterday:%Y-%m-%d}")
