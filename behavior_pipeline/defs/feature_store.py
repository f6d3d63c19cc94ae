"""Stage 5 in Dagster: publishing a night to Feast, view by view."""

from datetime import timedelta

import dagster as dg

from behavior_pipeline.defs.loggers import report_to
from behavior_pipeline.defs.metadata import row_count
from behavior_pipeline.defs.partitions import ONE_NIGHT_A_RUN, nights
from behavior_pipeline.defs.resources import Night, PipelineResource
from behavior_pipeline.feature_store.publish import publish_view

FEATURE_STORE_WRITER = "feature_store_writer"
"""Pool of the steps that write Feast's online store: SQLite has one writer."""

PUBLISHED = {
    "published_embeddings": ("user_embedding", "user_embeddings"),
    "published_rfm": ("user_rfm", "marts"),
    "published_predictions": ("user_predictions", "predictions"),
    "published_segments": ("user_segment", "segments"),
    "published_similar_users": ("similar_users", "similar_users"),
}
"""Asset -> (feature view, the asset whose files it publishes)."""

ON_TIME = dg.FreshnessPolicy.cron(deadline_cron="0 6 * * *", lower_bound_delta=timedelta(hours=6))


def _published(name: str, view: str, source: str) -> dg.AssetsDefinition:
    """Make the asset that publishes one feature view."""

    @dg.asset(
        name=name,
        group_name="feature_store",
        # A night that is held back publishes nothing.
        deps=sorted({source, "user_embeddings", "evaluation_embeddings"}),
        partitions_def=nights,
        backfill_policy=ONE_NIGHT_A_RUN,
        kinds={"feast", "sqlite"},
        pool=FEATURE_STORE_WRITER,
        freshness_policy=ON_TIME,
        description=f"The night's `{view}` in Feast's offline and online store.",
    )
    def publish(
        context: dg.AssetExecutionContext, pipeline: PipelineResource
    ) -> dg.MaterializeResult[None]:
        night = Night(context, pipeline)
        report = report_to(context, f"publishing {view}")
        opened = night.pipeline
        is_full = opened.settings.published_rows == "all"
        summary = publish_view(opened.storage, view, night.cutoff, report=report, is_full=is_full)
        return dg.MaterializeResult(
            metadata=row_count(summary.num_rows)
            | {"seconds": summary.seconds, "only_changes": summary.is_partial}
        )

    return publish


published_embeddings = _published("published_embeddings", *PUBLISHED["published_embeddings"])
published_rfm = _published("published_rfm", *PUBLISHED["published_rfm"])
published_predictions = _published("published_predictions", *PUBLISHED["published_predictions"])
published_segments = _published("published_segments", *PUBLISHED["published_segments"])
published_similar_users = _published(
    "published_similar_users", *PUBLISHED["published_similar_users"]
)
