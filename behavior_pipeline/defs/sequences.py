"""Stage 2 in Dagster: the vocabulary and the token sequences."""

from pathlib import Path
from typing import Any

import dagster as dg

from behavior_pipeline.contracts import SEQUENCES
from behavior_pipeline.defs.loggers import report_to
from behavior_pipeline.defs.metadata import contract_metadata, row_count
from behavior_pipeline.defs.partitions import ONE_NIGHT_A_RUN, nights
from behavior_pipeline.defs.resources import Night, PipelineResource
from behavior_pipeline.encoder.live import checkpoint_folder
from behavior_pipeline.sequences.files import SequencesSummary, write_sequences
from behavior_pipeline.sequences.vocabulary import (
    build_vocabulary,
    load_vocabulary,
    save_vocabulary,
)
from behavior_pipeline.storage import Storage


@dg.asset(group_name="sequences", deps=["marts"], kinds={"duckdb"})
def vocabulary(
    context: dg.AssetExecutionContext, pipeline: PipelineResource
) -> dg.MaterializeResult[None]:
    """Known values of every token field, frozen as of the train cutoff."""
    night = Night(context, pipeline)
    opened = night.pipeline
    built = build_vocabulary(
        opened.storage,
        opened.settings,
        opened.preset.ignored_event_types,
        night.windows.train_cutoff,
        report=report_to(context, "counting values"),
    )
    save_vocabulary(built, opened.storage.vocabulary)
    sizes = {f"num_{field}_ids": built.size(field) for field in built.fields}
    return dg.MaterializeResult(
        metadata={
            **sizes,
            "vocabulary_id": built.vocabulary_id,
            "trained_through": str(built.trained_through),
        }
    )


@dg.asset(
    group_name="sequences",
    deps=[vocabulary],
    kinds={"polars", "parquet"},
    metadata=contract_metadata(SEQUENCES),
)
def training_sequences(
    context: dg.AssetExecutionContext, pipeline: PipelineResource
) -> dg.MaterializeResult[None]:
    """Token sequences up to the train cutoff: all that pretraining ever reads."""
    night = Night(context, pipeline)
    opened = night.pipeline
    summary = write_sequences(
        opened.storage,
        opened.settings,
        load_vocabulary(opened.storage.vocabulary),
        night.windows.train_cutoff,
        opened.storage.training_sequences,
        report=report_to(context, "tokenizing"),
    )
    return dg.MaterializeResult(metadata=sequences_metadata(summary, is_partition=False))


@dg.asset(
    group_name="sequences",
    deps=["marts", "checkpoint"],
    partitions_def=nights,
    backfill_policy=ONE_NIGHT_A_RUN,
    kinds={"polars", "parquet"},
    metadata=contract_metadata(SEQUENCES),
)
def sequences(
    context: dg.AssetExecutionContext, pipeline: PipelineResource
) -> dg.MaterializeResult[None]:
    """Token sequences at the night's cutoffs, under the live checkpoint's own vocabulary."""
    night = Night(context, pipeline)
    opened = night.pipeline
    live = checkpoint_folder(opened.storage.checkpoints)
    frozen = load_vocabulary(live)
    for cutoff in night.windows.cutoffs:
        summary = write_sequences(
            opened.storage,
            opened.settings,
            frozen,
            cutoff,
            opened.storage.sequences(cutoff),
            report=report_to(context, f"tokenizing up to {cutoff:%Y-%m-%d}"),
            earlier=earlier_sequences(opened.storage, live.name),
        )
    return dg.MaterializeResult(metadata=sequences_metadata(summary, is_partition=True))


def earlier_sequences(storage: Storage, checkpoint_id: str) -> list[Path]:
    """Return the folders that sequences for a checkpoint may be built upon.

    Those of the nights, and those from when the checkpoint was a candidate.
    """
    homes = (storage, storage.of_candidate(checkpoint_id))
    return [
        folder
        for home in homes
        for folder in sorted((home.lane_folder / "sequences").glob("cutoff=*"))
    ]


def sequences_metadata(summary: SequencesSummary, *, is_partition: bool) -> dict[str, Any]:
    """Show sizes and how much of each field the vocabulary does not know."""
    return row_count(summary.num_users, is_partition=is_partition) | {
        "num_users_tokenized": summary.num_tokenized_users,
        "num_events_tokenized": summary.num_events,
        "unknown_shares": dg.MetadataValue.json(summary.unknown_shares),
    }
