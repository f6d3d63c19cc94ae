"""Jobs and their schedules: `nightly` at 02:00, `pretraining` on Sundays."""

from datetime import timedelta

import dagster as dg

from behavior_pipeline.defs.partitions import nights
from behavior_pipeline.defs.resources import PipelineResource, night_of, now
from behavior_pipeline.downstream.gates import GATES
from behavior_pipeline.encoder.live import LIVE, pointed_to
from behavior_pipeline.feature_store.promotion import promote, rollback

HISTORY = dg.AssetSelection.assets("raw_events", "historical_events")

PRETRAINING = (
    dg.AssetSelection.groups("warehouse", "encoder")
    | dg.AssetSelection.assets("vocabulary", "training_sequences")
) - dg.AssetSelection.assets("analytics_database")

ONCE_PER_CHECKPOINT = dg.AssetSelection.groups("encoder") | dg.AssetSelection.assets(
    "vocabulary", "training_sequences"
)

CANDIDATE = dg.AssetSelection.groups("candidate")

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
    dg.AssetSelection.all() - HISTORY - ONCE_PER_CHECKPOINT - CANDIDATE,
    partitions_def=nights,
    description="The day's arrivals become published embeddings, scores and a report.",
)
pretraining_and_nightly = dg.define_asset_job(
    "pretraining_and_nightly",
    dg.AssetSelection.all() - HISTORY - CANDIDATE,
    partitions_def=nights,
    description="A new checkpoint and a night with it, in one run.",
)

candidate = dg.define_asset_job(
    "candidate",
    CANDIDATE,
    partitions_def=nights,
    description="A new checkpoint is embedded, gated and published beside the live one.",
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


@dg.run_status_sensor(
    run_status=dg.DagsterRunStatus.SUCCESS,
    monitored_jobs=[pretraining],
    request_job=candidate,
    name="candidate_after_pretraining",
    description="A pretraining that is over sends its checkpoint to the gates.",
)
def candidate_after_pretraining(
    context: dg.RunStatusSensorContext, pipeline: PipelineResource
) -> dg.RunRequest | dg.SkipReason:
    """Request the candidate's run, unless the new checkpoint went live at once."""
    night = night_of(context.dagster_run.tags)
    checkpoints = pipeline.open().storage.checkpoints
    candidate_id = pointed_to(checkpoints, "candidate")
    if night is None or candidate_id in (None, pointed_to(checkpoints, LIVE)):
        return dg.SkipReason("The new checkpoint is live already: there is no candidate.")
    return dg.RunRequest(partition_key=night, run_key=f"{candidate_id} {night}")


@dg.op
def promote_candidate(context: dg.OpExecutionContext, pipeline: PipelineResource) -> None:
    """Let services read the candidate from now on, if every gate let it pass."""
    versions = promote(pipeline.open().storage, GATES, now())
    context.log.info("Version %d is live.", versions.live)


@dg.op
def return_to_earlier_version(context: dg.OpExecutionContext, pipeline: PipelineResource) -> None:
    """Let services read the version that was live before."""
    versions = rollback(pipeline.open().storage)
    context.log.info("Version %d is live again.", versions.live)


@dg.job(description="The candidate goes live, if every gate let it pass. Seconds.")
def promotion() -> None:
    """Promote the candidate."""
    promote_candidate()


@dg.job(name="rollback", description="The version before is live again. Seconds.")
def rollback_job() -> None:
    """Roll back."""
    return_to_earlier_version()
