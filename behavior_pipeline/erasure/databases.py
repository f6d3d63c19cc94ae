"""What services read of users, without some of them, and without what deleted rows leave behind."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pyarrow as pa
import pyarrow.parquet as pq

from behavior_pipeline.erasure.rewriting import NEIGHBORS, Removal
from behavior_pipeline.feature_store.online import delete_online, write_online
from behavior_pipeline.feature_store.published import read_published
from behavior_pipeline.feature_store.repository import offline_folder, open_store, view_of
from behavior_pipeline.feature_store.versions import VERSIONED, read_versions
from behavior_pipeline.storage import Storage

if TYPE_CHECKING:
    from feast import FeatureStore

_BATCH_USERS: Final = 8_192
_WAITING_SECONDS: Final = 60.0  # for readers of the online file
_POLL_SECONDS: Final = 0.05


def online_views(storage: Storage) -> list[tuple[str, int]]:
    """Return every view of every version that has an online table; nothing without a registry."""
    if not (storage.feature_store / "registry.db").exists():
        return []
    numbers = sorted(read_versions(storage).known)
    names = sorted(view.name for view in open_store(storage).list_feature_views())
    return [
        (name, number)
        for name in names
        for number in (numbers if name in VERSIONED else numbers[:1])
    ]


def erase_online(storage: Storage, view: str, version: int, users: pa.Array) -> int:
    """Remove users from a view online, and from other users' neighbours there.

    The history of the view must still be as it was published. The caller holds
    `exclusive(storage)`.

    Returns:
        How many of the users had a row.
    """
    store = open_store(storage)
    defined = view_of(store, view, version)
    removed = sum(
        delete_online(store, defined, users.slice(start, _BATCH_USERS))
        for start in range(0, len(users), _BATCH_USERS)
    )
    if NEIGHBORS in {field.name for field in defined.features}:
        _rewrite_neighbors(storage, store, view, version, users)
    return removed


def _rewrite_neighbors(
    storage: Storage, store: FeatureStore, view: str, version: int, users: pa.Array
) -> None:
    """Write the users anew whose lists named one of those that go."""
    state = read_published(storage, version).get(view)
    if state is None or state.online_cutoff is None:
        return
    folder = offline_folder(storage, view, version) / f"cutoff={state.online_cutoff}"
    batches = _shortened(folder / "features.parquet", Removal("user_id", users))
    write_online(store, view_of(store, view, version), batches, 0)


def _shortened(path: Path, removal: Removal) -> Iterator[pa.RecordBatch]:
    """Yield the rows that stay and are not as they were."""
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(_BATCH_USERS):
            table = pa.Table.from_batches([batch])
            left = removal.without(table.filter(removal.named(table)))
            yield from left.combine_chunks().to_batches()


def compact_online(storage: Storage, seconds: float = _WAITING_SECONDS) -> None:
    """Write a SQLite store's file anew, so that no free page and no log keeps what was deleted.

    Other kinds of stores free their pages themselves.

    Raises:
        TimeoutError: if somebody reads an old state of the file for longer than this.
    """
    store = open_store(storage)
    if store.config.online_store.type != "sqlite":
        return
    end = time.monotonic() + seconds
    with closing(sqlite3.connect(store.config.online_store.path, timeout=seconds)) as connection:
        connection.execute("VACUUM")
        while connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()[0][0]:
            if time.monotonic() > end:
                raise TimeoutError("readers keep an old state of the online store open")
            time.sleep(_POLL_SECONDS)
