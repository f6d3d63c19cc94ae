"""Stage 6 in Dagster: scores, segments, the comparison and its report."""

import dagster as dg

from behavior_pipeline.contracts import PREDICTIONS, SEGMENTS
from behavior_pipeline.defs.loggers import report_to
from behavior_pipeline.defs.metadata import contract_metadata, picture, row_count
from behavior_pipeline.defs.partitions import ONE_NIGHT_A_RUN, nights
from behavior_pipeline.defs.resources import Night, PipelineResource, now
from behavior_pipeline.downstream.comparison import compare, headline
from behavior_pipeline.downstream.report import write_report
from behavior_pipeline.downstream.scoring import score
from behavior_pipeline.downstream.segmentation import segment


@dg.asset(
    group_name="downstream",
    deps=["user_embeddings", "evaluation_embeddings", "marts"],
    partitions_def=nights,
    backfill_policy=ONE_NIGHT_A_RUN,
    kinds={"scikitlearn"},
    metadata=contract_metadata(PREDICTIONS),
)
def predictions(
    context: dg.AssetExecutionContext, pipeline: PipelineResource
) -> dg.MaterializeResult[None]:
    """Calibrated scores of the population at the night's cutoff."""
    night = Night(context, pipeline)
    opened = night.pipeline
    summary = score(
        opened.storage,
        opened.settings,
        opened.preset,
        night.windows,
        now(),
        report=report_to(context, "scoring"),
    )
    return dg.MaterializeResult(metadata=row_count(summary.num_users))


@dg.asset(
    group_name="downstream",
    deps=["user_embeddings", "marts"],
    partitions_def=nights,
    backfill_policy=ONE_NIGHT_A_RUN,
    kinds={"scikitlearn"},
    metadata=contract_metadata(SEGMENTS),
)
def segments(
    context: dg.AssetExecutionContext, pipeline: PipelineResource
) -> dg.MaterializeResult[None]:
    """Every user's segment at the night's cutoff, with a readable profile of each."""
    night = Night(context, pipeline)
    opened = night.pipeline
    summary = segment(
        opened.storage,
        opened.settings,
        night.windows,
        now(),
        report=report_to(context, "segmenting"),
    )
    return dg.MaterializeResult(
        metadata=row_count(summary.num_users) | {"num_segments": summary.num_segments}
    )


@dg.asset(
    group_name="downstream",
    deps=["evaluation_embeddings", "marts"],
    partitions_def=nights,
    backfill_policy=ONE_NIGHT_A_RUN,
    kinds={"scikitlearn"},
)
def comparison(
    context: dg.AssetExecutionContext, pipeline: PipelineResource
) -> dg.MaterializeResult[None]:
    """Churn, propensity, next action and segments: the embedding beside baselines and controls."""
    night = Night(context, pipeline)
    opened = night.pipeline
    result = compare(
        opened.storage,
        opened.settings,
        opened.preset,
        night.windows,
        report=report_to(context, "comparing"),
    )
    return dg.MaterializeResult(metadata=headline(result))


@dg.asset(
    group_name="downstream",
    deps=[comparison, segments, predictions, "drift"],
    partitions_def=nights,
    backfill_policy=ONE_NIGHT_A_RUN,
    kinds={"html"},
)
def report(
    context: dg.AssetExecutionContext, pipeline: PipelineResource
) -> dg.MaterializeResult[None]:
    """One self-contained page: verdict, lifts, curves, map, profiles, calibration."""
    night = Night(context, pipeline)
    opened = night.pipeline
    written = write_report(
        opened.storage,
        opened.settings,
        opened.preset,
        night.windows,
        report=report_to(context, "writing the report"),
    )
    return dg.MaterializeResult(
        metadata={
            "page": dg.MetadataValue.path(written.page),
            "lift": picture(written.lift_picture, "Lift against RFM with 95 % intervals"),
        }
    )
