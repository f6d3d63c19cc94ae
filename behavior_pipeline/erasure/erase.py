"""Erasing users from a home: from every file, database and store below it, for ever.

First it is written down what is to be done (`erasures/pending.json`), then the users go onto the
list that every load consults, then place after place is written anew without them, all users in
one pass; the receipt comes last. Every step may be repeated, so an erasure that was killed is
completed by the next one, or by the next run of the pipeline.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq

from behavior_pipeline.contracts import COLD_START_USER
from behavior_pipeline.embeddings.neighbor_index import INDEX_FILES
from behavior_pipeline.erasure.databases import compact_online, erase_online, online_views
from behavior_pipeline.erasure.documents import (
    recount_loads,
    recount_published,
    recount_sequences,
)
from behavior_pipeline.erasure.quarantine import (
    find_quarantined,
    quarantine_files,
    without_quarantined,
)
from behavior_pipeline.erasure.rewriting import Affected, Removal, Without, find_affected, rewrite
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.feature_store.exclusive import exclusive
from behavior_pipeline.holding import holding
from behavior_pipeline.ingest.arrivals import DELETIONS_FILE, VERSIONS_FILE
from behavior_pipeline.ingest.presets import ColumnMapping
from behavior_pipeline.pipeline import Pipeline
from behavior_pipeline.progress import Report, report_nothing
from behavior_pipeline.sql import open_engine, parquet
from behavior_pipeline.storage import Storage, read_json, working_alone, write_json
from behavior_pipeline.suppression import suppress
from behavior_pipeline.warehouse.removal import (
    count_rows,
    remove_from_analytics,
    remove_from_warehouse,
)

_ONLINE: Final = "feature_store/online"


def erase(
    pipeline: Pipeline, user_ids: Sequence[str], report: Report = report_nothing
) -> dict[str, Any]:
    """Erase users from a home; return the receipt, as `erasures/<id>.json` holds it.

    An erasure that was killed before is completed first.

    Args:
        pipeline: the source whose home it is.
        user_ids: as canonical events call them; who is not there is suppressed all the same.
        report: told of each file, database and view that is done.

    Raises:
        PipelineError: if no user or the reserved one is named, or another run is at work.
    """
    users = sorted({user.strip() for user in user_ids} - {""})
    if not users:
        raise PipelineError("No user is named.", "Give ids, or a file with one id a line.")
    if COLD_START_USER in users:
        raise PipelineError(
            f"'{COLD_START_USER}' is nobody: its row is the prior of unknown users.",
            "Leave it out.",
        )
    with holding(pipeline.storage):
        pending = _pending_file(pipeline.storage)
        is_begun = pending.exists() and read_json(pending)["user_ids"] == users
        completed = complete_erasure(pipeline, report)
        if is_begun and completed is not None:
            return completed
        erasure_id = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid4().hex[:6]}"
        write_json(pending, {"id": erasure_id, "user_ids": users})
        receipt = complete_erasure(pipeline, report)
    assert receipt is not None, "it is pending"  # noqa: S101 - for the types
    return receipt


def complete_erasure(pipeline: Pipeline, report: Report = report_nothing) -> dict[str, Any] | None:
    """Complete an erasure that was begun; return its receipt, None if there is none.

    The caller holds the home.
    """
    path = _pending_file(pipeline.storage)
    if not path.exists():
        return None
    pending = read_json(path)
    hashes = suppress(pipeline.storage, pending["user_ids"])
    with working_alone(pipeline.storage):
        work = _Work(pipeline, pending, report)
        work.run()
    receipt = _receipt(pipeline.storage, work, hashes)
    write_json(_folder(pipeline.storage) / f"{pending['id']}.json", receipt)
    path.unlink()
    return receipt


def _folder(storage: Storage) -> Path:
    return storage.home / "erasures"


def _pending_file(storage: Storage) -> Path:
    return _folder(storage) / "pending.json"


@dataclass(frozen=True)
class _Step:
    """Files that are written anew in the same way."""

    files: list[Affected]
    without: Without


class _Work:
    """One erasure at work: what it knows, and how far it is.

    Attributes:
        counts: rows that go, by place; known before anything goes, so that a kill loses none.
        num_files: Parquet files to be written anew when it began.
    """

    def __init__(self, pipeline: Pipeline, pending: dict[str, Any], report: Report) -> None:
        self.pipeline, self.storage = pipeline, pipeline.storage
        self.pending, self.report = pending, report
        self.users = pa.array(pending["user_ids"], pa.string())
        self.mapping: ColumnMapping = pipeline.preset.columns.user_id
        self.done = 0
        self.total = 0

    @property
    def counts(self) -> dict[str, int]:
        """Rows by place."""
        counts: dict[str, int] = self.pending.setdefault("counts", {})
        return counts

    def run(self) -> None:
        """Find what there is, then remove it: databases, stores, files; then mend the records."""
        shutil.rmtree(self.storage.scratch, ignore_errors=True)
        self.report(0, 1, "looking")
        _drop_indexes(self.storage)
        views = online_views(self.storage)  # first: files of an older release move when it opens
        event_ids = self._event_ids()
        by_event = Removal("event_id", event_ids)
        of_ids = _Step(list(find_affected(self._files_of_ids(), by_event)), by_event.without)
        by_user = Removal("user_id", self.users)
        of_users = _Step(list(find_affected(self._files(), by_user)), by_user.without)
        names = frozenset(self.pending["user_ids"])
        of_quarantine = _Step(
            list(find_quarantined(self.storage, self.mapping, names)),
            without_quarantined(self.mapping, names),
        )
        steps = (of_ids, of_quarantine, of_users)
        self._note(steps)
        self.total = sum(len(step.files) for step in steps) + len(views) + 2
        self._databases(event_ids)
        self._online(views)
        for step in steps:
            for affected in step.files:
                rewrite(affected, step.without)
                self._finished(self._place(affected.paths[0]))
        self._mend()

    def _note(self, steps: Sequence[_Step]) -> None:
        """Write down what was found, the first time."""
        if "counts" in self.pending:
            return
        counts: Counter[str] = Counter()
        for step in steps:
            for affected in step.files:
                for path in affected.paths:
                    counts[self._place(path)] += affected.num_rows
        counts["warehouse.duckdb"] = count_rows(self.storage.warehouse, self.users)
        counts["analytics.duckdb"] = count_rows(self.storage.analytics, self.users)
        self.pending["counts"] = {place: number for place, number in counts.items() if number}
        self.pending["num_files"] = sum(len(step.files) for step in steps)
        self._save()

    def _databases(self, event_ids: pa.Array) -> None:
        """Remove the users from the warehouse and from what analysts open."""
        settings, removal_id = self.pipeline.settings, self.pending["id"]
        remove_from_warehouse(self.storage, settings, self.users, event_ids, removal_id)
        self._finished("warehouse.duckdb")
        remove_from_analytics(self.storage, settings, self.users)
        self._finished("analytics.duckdb")

    def _online(self, views: Sequence[tuple[str, int]]) -> None:
        """Remove the users from what services read."""
        if not views:
            return
        with exclusive(self.storage):
            for view, version in views:
                removed = erase_online(self.storage, view, version, self.users)
                self.counts[_ONLINE] = self.counts.get(_ONLINE, 0) + removed
                self._save()
                self._finished(f"{view} online")
            compact_online(self.storage)

    def _mend(self) -> None:
        """Let the records beside the files say what is in them now."""
        recount_loads(self.storage, self.pipeline.settings)
        recount_sequences(self.storage)
        if self.storage.feature_store.exists():
            with exclusive(self.storage):
                recount_published(self.storage)
        shutil.rmtree(self.storage.scratch, ignore_errors=True)

    def _event_ids(self) -> pa.Array:
        """Return the ids of the users' events: what lists of ids are searched for."""
        files = sorted(self.storage.events.rglob("events*.parquet"))
        if not files or not any(_has_rows(path) for path in self._files_of_ids()):
            return pa.array([], pa.string())
        settings = self.pipeline.settings
        spill = self.storage.scratch / "spill"
        with open_engine(settings.memory_limit, settings.threads, spill) as connection:
            connection.register("erased", pa.table({"user_id": self.users}))
            found = connection.execute(
                f"SELECT DISTINCT event_id FROM {parquet(files)} SEMI JOIN erased USING (user_id)"
            ).to_arrow_table()
        return found["event_id"].combine_chunks().cast(pa.string())

    def _files_of_ids(self) -> list[Path]:
        """Return the files that list ids of events without saying whose they are."""
        names = (VERSIONS_FILE, DELETIONS_FILE)
        return sorted(path for name in names for path in self.storage.events.rglob(name))

    def _files(self) -> list[Path]:
        """Return all Parquet files of the home, canonical events last: ids are found in them."""
        apart = {*self._files_of_ids(), *quarantine_files(self.storage)}
        found = (path for path in self.storage.home.rglob("*.parquet") if path not in apart)
        return sorted(found, key=lambda path: (self._place(path) == "events", path))

    def _place(self, path: Path) -> str:
        """Name the place of a file as the receipt does."""
        parts = path.relative_to(self.storage.home).parts
        return "/".join(parts[:2]) if parts[0] in {"feature_store", "marts"} else parts[0]

    def _finished(self, name: str) -> None:
        """Tell that one more is done."""
        self.done += 1
        self.report(self.done, self.total, name)

    def _save(self) -> None:
        """Write down how far it is."""
        write_json(_pending_file(self.storage), self.pending)


def _drop_indexes(storage: Storage) -> None:
    """Remove the indexes of neighbours, whose vectors have places and no names.

    The lists of neighbours stay; the next night makes an index of those who are left.
    """
    for name in INDEX_FILES:
        for path in storage.home.rglob(f"similar_users/cutoff=*/{name}"):
            path.unlink()


def _has_rows(path: Path) -> bool:
    """Tell whether a Parquet file has a row."""
    return bool(pq.read_metadata(path).num_rows)


def _receipt(storage: Storage, work: _Work, hashes: list[str]) -> dict[str, Any]:
    """Return what is kept of an erasure: no id, but what the ids' keyed hashes are."""
    return {
        "id": work.pending["id"],
        "completed_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "num_users": len(hashes),
        "user_hashes": sorted(hashes),
        "rows": dict(sorted(work.counts.items())),
        "num_files": work.pending["num_files"],
        "not_covered": list(_not_covered(storage)),
    }


def _not_covered(storage: Storage) -> Iterator[str]:
    """Say what the erasure cannot reach."""
    for path in sorted(storage.checkpoints.glob("*/training.json")):
        content = read_json(path)
        if not content.get("is_untrained"):
            yield (
                f"weights of checkpoint {path.parent.name}: trained on events through "
                f"{content['trained_through']}, perhaps on these users'"
            )
    yield "counts and sums over many users: vocabularies, reports, profiles and maps of segments"
    yield "the owner's raw files outside the home, and all copies and backups"
    yield "logs of runs, in which a mistake may have quoted a value"
