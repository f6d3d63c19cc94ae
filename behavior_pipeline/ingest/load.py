"""Loading: raw files become one arrival of canonical events and of quarantined rows.

An event's id is the one its source gave, or the hash of its row's content and of how many
identical rows came before it in the load. So it depends neither on the file, nor on the order of
rows, nor on the arrival: loading the same rows twice, however they are cut into files, changes
nothing, and two truly identical rows stay two events.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date, datetime
from pathlib import Path
from typing import Final

import duckdb

from behavior_pipeline.contracts import CANONICAL_EVENTS, QUARANTINE
from behavior_pipeline.errors import NothingArrivedError
from behavior_pipeline.ingest.arrivals import (
    EVENT_COLUMNS,
    HISTORY,
    QUARANTINE_FILE,
    Arrival,
    LoadSummary,
    arrival_folder,
    commit_load,
    find_arrival,
    num_buckets,
    other_arrivals,
)
from behavior_pipeline.ingest.drift import Drift, naming_changed_columns, note_schema
from behavior_pipeline.ingest.files import RawFiles
from behavior_pipeline.ingest.mapping import check_columns
from behavior_pipeline.ingest.places.fetch import fetched, is_taken_whole
from behavior_pipeline.ingest.presets import Preset
from behavior_pipeline.ingest.readers import open_source
from behavior_pipeline.ingest.refusals import refuse_bad_load, refuse_lost_history
from behavior_pipeline.ingest.schemas import read_schemas
from behavior_pipeline.ingest.sources import unreadable
from behavior_pipeline.ingest.staging import (
    Scope,
    Staged,
    deduplicate,
    placed,
    stage,
    stage_nothing,
)
from behavior_pipeline.ingest.summary import read_summary, summarize
from behavior_pipeline.ingest.versions import (
    changes_everything,
    find_changes,
    find_versions,
    keep_times,
    write_changes,
    write_deletions,
    write_versions,
)
from behavior_pipeline.progress import Report, report_nothing
from behavior_pipeline.settings import Settings
from behavior_pipeline.sql import fetch_one, open_engine, quote_text
from behavior_pipeline.storage import (
    Storage,
    aside_of,
    make_private_folder,
    working_alone,
    writing_folder,
)
from behavior_pipeline.suppression import suppressed_condition

__all__ = ["HISTORY", "content_ids", "load_arrival"]

_NUM_STEPS: Final = 4
_NOT_THE_FILES_FAULT: Final = (
    duckdb.OutOfMemoryException,
    duckdb.InterruptException,
    duckdb.BinderException,
    duckdb.CatalogException,
    duckdb.ParserException,
)


@dataclass(frozen=True)
class _Load:
    """What is being loaded, and where to."""

    preset: Preset
    storage: Storage
    settings: Settings
    arrival: str
    ingested_at: datetime
    own: Arrival | None
    workspace: Path

    @property
    def num_buckets(self) -> int:
        """Buckets that the home's users are in."""
        return num_buckets(self.storage, self.settings.num_buckets)


def load_arrival(
    preset: Preset,
    path: str,
    storage: Storage,
    settings: Settings,
    arrival: str,
    ingested_at: datetime,
    day: date | None = None,
    report: Report = report_nothing,
) -> LoadSummary:
    """Load raw files as one arrival, replacing what the arrival held before.

    Args:
        preset: maps the source's columns.
        path: where the raw events lie, see `places/`; `{date}` in it stands for the day.
        storage: gets `events/arrival=<arrival>/` and `quarantine/arrival=<arrival>/`.
        settings: memory, threads and the share of rows that may be quarantined.
        arrival: "history" for a bulk load, "YYYY-MM-DD" for a night.
        ingested_at: becomes a column of new events; those that the arrival held before as they are
            keep theirs, and a load that says nothing else leaves everything as it is.
        day: the night's day. If the path has `{date}` or `arrived_at`, what it then names is taken
            whole, otherwise only the rows that occurred on that UTC day.
        report: told of four steps.

    Raises:
        PipelineError: if there is nothing to read, a column is missing, too many rows break the
            contract, or a bulk load has a single event type or lacks events that an earlier one
            had. Nothing is written then. An empty file of a night's own day is no mistake: the day
            had no events; whether a missing one is, `settings.on_missing_arrival` says.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", arrival):
        raise ValueError(f"an arrival is named by letters, digits, - and _, not {arrival!r}")
    scope = Scope(None if is_taken_whole(path) else day, is_bulk=arrival == HISTORY)
    engine = open_engine(settings.memory_limit, settings.threads, storage.scratch)
    with (
        working_alone(storage),
        engine as connection,
        _workspace(storage.scratch) as workspace,
    ):
        own = find_arrival(storage, arrival)
        load = _Load(preset, storage, settings, arrival, ingested_at, own, workspace)
        try:
            with fetched(path, day, workspace, settings, report) as found:
                return _load(connection, load, found, scope, report)
        except NothingArrivedError as nothing:
            is_accepted = not nothing.is_missing or settings.on_missing_arrival == "accept"
            if not (is_accepted and is_taken_whole(path) and day is not None):
                raise
            return _load_nothing(connection, load, report)


def _load_nothing(
    connection: duckdb.DuckDBPyConnection, load: _Load, report: Report
) -> LoadSummary:
    """Load a day without events: an arrival that holds nothing."""
    stage_nothing(connection, placed(load.ingested_at, load.num_buckets))
    summary = _settle(connection, load, Staged(0, []), Drift(), report)
    report(_NUM_STEPS, _NUM_STEPS, "no events")
    return summary


def _load(
    connection: duckdb.DuckDBPyConnection,
    load: _Load,
    found: RawFiles,
    scope: Scope,
    report: Report,
) -> LoadSummary:
    """Stage, judge, compare and write."""
    place = placed(load.ingested_at, load.num_buckets)
    try:
        report(0, _NUM_STEPS, "reading")
        source = open_source(connection, found, load.workspace)
        last_seen = read_schemas(load.storage).last_seen(load.arrival)
        check_columns(load.preset.columns, source.columns, source.path, last_seen)
        suppressed = suppressed_condition(connection, load.storage)
        staged = stage(connection, load.preset, source, scope, place, load.workspace, suppressed)
    except _NOT_THE_FILES_FAULT:
        raise
    except duckdb.Error as error:
        raise unreadable(found.path, error) from None
    report(1, _NUM_STEPS, "judging")
    with naming_changed_columns(load.storage, load.arrival, load.preset, source, found.kind):
        refuse_bad_load(connection, load.preset, source, load.settings, scope.day, scope.is_bulk)
        deduplicate(connection, load.preset, source, scope, place, suppressed)
        if scope.is_bulk:
            refuse_lost_history(connection, load.own.event_files() if load.own else [], found.path)
    drift = note_schema(connection, load.storage, load.arrival, load.preset, source, found.kind)
    report(2, _NUM_STEPS, "comparing")
    summary = _settle(connection, load, staged, drift, report)
    report(_NUM_STEPS, _NUM_STEPS, f"{summary.num_stored:,} events")
    return summary


@contextmanager
def _workspace(scratch: Path) -> Iterator[Path]:
    """Yield a folder for staged rows and mended copies of files, and remove it."""
    folder = make_private_folder(aside_of(scratch / "load"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _settle(
    connection: duckdb.DuckDBPyConnection,
    load: _Load,
    staged: Staged,
    drift: Drift,
    report: Report,
) -> LoadSummary:
    """Write the arrival if it says anything new; return what is recorded of it."""
    events_id, content_id = content_ids(connection)
    if load.own is not None and load.own.content_id == content_id:
        return replace(read_summary(load.storage, load.arrival), drift=drift.lines)
    find_versions(connection, other_arrivals(load.storage, load.arrival), load.own)
    is_everything = bool(staged.files) and changes_everything(connection, load.own)
    if is_everything:  # a list of all users and days would say no more
        connection.execute("CREATE TEMP TABLE changes (user_id VARCHAR, activity_date DATE)")
    else:
        find_changes(connection, load.arrival)
    keep_times(connection, load.own)
    summary = summarize(
        connection,
        staged.num_read - staged.num_suppressed,
        load.arrival,
        is_everything=is_everything,
    )
    report(3, _NUM_STEPS, "writing")
    same = load.own if load.own is not None and load.own.events_id == events_id else None
    # An arrival that says again what it said before is a load of its own: others came between.
    load_id = _digest(content_id, load.own.load_id if load.own else "")
    _write(connection, load, load_id, staged, same)
    document = {
        "content_id": content_id,
        "events_id": events_id,
        "is_bucketed": same.is_bucketed if same else bool(staged.files),
        "num_buckets": load.num_buckets,
        "changes_everything": is_everything
        or (load.own is not None and load.own.changes_everything),
        "ingested_at": load.ingested_at.isoformat(),
    }
    summary = replace(
        summary,
        drift=drift.lines,
        num_read=staged.num_read,
        num_suppressed=staged.num_suppressed,
    )
    commit_load(load.storage, load.arrival, load_id, summary, document)
    return summary


def content_ids(connection: duckdb.DuckDBPyConnection) -> tuple[str, str]:
    """Return the hash of `stored` and `deletions`, and the hash of these and `quarantined`."""
    events_id = _content_id(connection, stored=EVENT_COLUMNS, deletions=("event_id",))
    rejected = _content_id(connection, quarantined=_QUARANTINE_COLUMNS)
    return events_id, _digest(events_id, rejected)


def _digest(*texts: str) -> str:
    """Return a hash of some texts."""
    return hashlib.sha256(" ".join(texts).encode()).hexdigest()[:16]


def _content_id(connection: duckdb.DuckDBPyConnection, **relations: Sequence[str]) -> str:
    """Return a hash of some columns of all rows of some relations, whatever their order."""
    digest = hashlib.sha256()
    for relation, columns in relations.items():
        query = f"SELECT count(*), sum(hash({', '.join(columns)})::HUGEINT) FROM {relation}"
        digest.update(repr(fetch_one(connection, query)).encode())
    return digest.hexdigest()[:16]


_QUARANTINE_COLUMNS: Final = [n for n in QUARANTINE.schema.names if n != "quarantined_at"]


def _write(
    connection: duckdb.DuckDBPyConnection,
    load: _Load,
    load_id: str,
    staged: Staged,
    same: Arrival | None,
) -> None:
    """Write the files of a load: quarantine first, then what `load.json` will point to.

    If the load before it has the `same` events, its files are kept.
    """
    quarantine = arrival_folder(load.storage.quarantine, load.arrival) / f"load={load_id}"
    with writing_folder(quarantine) as folder:
        _write_quarantine(connection, folder / QUARANTINE_FILE, load.ingested_at)
    events = arrival_folder(load.storage.events, load.arrival) / f"load={load_id}"
    with writing_folder(events) as folder:
        write_versions(connection, load.arrival, load_id, folder)
        write_changes(connection, load.own, folder)
        write_deletions(connection, folder)
        if same is not None:  # and so keep the time at which they came
            for file in same.event_files():
                (folder / file.name).hardlink_to(file)
        else:
            _write_events(connection, staged, folder, has_own=load.own is not None)


def _write_events(
    connection: duckdb.DuckDBPyConnection, staged: Staged, folder: Path, *, has_own: bool
) -> None:
    """Write the relation `timed`: one file in the contract's order, or files by bucket in any.

    A bulk load is sorted where its order first matters, in the models: a sort here as well would
    double its time, and every full build would sort all the same.
    """
    columns = ", ".join(CANONICAL_EVENTS.schema.names)
    if not staged.files:
        order = ", ".join(CANONICAL_EVENTS.sort_order)
        query = f"SELECT {columns} FROM timed ORDER BY {order}"
        _copy(connection, query, folder / "events.parquet")
        return
    if not has_own and not fetch_one(connection, "SELECT count(*) FROM frequent")[0]:
        _take_as_staged(staged.files, folder)
        return
    for bucket in sorted({_bucket_of(file) for file in staged.files}):
        query = f"SELECT {columns} FROM timed WHERE user_bucket = {bucket}"
        _copy(connection, query, folder / f"events-{bucket:04d}-0000.parquet")


def _take_as_staged(files: Sequence[Path], folder: Path) -> None:
    """Move staged files to where the load's events belong."""
    for number, file in enumerate(files):
        target = folder / f"events-{_bucket_of(file):04d}-{number:04d}.parquet"
        file.rename(target)
        target.chmod(0o600)


def _bucket_of(staged_file: Path) -> int:
    """Return the bucket whose users a staged file holds."""
    return int(staged_file.parent.name.partition("=")[2])


def _write_quarantine(
    connection: duckdb.DuckDBPyConnection, file: Path, quarantined_at: datetime
) -> None:
    """Write the relation `quarantined` in the contract's columns and order."""
    time = f"TIMESTAMPTZ {quote_text(quarantined_at.isoformat())} AS quarantined_at"
    columns, order = ", ".join(_QUARANTINE_COLUMNS), ", ".join(QUARANTINE.sort_order)
    _copy(connection, f"SELECT {columns}, {time} FROM quarantined ORDER BY {order}", file)


def _copy(connection: duckdb.DuckDBPyConnection, query: str, file: Path) -> None:
    """Write a query to a private Parquet file."""
    connection.execute(
        f"COPY ({query}) TO {quote_text(str(file))} (FORMAT parquet, COMPRESSION zstd, "
        "COMPRESSION_LEVEL 1)"
    )
    file.chmod(0o600)
