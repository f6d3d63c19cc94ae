"""Embeddings of many users at a cutoff, as the stage before the feature store leaves them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from behavior_pipeline.contracts import COLD_START_USER, embedding_schema
from behavior_pipeline.storage import Storage, writing_file

CUTOFF = datetime(2026, 1, 1, tzinfo=UTC)
NUM_BUCKETS = 8
BATCH_ROWS = 8_192


def write_embeddings(storage: Storage, num_users: int, width: int, seed: int = 0) -> None:
    """Write random embeddings of users `000000000` and so on, a batch in memory at a time."""
    generator = np.random.default_rng(seed)
    for bucket in range(NUM_BUCKETS):
        users = range(bucket, num_users, NUM_BUCKETS)
        target = storage.embeddings(CUTOFF) / f"bucket={bucket}.parquet"
        with writing_file(target) as aside, _writer(aside, width) as out:
            for start in range(0, len(users), BATCH_ROWS):
                ids = [f"{user:09d}" for user in users[start : start + BATCH_ROWS]]
                out.write_batch(_rows(ids, width, generator))
            if bucket == 0:
                out.write_batch(_rows([COLD_START_USER], width, generator))


def _writer(path: Path, width: int) -> pq.ParquetWriter:
    return pq.ParquetWriter(path, embedding_schema(width), compression="none")


def _rows(ids: list[str], width: int, generator: np.random.Generator) -> pa.RecordBatch:
    """Return rows of some users with random vectors."""
    num = len(ids)
    numbers = generator.standard_normal(num * width, dtype=np.float32)
    events = generator.integers(1, 500, num)
    columns = {
        "user_id": pa.array(ids, pa.string()),
        "observation_cutoff": pa.array([CUTOFF] * num),
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(numbers), width),
        "checkpoint_id": pa.array(["0123456789abcdef"] * num),
        "num_events": pa.array(events, pa.int64()),
        "last_event_at": pa.array([CUTOFF - timedelta(hours=int(count)) for count in events]),
        "is_cold_start": pa.array([ids == [COLD_START_USER]] * num),
        "written_at": pa.array([CUTOFF + timedelta(hours=2)] * num),
    }
    schema = embedding_schema(width)
    arrays = [columns[field.name].cast(field.type) for field in schema]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)
