"""What a publication writes: every row of a cutoff, or only what has changed since the last one.

Only the changes are enough where the store is known: the last publication was completed, it is the
one that the changes were measured against, and nothing came between them in the history. Else, or
on request, every row is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

import pyarrow as pa

from behavior_pipeline.embeddings.changes import Changes, read_changes
from behavior_pipeline.embeddings.ledger import Ledger, missing_users
from behavior_pipeline.feature_store.ledger import (
    Pointer,
    begin,
    keep_file,
    ledger_file,
    load_ledgers,
    read_pointer,
    write_pointer,
)
from behavior_pipeline.feature_store.partition import source_files
from behavior_pipeline.feature_store.published import PublishedView, read_published
from behavior_pipeline.feature_store.repository import offline_folder
from behavior_pipeline.storage import Storage

CHANGES_VIEW: Final = "user_embedding"


@dataclass(frozen=True)
class Plan:
    """A publication of a view at a cutoff under a version.

    Attributes:
        files: the rows to write.
        is_partial: only the changed rows.
        vanished: users to remove online, n strings.
        checkpoint_id: the encoder behind the rows of a partial one, which may be none.
        settled: what is known of the store afterwards; None if that is not kept.
    """

    files: list[Path]
    is_partial: bool = False
    vanished: pa.Array | None = None
    checkpoint_id: str | None = None
    settled: Pointer | None = None


def plan_publication(
    storage: Storage, view: str, cutoff: datetime, version: int, *, is_full: bool
) -> Plan:
    """Choose what to write, and note that a publication begins; the caller holds the store.

    Raises:
        PipelineError: if there are no rows.
    """
    files = source_files(storage, view, cutoff)
    if view != CHANGES_VIEW:
        return Plan(files)
    date = f"{cutoff:%Y-%m-%d}"
    state = read_published(storage, version).get(view, PublishedView())
    pointer = read_pointer(storage, version)
    if (state.online_cutoff or "") > date:
        if (pointer.oldest or "9") <= date:  # joins would find this row, not the older one served
            begin(storage, version, None)
        return Plan(files)
    changes = read_changes(storage.changes(cutoff))
    if changes is None:
        begin(storage, version, None)
        return Plan(files, settled=Pointer(unsettled=read_pointer(storage, version).unsettled))
    is_partial = not is_full and _goes_on(changes, pointer, state, date)
    if is_partial and not _has_other_history(storage, version, changes.oldest):
        return _partial(storage, version, changes, date)
    return _full(storage, version, changes, files, date)


def settle(storage: Storage, version: int, plan: Plan) -> None:
    """Note that all of a publication is written."""
    if plan.settled is not None and plan.settled != read_pointer(storage, version):
        write_pointer(storage, version, plan.settled)


def _goes_on(changes: Changes, pointer: Pointer, state: PublishedView, date: str) -> bool:
    """Tell whether the store is what changes were measured against, or on its way from there."""
    if changes.base_id is None or not set(pointer.unsettled) <= {changes.ledger_id}:
        return False
    if pointer.ledger_id == changes.ledger_id:
        return state.online_cutoff == date
    is_next = pointer.ledger_id == changes.base_id and (pointer.cutoff or "9") < date
    is_untouched = state.online_cutoff == pointer.cutoff and state.is_online_complete
    is_begun = state.online_cutoff == date and changes.ledger_id in pointer.unsettled
    return is_next and (is_untouched or is_begun)


def _has_other_history(storage: Storage, version: int, oldest: str) -> bool:
    """Tell whether another version's rows are newer than some that this one still serves.

    After a promotion or a rollback they lie in the same history, and joins would find them.
    """
    folder = offline_folder(storage, CHANGES_VIEW, version)
    return any(
        path.parent.name >= f"cutoff={oldest}" for path in folder.glob("cutoff=*/v*.parquet")
    )


def _partial(storage: Storage, version: int, changes: Changes, date: str) -> Plan:
    """Write the changed rows, and remove who vanished."""
    keep_file(storage, version, changes.ledger_id, changes.ledger_file)
    begin(storage, version, changes.ledger_id)
    return Plan(
        changes.files,
        is_partial=True,
        vanished=changes.vanished(),
        checkpoint_id=changes.checkpoint_id,
        settled=Pointer(changes.ledger_id, date, changes.base_id, changes.oldest),
    )


def _full(storage: Storage, version: int, changes: Changes, files: list[Path], date: str) -> Plan:
    """Write every row, and remove whoever an earlier publication may have left."""
    measured = Ledger.load(changes.ledger_file)
    assert measured is not None, "changes come with a ledger"  # noqa: S101 - ours
    ledger = measured.at_once()
    pointer = read_pointer(storage, version)
    before = load_ledgers(storage, version, (pointer.ledger_id, *pointer.unsettled))
    ledger.save(ledger_file(storage, version, ledger.ledger_id))
    begin(storage, version, ledger.ledger_id)
    return Plan(
        files,
        vanished=missing_users(before, ledger.user_ids),
        settled=Pointer(ledger.ledger_id, date, None, date),
    )
