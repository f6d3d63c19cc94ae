"""Files of the stages before the feature store, made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from behavior_pipeline.contracts import (
    COLD_START_USER,
    PREDICTIONS,
    SEGMENTS,
    SIMILAR_USERS,
    USER_RFM,
    embedding_schema,
)
from behavior_pipeline.feature_store.versions import VERSIONED
from behavior_pipeline.storage import Storage

OCTOBER = datetime(2011, 10, 10, tzinfo=UTC)
NOVEMBER = datetime(2011, 11, 9, tzinfo=UTC)
WIDTH = 16

AWKWARD = np.array(
    [-0.0, 1e-45, -1e-45, 1.1754942e-38, 3.4028235e38, -3.4028235e38, np.inf, -np.inf], np.float32
)
"""Minus zero, the smallest and the largest denormals, the extremes: bits that rounding changes."""


def online_table(view: str, version: int = 1) -> str:
    """Feast's name of a view's table."""
    return f"behavior_pipeline_{view}" + (f"_v{version}" if view in VERSIONED else "")


def vectors(num_users: int, seed: int, width: int = WIDTH) -> np.ndarray:
    """Random float32 vectors (num_users, width); the first begins with the awkward values."""
    found = np.random.default_rng(seed).standard_normal((num_users, width)).astype(np.float32)
    found[0, : len(AWKWARD)] = AWKWARD
    return found


def write_embeddings(
    storage: Storage,
    cutoff: datetime,
    users: Sequence[str],
    values: np.ndarray,
    checkpoints: Sequence[str] = ("checkpoint-a",),
    num_buckets: int = 3,
) -> None:
    """Write the users' vectors in buckets, and a cold-start row of zeros beside them."""
    ids = [*users, COLD_START_USER]
    numbers = np.vstack([values, np.zeros((1, values.shape[1]), np.float32)])
    folder = storage.embeddings(cutoff)
    folder.mkdir(parents=True, exist_ok=True)
    for bucket in range(num_buckets):
        rows = sorted(range(bucket, len(ids), num_buckets), key=ids.__getitem__)
        is_cold = [ids[row] == COLD_START_USER for row in rows]
        last = cutoff - timedelta(hours=1, microseconds=1)
        table = pa.table(
            {
                "user_id": pa.array([ids[row] for row in rows], pa.string()),
                "observation_cutoff": [cutoff] * len(rows),
                "embedding": list(numbers[rows]),
                "checkpoint_id": [checkpoints[row % len(checkpoints)] for row in rows],
                "num_events": [0 if cold else row for row, cold in zip(rows, is_cold, strict=True)],
                "last_event_at": [None if cold else last for cold in is_cold],
                "is_cold_start": is_cold,
                "written_at": [cutoff + timedelta(hours=2)] * len(rows),
            },
            schema=embedding_schema(values.shape[1]),
        )
        pq.write_table(table, folder / f"bucket={bucket}.parquet")


def write_rfm(storage: Storage, cutoff: datetime, users: Sequence[str]) -> Path:
    """Write a mart in which a user's frequency is its place in the list, from 1."""
    num_users = len(users)
    table = pa.table(
        {
            "observation_cutoff": [cutoff] * num_users,
            "user_id": list(users),
            "recency_days": [0.25 * row for row in range(num_users)],
            "frequency": list(range(1, num_users + 1)),
            "monetary": [-0.0] * num_users,
            "last_qualifying_at": [cutoff - timedelta(days=1)] * num_users,
            "is_in_population": [row % 2 == 0 for row in range(num_users)],
        },
        schema=USER_RFM.schema,
    )
    return _write(table, storage.marts(cutoff) / "user_rfm.parquet")


def write_predictions(
    storage: Storage, cutoff: datetime, users: Sequence[str], checkpoint: str = "checkpoint-a"
) -> Path:
    """Write scores; nobody has a likely target, as in a source without targets."""
    num_users = len(users)
    table = pa.table(
        {
            "user_id": list(users),
            "observation_cutoff": [cutoff] * num_users,
            "churn_probability": [0.0] * num_users,
            "top_target": [None] * num_users,
            "top_target_probability": [None] * num_users,
            "next_event_type": ["purchase"] * num_users,
            "next_event_probability": [0.1] * num_users,
            "checkpoint_id": [checkpoint] * num_users,
            "written_at": [cutoff + timedelta(hours=2)] * num_users,
        },
        schema=PREDICTIONS.schema,
    )
    return _write(table, storage.predictions(cutoff) / "predictions.parquet")


def write_segments(
    storage: Storage, cutoff: datetime, users: Sequence[str], checkpoint: str = "checkpoint-a"
) -> Path:
    """Write segments: everybody is at the centre of the largest."""
    num_users = len(users)
    table = pa.table(
        {
            "user_id": list(users),
            "observation_cutoff": [cutoff] * num_users,
            "segment": [0] * num_users,
            "segment_name": ["buys often"] * num_users,
            "distance": [0.0] * num_users,
            "checkpoint_id": [checkpoint] * num_users,
            "written_at": [cutoff + timedelta(hours=2)] * num_users,
        },
        schema=SEGMENTS.schema,
    )
    return _write(table, storage.segments(cutoff) / "segments.parquet")


def write_similar_users(
    storage: Storage, cutoff: datetime, users: Sequence[str], checkpoint: str = "checkpoint-a"
) -> Path:
    """Write neighbours: each user is like those before it in the list, the first like nobody."""
    num_users = len(users)
    table = pa.table(
        {
            "user_id": list(users),
            "observation_cutoff": [cutoff] * num_users,
            "similar_user_ids": [list(users[:row][:20]) for row in range(num_users)],
            "similarities": [
                [1 / (1 + n) for n in range(min(row, 20))] for row in range(num_users)
            ],
            "checkpoint_id": [checkpoint] * num_users,
            "written_at": [cutoff + timedelta(hours=2)] * num_users,
        },
        schema=SIMILAR_USERS.schema,
    )
    return _write(table, storage.similar_users(cutoff) / "similar_users.parquet")


def _write(table: pa.Table, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path
