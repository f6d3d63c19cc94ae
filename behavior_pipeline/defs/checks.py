"""Asset checks; blocking wherever a leak or a hole would pass on to what comes after."""

from datetime import datetime
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow.compute as pc
import pyarrow.dataset as ds

from behavior_pipeline.contracts import (
    EVENTS_SESSIONIZED,
    LABELS,
    PROPENSITY_LABELS,
    PROPENSITY_TARGETS,
    USER_RFM,
    Contract,
)
from behavior_pipeline.defs.partitions import nights
from behavior_pipeline.defs.resources import Night, PipelineResource, partition_key_of
from behavior_pipeline.downstream.gates import nightly_probes_gate
from behavior_pipeline.embeddings.statistics import EmbeddingStatistics, summarize_embeddings
from behavior_pipeline.encoder.live import LIVE, checkpoint_folder
from behavior_pipeline.feature_store.published import read_published
from behavior_pipeline.feature_store.verify import verify_published
from behavior_pipeline.ingest.arrivals import (
    DELETIONS_FILE,
    HISTORY,
    QUARANTINE_FILE,
    arrival_folder,
    find_arrival,
    load_document,
)
from behavior_pipeline.layers import read_layers
from behavior_pipeline.sequences.reading import count_users, latest_event_at
from behavior_pipeline.storage import Storage, read_json

MARTS = (USER_RFM, LABELS, PROPENSITY_TARGETS, PROPENSITY_LABELS)
LAST_QUALIFYING = "last_qualifying_at"

DRIFT_ROUNDING = 1e-4  # a published vector is read out again on another machine, perhaps
MAX_COLD_START_SHARE = 0.5  # more users without a usable event mean that a source went wrong


@dg.asset_check(asset="historical_events", blocking=True)
def is_history_whole(pipeline: PipelineResource) -> dg.AssetCheckResult:
    """Every row read is accepted or in quarantine."""
    return _is_whole(pipeline.open().storage, HISTORY)


@dg.asset_check(asset="arrived_events", blocking=True, partitions_def=nights)
def is_arrival_whole(
    context: dg.AssetCheckExecutionContext, pipeline: PipelineResource
) -> dg.AssetCheckResult:
    """Every row read is accepted or in quarantine."""
    return _is_whole(pipeline.open().storage, partition_key_of(context))


@dg.asset_check(asset="marts", blocking=True, partitions_def=nights)
def are_features_before_the_cutoff(
    context: dg.AssetCheckExecutionContext, pipeline: PipelineResource
) -> dg.AssetCheckResult:
    """No feature of a user was taken from an event at or after its cutoff."""
    night = Night(context, pipeline)
    storage = night.pipeline.storage
    latest = {
        f"{cutoff:%Y-%m-%d}": _latest(storage.marts(cutoff) / "user_rfm.parquet", LAST_QUALIFYING)
        for cutoff in night.windows.cutoffs
    }
    return _are_before(latest)


@dg.asset_check(asset="sequences", blocking=True, partitions_def=nights)
def are_tokens_before_the_cutoff(
    context: dg.AssetCheckExecutionContext, pipeline: PipelineResource
) -> dg.AssetCheckResult:
    """No token stands for an event at or after its cutoff, and there are tokens."""
    night = Night(context, pipeline)
    storage = night.pipeline.storage
    latest = {
        f"{cutoff:%Y-%m-%d}": latest_event_at(storage.sequences(cutoff))
        for cutoff in night.windows.cutoffs
    }
    return _are_before(latest)


@dg.asset_check(asset="marts", blocking=True, partitions_def=nights)
def are_schemas_as_agreed(
    context: dg.AssetCheckExecutionContext, pipeline: PipelineResource
) -> dg.AssetCheckResult:
    """The exported marts have the columns and types of their contracts."""
    night = Night(context, pipeline)
    storage = night.pipeline.storage
    folder = storage.marts(night.cutoff)
    files = [(folder / f"{contract.name}.parquet", contract) for contract in MARTS]
    files += [
        (file, EVENTS_SESSIONIZED)
        for part, _ in read_layers(storage.events_sessionized).parts()
        for file in part
    ]
    broken = sorted({mart.name for path, mart in files if not _has_schema(path, mart)})
    return dg.AssetCheckResult(passed=not broken, metadata={"broken": broken})


@dg.asset_check(asset="sequences", blocking=True, partitions_def=nights)
def is_checkpoint_older_than_train_cutoff(
    context: dg.AssetCheckExecutionContext, pipeline: PipelineResource
) -> dg.AssetCheckResult:
    """Encoder and vocabulary know nothing at or after the cutoff where probes are trained."""
    night = Night(context, pipeline)
    folder = checkpoint_folder(night.pipeline.storage.checkpoints)
    trained_through = datetime.fromisoformat(read_json(folder / "training.json")["trained_through"])
    train_cutoff = night.windows.train_cutoff
    return dg.AssetCheckResult(
        passed=trained_through <= train_cutoff,
        metadata={"trained_through": str(trained_through), "train_cutoff": str(train_cutoff)},
    )


@dg.asset_check(asset="user_embeddings", blocking=True, partitions_def=nights)
def are_embeddings_sound(
    context: dg.AssetCheckExecutionContext, pipeline: PipelineResource
) -> dg.AssetCheckResult:
    """Finite, not zero, not constant, of one checkpoint and one cutoff, one for every user."""
    night = Night(context, pipeline)
    storage = night.pipeline.storage
    found = summarize_embeddings(storage.embeddings(night.cutoff))
    expected = count_users(storage.sequences(night.cutoff))
    live = checkpoint_folder(storage.checkpoints, LIVE).name
    faults = embedding_faults(found, expected, live, night.cutoff)
    return dg.AssetCheckResult(
        passed=not faults,
        metadata={
            "faults": faults,
            "num_users": found.num_users,
            "num_cold_start": found.num_cold_start,
            "effective_rank": found.effective_rank,
            "norm_quantiles": {f"{share:g}": norm for share, norm in found.norm_quantiles.items()},
        },
    )


@dg.asset_check(asset="evaluation_embeddings", blocking=True, partitions_def=nights)
def do_probes_hold(
    context: dg.AssetCheckExecutionContext, pipeline: PipelineResource
) -> dg.AssetCheckResult:
    """Yesterday's probe of churn reads tonight's vectors about as well as yesterday's."""
    night = Night(context, pipeline)
    opened = night.pipeline
    found = nightly_probes_gate(opened.storage, opened.settings, night.before, night.windows)
    return dg.AssetCheckResult(passed=found.passed, metadata={"note": found.note} | found.figures)


@dg.asset_check(asset="published_embeddings", blocking=True, partitions_def=nights)
def is_read_back_equal(
    context: dg.AssetCheckExecutionContext, pipeline: PipelineResource
) -> dg.AssetCheckResult:
    """What Feast serves equals the Parquet files bit for bit, for up to 1,000 users.

    The rows of users whom the night left as they were are near enough to the night's own.
    """
    night = Night(context, pipeline)
    served = read_published(night.pipeline.storage)["user_embedding"].online_cutoff
    if served != f"{night.cutoff:%Y-%m-%d}":
        note = f"the newer cutoff {served} is served; this one joined the history"
        return dg.AssetCheckResult(passed=True, metadata={"note": note})
    outcome = verify_published(night.pipeline.storage, night.cutoff)
    bound = night.pipeline.settings.max_published_drift * (1 + DRIFT_ROUNDING)
    return dg.AssetCheckResult(
        passed=outcome.num_equal == outcome.num_users > 0 and outcome.max_drift <= bound,
        metadata={
            "num_users": outcome.num_users,
            "num_equal": outcome.num_equal,
            "mismatches": list(outcome.mismatches),
            "max_drift": outcome.max_drift,
        },
    )


@dg.asset_check(asset="comparison", partitions_def=nights)
def is_embedding_above_random(
    context: dg.AssetCheckExecutionContext, pipeline: PipelineResource
) -> dg.AssetCheckResult:
    """The embedding beats random vectors on churn under logistic regression."""
    night = Night(context, pipeline)
    content = read_json(night.pipeline.storage.reports(night.cutoff) / "comparison.json")
    values = churn_values(content)
    is_measured = {"embedding", "random"} <= set(values)
    return dg.AssetCheckResult(
        passed=is_measured and values["embedding"] > values["random"],
        severity=dg.AssetCheckSeverity.WARN,
        metadata=dict(values),
    )


def embedding_faults(
    found: EmbeddingStatistics, num_expected: int, checkpoint_id: str, cutoff: datetime
) -> list[str]:
    """Name what is wrong with a folder of embeddings; nothing if it may be published."""
    faults = {
        f"{found.num_users} users, {num_expected} expected": found.num_users != num_expected,
        f"{found.num_not_finite} vectors with a NaN or infinity": found.num_not_finite > 0,
        f"{found.num_zero_vectors} vectors of zeros": found.num_zero_vectors > 0,
        "all vectors are equal": found.num_users > 1 and found.effective_rank == 0,
        f"checkpoints {found.checkpoint_ids}": found.checkpoint_ids != (checkpoint_id,),
        f"cutoffs {found.cutoffs}": found.cutoffs != (cutoff,),
        f"{found.num_cold_start} cold-start users": (
            found.num_cold_start > MAX_COLD_START_SHARE * max(found.num_users, 1)
        ),
    }
    return [fault for fault, is_present in faults.items() if is_present]


def churn_values(comparison: dict[str, Any]) -> dict[str, float]:
    """Return the churn AUROC of each representation under logistic regression."""
    return {
        row["representation"]: row["value"]
        for row in comparison["results"]
        if row["task"] == "churn"
        and row["metric"] == "auroc"
        and row["probe"] == "logistic_regression"
    }


def _is_whole(storage: Storage, arrival: str) -> dg.AssetCheckResult:
    """Count the rows on disk, apart from what the loader summed up."""
    found = find_arrival(storage, arrival)
    recorded = load_document(storage, arrival)
    if found is None or recorded is None:
        return dg.AssetCheckResult(passed=False, metadata={"note": "nothing was loaded"})
    quarantine = arrival_folder(storage.quarantine, arrival) / f"load={found.load_id}"
    counts = {
        "events": sum(ds.dataset(file).count_rows() for file in found.event_files()),
        "deletions": ds.dataset(found.folder / DELETIONS_FILE).count_rows(),
        "quarantined": ds.dataset(quarantine / QUARANTINE_FILE).count_rows(),
    }
    num_suppressed = recorded.get("num_suppressed", 0)
    num_kept = sum(counts.values()) + recorded["num_duplicates"] + num_suppressed
    return dg.AssetCheckResult(
        passed=recorded["num_read"] == num_kept,
        metadata={
            "num_read": recorded["num_read"],
            **{f"num_{name}_on_disk": count for name, count in counts.items()},
            "num_duplicates": recorded["num_duplicates"],
            "num_suppressed": num_suppressed,
        },
    )


def _are_before(latest: dict[str, datetime | None]) -> dg.AssetCheckResult:
    """Pass if the latest time behind each cutoff's day exists and lies before that day."""
    leaks = [day for day, last in latest.items() if last is None or f"{last:%Y-%m-%d}" >= day]
    return dg.AssetCheckResult(
        passed=not leaks,
        metadata={f"latest_before_{day}": str(last) for day, last in latest.items()},
    )


def _latest(path: Path, column: str) -> datetime | None:
    """Return the latest time in a column of a file or folder, None without any."""
    values = ds.dataset(path, format="parquet").to_table(columns=[column])
    latest: datetime | None = pc.max(values[column]).as_py()
    return latest


def _has_schema(folder: Path, contract: Contract) -> bool:
    """Tell whether a mart has exactly the contract's columns and types."""
    found = ds.dataset(folder, format="parquet").schema
    return [(field.name, field.type) for field in found] == [
        (field.name, field.type) for field in contract.schema
    ]
