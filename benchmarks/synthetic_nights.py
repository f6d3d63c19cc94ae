"""Nights of users who do not exist, as the embedding pass would leave them, for publishing.

    python benchmarks/synthetic_nights.py --users 100000 --width 256

prints how long a night that touches one user in a hundred takes to publish, over a full one.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import perf_counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from behavior_pipeline.contracts import FINGERPRINT_BYTES, embedding_schema
from behavior_pipeline.embeddings.changes import Changes, ChangesWriter, Served
from behavior_pipeline.embeddings.states import from_vectors
from behavior_pipeline.feature_store.ledger import served_before
from behavior_pipeline.feature_store.publish import publish_view
from behavior_pipeline.feature_store.repository import open_store
from behavior_pipeline.storage import Storage, make_private_folder, writing_folder

NIGHT = datetime(2026, 1, 10, tzinfo=UTC)
CHECKPOINT = "synthetic"
BUCKET_USERS = 50_000


def write_night(
    storage: Storage,
    cutoff: datetime,
    num_users: int,
    width: int,
    touched_share: float = 0.0,
    served: Served | None = None,
    num_nights: int = 1,
) -> Changes:
    """Write a night's embeddings and changes.

    Args:
        storage: the home.
        cutoff: of the night.
        num_users: users `user-0000000` and on, and the prior.
        width: D, numbers in an embedding.
        touched_share: users, evenly spread, whose vectors become others in a night.
        served: what the night is measured against; default nothing, so that all is published.
        num_nights: nights with touched users up to this one; each night touches other users.
    """
    schema = embedding_schema(width)
    with writing_folder(storage.embeddings(cutoff)) as folder:
        changes = ChangesWriter(
            folder=make_private_folder(folder / storage.changes(cutoff).name),
            served=served or Served(),
            cutoff=cutoff,
            space_id=CHECKPOINT,
            checkpoint_id=CHECKPOINT,
            schema=schema,
            read_out=lambda states, _: states,
        )
        for start in range(0, num_users, BUCKET_USERS):
            name = f"bucket={start // BUCKET_USERS:03d}.parquet"
            numbers = np.arange(start, min(start + BUCKET_USERS, num_users))
            is_touched = (
                numbers % round(1 / touched_share) < num_nights if touched_share else numbers < 0
            )
            vectors = np.random.default_rng(start).standard_normal(
                (len(numbers), width), np.float32
            )
            vectors[is_touched] *= -1
            table = _table([f"user-{n:07d}" for n in numbers], vectors, cutoff, schema)
            pq.write_table(
                table, folder / name, compression="zstd", use_dictionary=["checkpoint_id"]
            )
            made_of = [
                f"{n:015d}{'x' if t else '-'}".encode()
                for n, t in zip(numbers, is_touched, strict=True)
            ]
            with changes.bucket(name) as bucket:
                bucket.add(table, pa.array(made_of, pa.binary(FINGERPRINT_BYTES)), vectors)
        prior = _table(["__cold_start__"], np.zeros((1, width), np.float32), cutoff, schema)
        pq.write_table(prior, folder / "bucket=prior.parquet")
        return changes.finish("bucket=prior.parquet", prior)


def _table(users: list[str], vectors: np.ndarray, cutoff: datetime, schema: pa.Schema) -> pa.Table:
    size = len(users)
    is_cold = users == ["__cold_start__"]
    columns = {
        "user_id": users,
        "observation_cutoff": pa.repeat(pa.scalar(cutoff, schema.field(1).type), size),
        "embedding": from_vectors(vectors),
        "checkpoint_id": [CHECKPOINT] * size,
        "num_events": [0 if is_cold else 10] * size,
        "last_event_at": [None if is_cold else cutoff - timedelta(days=3)] * size,
        "is_cold_start": [is_cold] * size,
        "written_at": [cutoff + timedelta(hours=2)] * size,
    }
    return pa.table(columns, schema=schema)


def seconds_of(storage: Storage, cutoff: datetime, *, is_full: bool = False) -> float:
    """Publish a night and return how long it took."""
    started = perf_counter()
    summary = publish_view(storage, "user_embedding", cutoff, is_full=is_full)
    seconds = perf_counter() - started
    print(f"{cutoff:%Y-%m-%d}: {summary.num_rows:,} rows in {seconds:.2f} s")
    return seconds


def main() -> None:
    """Publish a first night and a second one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--touched", type=float, default=0.01)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        storage = Storage(Path(folder) / "home")
        open_store(storage)  # the definitions are applied once, by whoever comes first
        tomorrow = NIGHT + timedelta(days=1)
        write_night(storage, NIGHT, given.users, given.width)
        full = seconds_of(storage, NIGHT)
        served = served_before(storage, tomorrow, 0.05)
        write_night(storage, tomorrow, given.users, given.width, given.touched, served)
        nightly = seconds_of(storage, tomorrow)
        figures = {"users": given.users, "width": given.width, "touched": given.touched}
        print(json.dumps(figures | {"nightly_publish_over_full": nightly / full}))


if __name__ == "__main__":
    main()
