"""Letting go of versions that nobody can return to: their tables, their history, their lanes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pyarrow as pa
import pyarrow.parquet as pq

from behavior_pipeline.feature_store.exclusive import exclusive
from behavior_pipeline.feature_store.ledger import ledgers_folder
from behavior_pipeline.feature_store.online import delete_online
from behavior_pipeline.feature_store.repository import (
    apply_definitions,
    offline_folder,
    open_store,
    view_of,
)
from behavior_pipeline.feature_store.versions import (
    VERSIONED,
    Versions,
    read_versions,
    write_versions,
)
from behavior_pipeline.storage import Storage

if TYPE_CHECKING:
    from feast import FeatureStore, FeatureView

KEPT_EARLIER: Final = 2
"""Versions to return to. Each costs the room of all its vectors, online and in the history."""

_BATCH_USERS: Final = 65_536


def retire(storage: Storage) -> tuple[int, ...]:
    """Forget versions that are neither live, nor a candidate, nor among the newest earlier ones.

    The highest number always stays, so that no number is ever given out twice. What was served
    once stays in the history of the versions that followed.

    Returns:
        The numbers that are gone.
    """
    versions = read_versions(storage)
    gone = _to_go(versions)
    if not gone:
        return ()
    store = open_store(storage)
    views = [(view_of(store, view, number), number) for number in gone for view in VERSIONED]
    with exclusive(storage):
        versions = read_versions(storage)
        known = {number: one for number, one in versions.known.items() if number not in gone}
        earlier = tuple(number for number in versions.earlier if number not in gone)
        write_versions(storage, replace(versions, known=known, earlier=earlier))
    apply_definitions(storage)
    for view, number in views:
        folder = offline_folder(storage, view.name, number)
        _drop(store, view, folder)
        shutil.rmtree(folder, ignore_errors=True)
    for number in gone:
        shutil.rmtree(ledgers_folder(storage, number), ignore_errors=True)
    _remove_lanes(storage)
    return gone


def _to_go(versions: Versions) -> tuple[int, ...]:
    """Return the numbers that are to be forgotten, in order."""
    kept = {versions.live, versions.candidate, max(versions.known)}
    kept |= set(versions.earlier[-KEPT_EARLIER:])
    return tuple(sorted(set(versions.known) - kept))


def _drop(store: FeatureStore, view: FeatureView, folder: Path) -> None:
    """Remove a view of a version from the online store; Redis has no tables to drop."""
    if store.config.online_store.type == "redis":
        for users in _users(folder):
            delete_online(store, view, users)
        return
    store._get_provider().update_infra(  # noqa: SLF001 - Feast drops tables only on the side
        project=store.project,
        tables_to_delete=[view],
        tables_to_keep=[],
        entities_to_delete=[],
        entities_to_keep=[],
        partial=True,
    )


def _users(folder: Path) -> Iterator[pa.Array]:
    """Yield the ids of the users ever published to a history."""
    for path in sorted(folder.rglob("*.parquet")):
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_BATCH_USERS, columns=["user_id"]):
                yield batch.column(0)


def _remove_lanes(storage: Storage) -> None:
    """Remove the lanes of checkpoints that no version is of."""
    checkpoints = {one.checkpoint_id for one in read_versions(storage).known.values()}
    for lane in (storage.home / "candidates").glob("*"):
        if lane.name not in checkpoints:
            shutil.rmtree(lane, ignore_errors=True)
