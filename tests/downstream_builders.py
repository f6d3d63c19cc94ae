"""Homes with hand-made marts and embeddings, for tests of the stage downstream."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from behavior_pipeline.contracts import (
    COLD_START_USER,
    LABELS,
    PROPENSITY_LABELS,
    PROPENSITY_TARGETS,
    USER_RFM,
    Contract,
    embedding_schema,
)
from behavior_pipeline.ingest.presets import Preset, parse_preset
from behavior_pipeline.storage import Storage
from behavior_pipeline.windows import EvaluationWindows, midnight

TRAIN = midnight(datetime(2024, 3, 1, tzinfo=UTC).date())
TEST = TRAIN + timedelta(days=30)
WINDOWS = EvaluationWindows(TEST, TRAIN, TEST, timedelta(days=30), timedelta(days=180))
LIVE_WINDOWS = EvaluationWindows(
    TEST + timedelta(days=30), TRAIN, TEST, timedelta(days=30), timedelta(days=180)
)
WRITTEN_AT = datetime(2024, 5, 1, tzinfo=UTC)
CHECKPOINT = "checkpoint-a"
TARGETS = ["books", "tools", "never taken"]
EVENT_TYPES = ["view", "cart", "purchase"]


def preset(*, is_simulated: bool = False) -> Preset:
    """A preset whose only interesting parts are its name and whether it is simulated."""
    return parse_preset(
        f"""
name: handmade
description: Users made for tests.
is_simulated: {str(is_simulated).lower()}
columns: {{user_id: user, event_type: type, occurred_at: ts}}
tasks: {{propensity_column: category, horizon_days: 30, lookback_days: 180}}
""",
        "test",
    )


def write_mart(folder: Path, contract: Contract, columns: dict[str, Any]) -> None:
    """Write one mart under its contract."""
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table({name: pa.array(columns[name]) for name in contract.schema.names})
    pq.write_table(table.cast(contract.schema), folder / f"{contract.name}.parquet")


def write_vectors(
    folder: Path,
    user_ids: list[str],
    vectors: NDArray[Any],
    cutoff: datetime,
    checkpoint_id: str = CHECKPOINT,
    num_buckets: int = 3,
) -> None:
    """Write embeddings in buckets, with the reserved cold-start user in the first."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = [*user_ids, COLD_START_USER]
    matrix = np.vstack([vectors, np.full((1, vectors.shape[1]), 99.0)]).astype(np.float32)
    buckets = np.array([*(i % num_buckets for i in range(len(user_ids))), 0])
    schema = embedding_schema(matrix.shape[1])
    for bucket in range(num_buckets):
        rows = np.flatnonzero(buckets == bucket)
        rows = rows[np.argsort([ids[row] for row in rows], kind="stable")]
        values = pa.array(matrix[rows].ravel())
        table = pa.table(
            {
                "user_id": [ids[row] for row in rows],
                "observation_cutoff": [cutoff] * len(rows),
                "embedding": pa.FixedSizeListArray.from_arrays(values, matrix.shape[1]),
                "checkpoint_id": [checkpoint_id] * len(rows),
                "num_events": [3] * len(rows),
                "last_event_at": [cutoff - timedelta(days=1)] * len(rows),
                "is_cold_start": [ids[row] == COLD_START_USER for row in rows],
                "written_at": [WRITTEN_AT] * len(rows),
            }
        )
        pq.write_table(table.cast(schema), folder / f"bucket={bucket}.parquet")


def write_home(
    storage: Storage,
    num_users: int = 120,
    width: int = 6,
    seed: int = 0,
    cutoffs: tuple[datetime, ...] = (TRAIN, TEST),
) -> None:
    """Write marts and embeddings of users whose activity decides churn, targets and next events."""
    for number, cutoff in enumerate(cutoffs):
        _write_cutoff(storage, cutoff, num_users, width, np.random.default_rng([seed, number]))


def _write_cutoff(
    storage: Storage,
    cutoff: datetime,
    num_users: int,
    width: int,
    rng: np.random.Generator,
) -> None:
    activity = rng.normal(size=num_users)
    taste = rng.normal(size=num_users)
    is_churned = activity + 0.8 * rng.normal(size=num_users) < 0
    user_ids = [f"user-{number:05d}" for number in range(num_users)]
    folder = storage.marts(cutoff)
    write_mart(folder, USER_RFM, _rfm(cutoff, user_ids, activity, rng))
    kinds = np.clip(np.digitize(taste, [-0.4, 0.4]), 0, 2)
    next_types = [None if c else EVENT_TYPES[k] for c, k in zip(is_churned, kinds, strict=True)]
    write_mart(
        folder,
        LABELS,
        {
            "observation_cutoff": [cutoff] * num_users,
            "user_id": user_ids,
            "is_churned": is_churned,
            "num_qualifying_events": (~is_churned).astype(np.int64),
            "amount": np.zeros(num_users),
            "next_event_type": next_types,
        },
    )
    write_propensity(folder, cutoff, user_ids, {"books": taste > 0.5, "tools": taste < -0.5})
    write_aggregates(folder, cutoff, user_ids, activity)
    vectors = np.column_stack([activity, taste, rng.normal(size=(num_users, width - 2))])
    noise = rng.normal(size=(num_users, width))
    write_vectors(storage.embeddings(cutoff), user_ids, vectors, cutoff)
    write_vectors(storage.control_embeddings(cutoff), user_ids, noise, cutoff, "untrained")


def write_aggregates(
    folder: Path, cutoff: datetime, user_ids: list[str], activity: NDArray[Any]
) -> None:
    """Write three features that tell activity, the users in no order."""
    columns = {
        "observation_cutoff": [cutoff] * len(user_ids),
        "user_id": user_ids,
        "num_events_30d": np.round(np.exp(2 + activity)).astype(np.int64),
        "decayed_events_7d": np.exp(activity),
        "weekend_share": (activity > 1).astype(np.float64),
    }
    table = pa.table(columns)
    shuffled = np.random.default_rng(len(user_ids)).permutation(len(user_ids))
    pq.write_table(table.take(shuffled), folder / "user_aggregates.parquet")


def write_propensity(
    folder: Path, cutoff: datetime, user_ids: list[str], takers: dict[str, NDArray[np.bool_]]
) -> None:
    """Write targets, of which nobody takes the last, and who took the others."""
    write_mart(
        folder,
        PROPENSITY_TARGETS,
        {
            "target_rank": list(range(1, len(TARGETS) + 1)),
            "target": TARGETS,
            "num_events": [30, 20, 10],
        },
    )
    pairs = [
        (target, user)
        for target, taken in sorted(takers.items())
        for user, is_taken in zip(user_ids, taken, strict=True)
        if is_taken
    ]
    write_mart(
        folder,
        PROPENSITY_LABELS,
        {
            "observation_cutoff": [cutoff] * len(pairs),
            "target": [target for target, _ in pairs],
            "user_id": [user for _, user in pairs],
        },
    )


def _rfm(
    cutoff: datetime, user_ids: list[str], activity: NDArray[Any], rng: np.random.Generator
) -> dict[str, Any]:
    recency = np.round(np.exp(3 - activity + rng.normal(size=len(activity)) / 2) * 24) / 24
    return {
        "observation_cutoff": [cutoff] * len(user_ids),
        "user_id": user_ids,
        "recency_days": recency,
        "frequency": np.maximum(1, np.round(np.exp(1 + activity))).astype(np.int64),
        "monetary": np.round(np.exp(4 + activity + rng.normal(size=len(activity))), 2),
        "last_qualifying_at": [cutoff - timedelta(days=float(days)) for days in recency],
        "is_in_population": [True] * len(user_ids),
    }
