"""Stage 4 in Dagster: nightly embeddings, and those that the comparison needs."""

from datetime import datetime, timedelta

import dagster as dg

from behavior_pipeline.contracts import SIMILAR_USERS
from behavior_pipeline.defs.loggers import report_to
from behavior_pipeline.defs.metadata import contract_metadata, row_count
from behavior_pipeline.defs.partitions import ENCODER, ONE_NIGHT_A_RUN, nights
from behavior_pipeline.defs.resources import Night, PipelineResource, now
from behavior_pipeline.embeddings.alignment import Alignment
from behavior_pipeline.embeddings.candidates import states_to_start_from
from behavior_pipeline.embeddings.inference import EmbeddingsSummary, embed_sequences
from behavior_pipeline.embeddings.similar_users import find_similar_users
from behavior_pipeline.embeddings.states import newest_states
from behavior_pipeline.encoder.live import LIVE, UNTRAINED, checkpoint_folder
from behavior_pipeline.feature_store.ledger import served_before


@dg.asset(
    group_name="embeddings",
    deps=["sequences", "checkpoint"],
    partitions_def=nights,
    backfill_policy=ONE_NIGHT_A_RUN,
    kinds={"pytorch", "parquet"},
    pool=ENCODER,
    freshness_policy=dg.FreshnessPolicy.cron(
        deadline_cron="0 6 * * *", lower_bound_delta=timedelta(hours=6)
    ),
)
def user_embeddings(
    context: dg.AssetExecutionContext, pipeline: PipelineResource
) -> dg.MaterializeResult[None]:
    """One embedding per user at the night's cutoff, by the live checkpoint."""
    night = Night(context, pipeline)
    summary = _embed(context, night, night.cutoff, LIVE)
    return dg.MaterializeResult(
        metadata=row_count(summary.num_users)
        | {
            "num_cold_start": summary.num_cold_start,
            "num_reused_states": summary.num_reused_states,
            "num_changed": summary.num_changed or 0,
            "width": summary.width,
            "checkpoint_id": summary.checkpoint_id,
        }
    )


@dg.asset(
    group_name="embeddings",
    deps=["sequences", "checkpoint", "untrained_checkpoint", user_embeddings],
    partitions_def=nights,
    backfill_policy=ONE_NIGHT_A_RUN,
    kinds={"pytorch", "parquet"},
    pool=ENCODER,
)
def evaluation_embeddings(
    context: dg.AssetExecutionContext, pipeline: PipelineResource
) -> dg.MaterializeResult[None]:
    """Embeddings at the train and test cutoffs, and the untrained encoder's at both."""
    night = Night(context, pipeline)
    windows = night.windows
    cutoffs = (windows.train_cutoff, windows.test_cutoff)
    for cutoff in cutoffs:
        if cutoff != night.cutoff:
            _embed(context, night, cutoff, LIVE)
        summary = _embed(context, night, cutoff, UNTRAINED)
    return dg.MaterializeResult(
        metadata={
            "num_users": summary.num_users,
            "train_cutoff": f"{windows.train_cutoff:%Y-%m-%d}",
            "test_cutoff": f"{windows.test_cutoff:%Y-%m-%d}",
        }
    )


def _embed(
    context: dg.AssetExecutionContext, night: Night, cutoff: datetime, role: str
) -> EmbeddingsSummary:
    """Embed everyone at a cutoff with the checkpoint of a role."""
    storage = night.pipeline.storage
    is_live = role == LIVE
    states = storage.states(cutoff) if is_live else storage.control_states(cutoff)
    folder = checkpoint_folder(storage.checkpoints, role)
    max_drift = night.pipeline.settings.max_published_drift
    known = (
        states_to_start_from(storage, cutoff, folder.name) if is_live else newest_states([states])
    )
    return embed_sequences(
        storage.sequences(cutoff),
        folder,
        states,
        storage.embeddings(cutoff) if is_live else storage.control_embeddings(cutoff),
        cutoff,
        written_at=now(),
        previous_states_folder=known,
        threads=night.pipeline.settings.threads,
        alignment=Alignment.load(storage.alignment(folder.name)) if is_live else None,
        served=served_before(storage, cutoff, max_drift) if is_live else None,
        report=report_to(context, f"embedding at {cutoff:%Y-%m-%d} ({role})"),
    )


@dg.asset(
    group_name="embeddings",
    deps=[user_embeddings],
    partitions_def=nights,
    backfill_policy=ONE_NIGHT_A_RUN,
    kinds={"faiss", "parquet"},
    metadata=contract_metadata(SIMILAR_USERS),
)
def similar_users(
    context: dg.AssetExecutionContext, pipeline: PipelineResource
) -> dg.MaterializeResult[None]:
    """The users most like each user at the night's cutoff, and an index to search."""
    night = Night(context, pipeline)
    opened = night.pipeline
    summary = find_similar_users(
        opened.storage,
        opened.settings,
        night.cutoff,
        now(),
        report=report_to(context, "finding similar users"),
    )
    return dg.MaterializeResult(
        metadata=row_count(summary.num_users)
        | {
            "num_with_neighbors": summary.num_with_neighbors,
            "is_exact": summary.facts.is_exact,
            "recall": summary.facts.recall,
        }
    )
