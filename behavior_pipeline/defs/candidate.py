"""A new checkpoint on its way to the services: embedded beside the live one, gated, published.

Everything here works in the candidate's lane and version; what is live stays as it is until the
last step. A gate that holds the candidate back ends the run there, by name.
"""

from datetime import datetime
from typing import Any

import dagster as dg

from behavior_pipeline.contracts import PREDICTIONS, SEGMENTS, SEQUENCES, SIMILAR_USERS
from behavior_pipeline.defs.loggers import report_to
from behavior_pipeline.defs.metadata import contract_metadata, row_count
from behavior_pipeline.defs.partitions import ENCODER, ONE_NIGHT_A_RUN, nights
from behavior_pipeline.defs.resources import Night, PipelineResource, now
from behavior_pipeline.defs.sequences import earlier_sequences, sequences_metadata
from behavior_pipeline.downstream.gates import (
    EMBEDDING_GATES,
    GATES,
    KNOWS_NO_FUTURE,
    PUBLISHED_GATES,
    Outcome,
    embedding_gates,
    future_gate,
)
from behavior_pipeline.downstream.publication_gates import publication_gates
from behavior_pipeline.downstream.scoring import score
from behavior_pipeline.downstream.segmentation import segment
from behavior_pipeline.embeddings.candidates import embed_candidate
from behavior_pipeline.embeddings.similar_users import find_similar_users
from behavior_pipeline.encoder.checkpoints import write_untrained
from behavior_pipeline.encoder.live import CANDIDATE, checkpoint_folder
from behavior_pipeline.feature_store.promotion import enlist, promote, record_gates
from behavior_pipeline.feature_store.publish import publish_view
from behavior_pipeline.feature_store.versions import VERSIONED, read_versions
from behavior_pipeline.sequences.files import write_sequences
from behavior_pipeline.sequences.vocabulary import load_vocabulary
from behavior_pipeline.storage import Storage, read_json

GROUP = "candidate"
FEATURE_STORE_WRITER = "feature_store_writer"


def _lane(night: Night) -> Storage:
    """Return the candidate's lane."""
    storage = night.pipeline.storage
    return storage.of_candidate(checkpoint_folder(storage.checkpoints, CANDIDATE).name)


def _record(night: Night, outcomes: dict[str, Outcome]) -> dict[str, Any]:
    """Keep what gates found with the version; return it as metadata."""
    records = {name: outcome.record() for name, outcome in outcomes.items()}
    version = record_gates(night.pipeline.storage, records)
    notes = {name: record["note"] for name, record in records.items()}
    return notes | {"version": version.number}


@dg.asset(
    group_name=GROUP,
    deps=["marts", "checkpoint"],
    partitions_def=nights,
    backfill_policy=ONE_NIGHT_A_RUN,
    kinds={"polars", "parquet"},
    metadata=contract_metadata(SEQUENCES),
)
def candidate_sequences(
    context: dg.AssetExecutionContext, pipeline: PipelineResource
) -> dg.MaterializeResult[None]:
    """The candidate gets a version, and token sequences under its own vocabulary."""
    night = Night(context, pipeline)
    opened, lane = night.pipeline, _lane(night)
    folder = checkpoint_folder(opened.storage.checkpoints, CANDIDATE)
    control = write_untrained(
        folder, opened.storage.checkpoints, opened.settings.encoder_preset, opened.settings.seed
    )
    enlist(opened.storage, folder.name, control.name, now())
    trained_through = datetime.fromisoformat(read_json(folder / "training.json")["trained_through"])
    outcome = future_gate(trained_through, night.windows.train_cutoff)
    recorded = _record(night, {KNOWS_NO_FUTURE: outcome})
    if not outcome.passed:
        return dg.MaterializeResult(metadata=recorded)  # its check ends the run
    for cutoff in night.windows.cutoffs:
        summary = write_sequences(
            lane,
            opened.settings,
            load_vocabulary(folder),
            cutoff,
            lane.sequences(cutoff),
            report=report_to(context, f"tokenizing up to {cutoff:%Y-%m-%d}"),
            earlier=earlier_sequences(opened.storage, folder.name),
        )
    return dg.MaterializeResult(metadata=sequences_metadata(summary, is_partition=True) | recorded)


@dg.asset(
    group_name=GROUP,
    deps=[candidate_sequences, "user_embeddings", "evaluation_embeddings"],
    partitions_def=nights,
    backfill_policy=ONE_NIGHT_A_RUN,
    kinds={"pytorch", "parquet"},
    pool=ENCODER,
)
def candidate_embeddings(
    context: dg.AssetExecutionContext, pipeline: PipelineResource
) -> dg.MaterializeResult[None]:
    """Everybody embedded by the candidate, in the live checkpoint's space, and looked over."""
    night = Night(context, pipeline)
    opened, lane, windows = night.pipeline, _lane(night), night.windows
    live = checkpoint_folder(opened.storage.checkpoints)
    alignment, summary = embed_candidate(
        lane,
        windows.cutoffs,
        windows.train_cutoff,
        live.name,
        written_at=now(),
        threads=opened.settings.threads,
        report=report_to(context, "embedding with the candidate"),
    )
    report = report_to(context, "asking the gates")
    outcomes = embedding_gates(opened.storage, lane, opened.settings, windows, live, report)
    facts: dict[str, Any] = row_count(summary.num_users) | _record(night, outcomes)
    facts |= {"checkpoint_id": summary.checkpoint_id, "explained": alignment.explained}
    return dg.MaterializeResult(metadata=facts)


@dg.asset(
    group_name=GROUP,
    deps=[candidate_embeddings, "marts"],
    partitions_def=nights,
    backfill_policy=ONE_NIGHT_A_RUN,
    kinds={"scikitlearn"},
    metadata=contract_metadata(PREDICTIONS),
)
def candidate_predictions(
    context: dg.AssetExecutionContext, pipeline: PipelineResource
) -> dg.MaterializeResult[None]:
    """Calibrated scores from the candidate's embeddings."""
    night = Night(context, pipeline)
    opened = night.pipeline
    report = report_to(context, "scoring")
    summary = score(_lane(night), opened.settings, opened.preset, night.windows, now(), report)
    return dg.MaterializeResult(metadata=row_count(summary.num_users))


@dg.asset(
    group_name=GROUP,
    deps=[candidate_embeddings, "marts"],
    partitions_def=nights,
    backfill_policy=ONE_NIGHT_A_RUN,
    kinds={"scikitlearn"},
    metadata=contract_metadata(SEGMENTS),
)
def candidate_segments(
    context: dg.AssetExecutionContext, pipeline: PipelineResource
) -> dg.MaterializeResult[None]:
    """Segments from the candidate's embeddings."""
    night = Night(context, pipeline)
    report = report_to(context, "segmenting")
    summary = segment(_lane(night), night.pipeline.settings, night.windows, now(), report)
    return dg.MaterializeResult(metadata=row_count(summary.num_users))


@dg.asset(
    group_name=GROUP,
    deps=[candidate_embeddings],
    partitions_def=nights,
    backfill_policy=ONE_NIGHT_A_RUN,
    kinds={"faiss", "parquet"},
    metadata=contract_metadata(SIMILAR_USERS),
)
def candidate_similar_users(
    context: dg.AssetExecutionContext, pipeline: PipelineResource
) -> dg.MaterializeResult[None]:
    """The users most like each user in the candidate's embeddings."""
    night = Night(context, pipeline)
    report = report_to(context, "finding similar users")
    settings = night.pipeline.settings
    summary = find_similar_users(_lane(night), settings, night.cutoff, now(), report)
    return dg.MaterializeResult(metadata=row_count(summary.num_users))


@dg.asset(
    group_name=GROUP,
    deps=[candidate_predictions, candidate_segments, candidate_similar_users],
    partitions_def=nights,
    backfill_policy=ONE_NIGHT_A_RUN,
    kinds={"feast"},
    pool=FEATURE_STORE_WRITER,
)
def published_candidate(
    context: dg.AssetExecutionContext, pipeline: PipelineResource
) -> dg.MaterializeResult[None]:
    """The candidate's version in Feast, beside the live one; nobody reads it who does not ask."""
    night = Night(context, pipeline)
    lane = _lane(night)
    number = read_versions(lane).candidate_version.number
    for view in VERSIONED:
        report = report_to(context, f"publishing {view}")
        summary = publish_view(lane, view, night.cutoff, report, number)
    outcomes = publication_gates(night.pipeline.storage, lane, night.cutoff, number)
    return dg.MaterializeResult(metadata=row_count(summary.num_rows) | _record(night, outcomes))


@dg.asset(
    group_name=GROUP,
    deps=[published_candidate],
    partitions_def=nights,
    backfill_policy=ONE_NIGHT_A_RUN,
    kinds={"feast"},
    pool=FEATURE_STORE_WRITER,
)
def live_version(
    context: dg.AssetExecutionContext, pipeline: PipelineResource
) -> dg.MaterializeResult[None]:
    """What services read: the candidate, if promotion is automatic; else it waits."""
    night = Night(context, pipeline)
    opened = night.pipeline
    versions = read_versions(opened.storage)
    if opened.settings.promotion == "automatic":
        versions = promote(opened.storage, GATES, now())
        context.log.info("Version %d is live.", versions.live)
    return dg.MaterializeResult(
        metadata={"live": versions.live, "candidate": str(versions.candidate or "none")}
    )


def _gate_check(name: str, asset: str) -> dg.AssetChecksDefinition:
    """Make the blocking check that shows what a gate found of the candidate."""

    @dg.asset_check(
        asset=asset,
        name=name,
        blocking=True,
        partitions_def=nights,
        description=f"The candidate passes the gate `{name}`.",
    )
    def check(pipeline: PipelineResource) -> dg.AssetCheckResult:
        found = read_versions(pipeline.open().storage).candidate_version.gates[name]
        return dg.AssetCheckResult(
            passed=bool(found["passed"]),
            metadata={"note": found["note"]} | dict(found["figures"]),
        )

    return check


knows_no_future = _gate_check(KNOWS_NO_FUTURE, "candidate_sequences")
embedding_gate_checks = [_gate_check(name, "candidate_embeddings") for name in EMBEDDING_GATES]
publication_gate_checks = [_gate_check(name, "published_candidate") for name in PUBLISHED_GATES]
