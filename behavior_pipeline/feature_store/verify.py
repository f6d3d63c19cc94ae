"""Proof of a publication: vectors read back through Feast equal the files, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from behavior_pipeline.errors import PipelineError
from behavior_pipeline.feature_store.partition import OFFLINE_BATCH_ROWS, source_files
from behavior_pipeline.feature_store.published import PublishedView, read_published
from behavior_pipeline.feature_store.repository import open_store
from behavior_pipeline.feature_store.versions import read_versions
from behavior_pipeline.storage import Storage

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
    """

    num_users: int
    num_equal: int
    mismatches: tuple[str, ...]

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
    """Compare random users' served embeddings with the files of a cutoff.

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
    expected = _rows_of(files, _sample_users(files, num_users, seed))
    for start in range(0, expected.num_rows, READ_USERS):
        wrong += _mismatches(store, expected.slice(start, READ_USERS), number)
    num_equal = expected.num_rows - len(wrong)
    return Verification(expected.num_rows, num_equal, tuple(wrong[:SHOWN_MISMATCHES]))


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
        with pq.ParquetFile(path) as source:
            batches = source.iter_batches(OFFLINE_BATCH_ROWS, columns=columns)
            found += [b.filter(pc.is_in(b.column("user_id"), value_set=users)) for b in batches]
    return pa.Table.from_batches(found)


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
