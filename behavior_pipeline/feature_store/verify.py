"""Proof of a publication: vectors read back through Feast equal the files, bit for bit.

A user whose row was left as it is must have the row of the cutoff that the ledger names, as it lies
in the history, and it must be as near to the night's own vector as the night promised.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from behavior_pipeline.contracts import TIMESTAMP
from behavior_pipeline.embeddings.states import to_vectors
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.feature_store.ledger import published_ledger
from behavior_pipeline.feature_store.partition import (
    OFFLINE_BATCH_ROWS,
    OFFLINE_FILE,
    read_batches,
    source_files,
)
from behavior_pipeline.feature_store.published import PublishedView, read_published
from behavior_pipeline.feature_store.repository import offline_folder, open_store
from behavior_pipeline.feature_store.versions import read_versions
from behavior_pipeline.storage import Storage, cutoff_folder

if TYPE_CHECKING:
    from feast import FeatureStore

VIEW: Final = "user_embedding"
READ_USERS: Final = 500  # users of one look-up
SHOWN_MISMATCHES: Final = 10


@dataclass(frozen=True)
class Verification:
    """Outcome of a comparison.

    Attributes:
        num_users: users compared.
        num_equal: users whose vector, checkpoint and cutoff are all as in the files.
        mismatches: ids of the first few others.
        max_drift: the largest distance between a served vector and the night's own, as a share of
            the served one's length.
    """

    num_users: int
    num_equal: int
    mismatches: tuple[str, ...]
    max_drift: float = 0.0

    @property
    def is_equal(self) -> bool:
        """Whether every user compared is as in the files."""
        return self.num_equal == self.num_users


def verify_published(
    storage: Storage,
    cutoff: datetime,
    num_users: int = 1000,
    seed: int = 0,
    version: int | None = None,
) -> Verification:
    """Compare random users' served embeddings with the files that they were published from.

    Args:
        storage: the home, or a candidate's lane of it.
        cutoff: the cutoff that is served.
        num_users: how many users to compare; all if there are fewer.
        seed: chooses the users.
        version: which is compared; default the live one.

    Raises:
        PipelineError: if the cutoff has no files, is not the one that is served, or its
            publication did not finish.
    """
    files = source_files(storage, VIEW, cutoff)
    number = version or read_versions(storage).live
    _check_served(storage, cutoff, number)
    store, wrong = open_store(storage), list[str]()
    fresh = _rows_of(files, _sample_users(files, num_users, seed)).sort_by("user_id")
    expected = _rows_as_published(storage, fresh, number)
    for start in range(0, expected.num_rows, READ_USERS):
        wrong += _mismatches(store, expected.slice(start, READ_USERS), number)
    num_equal = expected.num_rows - len(wrong)
    drift = _largest_drift(fresh, expected)
    return Verification(expected.num_rows, num_equal, tuple(wrong[:SHOWN_MISMATCHES]), drift)


def _check_served(storage: Storage, cutoff: datetime, version: int) -> None:
    """Refuse a cutoff that the online store does not hold, or not wholly."""
    view = read_published(storage, version).get(VIEW, PublishedView())
    if view.online_cutoff != f"{cutoff:%Y-%m-%d}":
        raise PipelineError(
            f"The online store serves embeddings of {view.online_cutoff or 'no cutoff'}, "
            f"not of {cutoff:%Y-%m-%d}.",
            "Verify the newest published cutoff.",
        )
    if not view.is_online_complete:
        raise PipelineError(
            f"Publishing the embeddings of {cutoff:%Y-%m-%d} did not finish.", "Publish them again."
        )


def _sample_users(files: list[Path], num_users: int, seed: int) -> pa.Array:
    """Return distinct random user ids of the files."""
    columns = [pq.read_table(path, columns=["user_id"]).column(0) for path in files]
    users = pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.string())
    size = min(num_users, len(users))
    rows = np.random.default_rng(seed).choice(len(users), size=size, replace=False)
    return users.take(pa.array(np.sort(rows))).combine_chunks()


def _rows_of(files: list[Path], users: pa.Array) -> pa.Table:
    """Return the rows of some users, reading the files in batches."""
    columns = ["user_id", "embedding", "checkpoint_id", "observation_cutoff"]
    found: list[pa.RecordBatch] = []
    for path in files:
        batches = read_batches(path, OFFLINE_BATCH_ROWS, columns)
        found += [b.filter(pc.is_in(b.column("user_id"), value_set=users)) for b in batches]
    return pa.Table.from_batches(found)


def _rows_as_published(storage: Storage, fresh: pa.Table, version: int) -> pa.Table:
    """Return users' rows of the cutoffs at which the ledger says that they were published.

    Args:
        storage: the home, or a candidate's lane of it.
        fresh: their rows of the served cutoff, sorted by user.
        version: which is compared.
    """
    ledger = published_ledger(storage, version)
    if ledger is None:
        return fresh
    places = pc.index_in(fresh["user_id"], value_set=ledger.user_ids)
    published = pc.coalesce(
        pc.take(ledger.rows["published_cutoff"], places), fresh["observation_cutoff"]
    )
    is_left = pc.not_equal(published, fresh["observation_cutoff"])
    parts, folder = [fresh.filter(pc.invert(is_left))], offline_folder(storage, VIEW, version)
    for cutoff in pc.unique(published.filter(is_left)).to_pylist():
        users = fresh["user_id"].filter(pc.equal(published, pa.scalar(cutoff, TIMESTAMP)))
        path = folder / cutoff_folder(cutoff) / OFFLINE_FILE
        parts.append(_rows_of([path], users.combine_chunks()))
    return pa.concat_tables(parts).sort_by("user_id")


def _largest_drift(fresh: pa.Table, expected: pa.Table) -> float:
    """Return the largest distance between two vectors of a user over the second one's length."""
    if not fresh["user_id"].equals(expected["user_id"]):
        return float("inf")  # a row that the ledger speaks of is not in the history
    is_left = pc.not_equal(fresh["observation_cutoff"], expected["observation_cutoff"])
    now, then = (
        to_vectors(table["embedding"].filter(is_left), table["embedding"].type.list_size)
        for table in (fresh, expected)
    )
    moved = np.linalg.norm((now - then).astype(np.float64), axis=1)
    lengths = np.linalg.norm(then.astype(np.float64), axis=1)
    return float(np.max(moved / np.where(moved > 0, lengths, 1), initial=0))


def _mismatches(store: FeatureStore, expected: pa.Table, version: int) -> list[str]:
    """Return the users whose served row differs from the expected one."""
    users = expected.column("user_id").to_pylist()
    served = store.get_online_features(
        features=[
            f"{VIEW}@v{version}:{name}" for name in ("embedding", "checkpoint_id", "cutoff_at")
        ],
        entity_rows=[{"user_id": user} for user in users],
    ).to_dict()
    checkpoints = expected.column("checkpoint_id").to_pylist()
    cutoffs = expected.column("observation_cutoff").to_pylist()
    vectors = _bits(expected.column("embedding").combine_chunks())
    return [
        user
        for row, user in enumerate(users)
        if served["checkpoint_id"][row] != checkpoints[row]
        or served["cutoff_at"][row] != cutoffs[row]
        or not _is_same(served["embedding"][row], vectors[row])
    ]


def _bits(vectors: pa.FixedSizeListArray) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """Return the bits of vectors (users, width)."""
    numbers: np.ndarray[Any, np.dtype[np.float32]] = vectors.flatten().to_numpy()
    return numbers.view(np.uint32).reshape(-1, vectors.type.list_size)


def _is_same(vector: list[float] | None, bits: np.ndarray[Any, np.dtype[np.uint32]]) -> bool:
    """Compare a served vector with the bits of the expected one (width,)."""
    if vector is None:
        return False
    return np.array_equal(np.asarray(vector, np.float32).view(np.uint32), bits)
