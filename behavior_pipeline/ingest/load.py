"""Loading: raw files become one arrival of canonical events and of quarantined rows.

An event's id is the one its source gave, or the hash of its row's content and of how many
identical rows came before it in the load. So it depends neither on the file, nor on the order of
rows, nor on the arrival: loading the same rows twice, however they are cut into files, changes
nothing, and two truly identical rows stay two events.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import duckdb

from behavior_pipeline.ingest.arrivals import (
    EVENT_COLUMNS,
    HISTORY,
    LoadSummary,
    other_arrivals,
    own_events,
    write_arrival,
)
from behavior_pipeline.ingest.drift import naming_changed_columns, note_schema
from behavior_pipeline.ingest.files import DATE_PLACE, find_files
from behavior_pipeline.ingest.mapping import check_columns
from behavior_pipeline.ingest.presets import Preset
from behavior_pipeline.ingest.readers import open_source
from behavior_pipeline.ingest.refusals import refuse_bad_load, refuse_lost_history
from behavior_pipeline.ingest.schemas import read_schemas
from behavior_pipeline.ingest.sources import MALFORMED_LINES, Source, unreadable
from behavior_pipeline.ingest.validation import judged_rows
from behavior_pipeline.progress import Report, report_nothing
from behavior_pipeline.settings import Settings
from behavior_pipeline.sql import open_engine, quote_text
from behavior_pipeline.storage import Storage, aside_of, make_private_folder
from behavior_pipeline.windows import midnight

_NUM_STEPS: Final = 4

_NOT_THE_FILES_FAULT: Final = (
    duckdb.OutOfMemoryException,
    duckdb.InterruptException,
    duckdb.BinderException,
    duckdb.CatalogException,
    duckdb.ParserException,
)
_EVENTS: Final = ", ".join(EVENT_COLUMNS)


@dataclass(frozen=True)
class _Scope:
    """Which rows of the source a load takes.

    Attributes:
        day: only rows that occurred on this UTC day (the replay of a dump); None takes all.
        is_bulk: whether this is a history, on which something shall be learned.
    """

    day: date | None
    is_bulk: bool

    @property
    def condition(self) -> str:
        """SQL on canonical rows."""
        if self.day is None:
            return "true"
        begin = midnight(self.day)
        bounds = [quote_text(time.isoformat()) for time in (begin, begin + timedelta(days=1))]
        return f"occurred_at >= TIMESTAMPTZ {bounds[0]} AND occurred_at < TIMESTAMPTZ {bounds[1]}"


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
        path: a file, a folder or a glob; `{date}` in it stands for the day.
        storage: gets `events/arrival=<arrival>/` and `quarantine/arrival=<arrival>/`.
        settings: memory, threads and the share of rows that may be quarantined.
        arrival: "history" for a bulk load, "YYYY-MM-DD" for a night.
        ingested_at: becomes a column of new events; events already here keep theirs.
        day: the night's day. If the path has `{date}`, those files are taken whole, otherwise only
            the rows that occurred on that UTC day.
        report: told of four steps.

    Raises:
        PipelineError: if there is nothing to read, a column is missing, too many rows break the
            contract, or a bulk load has a single event type or lacks events that an earlier one
            had. Nothing is written then.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", arrival):
        raise ValueError(f"an arrival is named by letters, digits, - and _, not {arrival!r}")
    scope = _Scope(None if DATE_PLACE in path else day, is_bulk=arrival == HISTORY)
    found = find_files(path, day)
    engine = open_engine(settings.memory_limit, settings.threads, storage.scratch)
    with engine as connection, _workspace(storage.scratch) as workspace:
        try:
            report(0, _NUM_STEPS, "reading")
            source = open_source(connection, found, workspace)
            last_seen = read_schemas(storage).last_seen(arrival)
            check_columns(preset.columns, source.columns, source.path, last_seen)
            _stage(connection, preset, source, scope)
            report(1, _NUM_STEPS, "judging")
            num_read = _count_read(connection, preset, source, scope)
        except _NOT_THE_FILES_FAULT:
            raise
        except duckdb.Error as error:
            raise unreadable(found.path, error) from None
        with naming_changed_columns(storage, arrival, preset, source, found.kind):
            refuse_bad_load(connection, preset, source, settings, scope.day, scope.is_bulk)
            _deduplicate(connection, preset, other_arrivals(storage, arrival))
            if scope.is_bulk:
                refuse_lost_history(connection, own_events(storage, arrival), found.path)
        report(2, _NUM_STEPS, "comparing")
        drift = note_schema(connection, storage, arrival, preset, source, found.kind)
        summary = replace(_summarize(connection, num_read), drift=drift.lines)
        report(3, _NUM_STEPS, "writing")
        write_arrival(connection, storage, arrival, summary, ingested_at)
        report(_NUM_STEPS, _NUM_STEPS, f"{summary.num_inserted:,} events")
    return summary


@contextmanager
def _workspace(scratch: Path) -> Iterator[Path]:
    """Yield a folder for mended copies of files, and remove it."""
    folder = make_private_folder(aside_of(scratch / "load"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _stage(
    connection: duckdb.DuckDBPyConnection, preset: Preset, source: Source, scope: _Scope
) -> None:
    """Read the source into the tables `accepted` and `quarantined`.

    Twice: rows that are good are read in parallel and without a row number; only if some are not,
    the source is read in order, and those are kept with their number and their raw text.
    """
    judged = judged_rows(preset.columns, source.columns, source.plain_rows)
    connection.execute(
        f"CREATE TEMP TABLE accepted AS SELECT {_EVENTS} FROM ({judged}) "
        f"WHERE reason IS NULL AND {scope.condition}"
    )
    is_complete = scope.day is None and _count(connection, "accepted") == source.num_rows
    judged = judged_rows(preset.columns, source.columns, source.numbered_rows)
    rejected = "false" if is_complete else f"reason IS NOT NULL AND {scope.condition}"
    connection.execute(
        "CREATE TEMP TABLE quarantined AS "
        f"SELECT source_file, row_number, reason, column_name, {source.raw_row} AS raw_row "
        f"FROM ({judged}) WHERE {rejected}"
    )
    if scope.day is None:  # a line that is no row has no day
        connection.execute(
            "INSERT INTO quarantined SELECT source_file, row_number, reason, NULL, raw_row "
            f"FROM {MALFORMED_LINES}"
        )


def _count_read(
    connection: duckdb.DuckDBPyConnection, preset: Preset, source: Source, scope: _Scope
) -> int:
    """Count the rows of the source apart from staging, so that none can vanish between."""
    num_read = source.num_rows + source.num_malformed
    if scope.day is not None:
        judged = judged_rows(preset.columns, source.columns, source.plain_rows)
        num_read = _count(connection, f"({judged}) WHERE {scope.condition}")
    num_staged = _count(connection, "accepted") + _count(connection, "quarantined")
    if num_staged != num_read:
        raise AssertionError(f"read {num_read} rows, but staged {num_staged}")
    return num_read


def _deduplicate(connection: duckdb.DuckDBPyConnection, preset: Preset, others: list[str]) -> None:
    """Create the view `inserted`: accepted rows, once each, that no other arrival has."""
    connection.execute(
        "CREATE TEMP TABLE frequent AS "
        "SELECT event_id FROM accepted GROUP BY event_id HAVING count(*) > 1"
    )
    keep = _keep_one_each() if preset.columns.event_id else _number_identical_rows()
    connection.execute(
        f"CREATE TEMP VIEW distinct_events AS SELECT {_EVENTS} FROM accepted "
        f"WHERE event_id NOT IN (FROM frequent) UNION ALL {keep}"
    )
    connection.execute("CREATE TEMP TABLE known (event_id VARCHAR)")
    if others:
        connection.execute(
            "INSERT INTO known SELECT DISTINCT event_id FROM "
            "read_parquet(?, hive_partitioning = false) "
            "WHERE event_id IN (SELECT event_id FROM distinct_events)",
            [others],
        )
    connection.execute(
        "CREATE TEMP VIEW inserted AS SELECT * FROM distinct_events "
        "WHERE event_id NOT IN (FROM known)"
    )


def _number_identical_rows() -> str:
    """Return SQL that gives the second of identical rows, the third and so on ids of their own."""
    return (
        "SELECT * EXCLUDE (repeat) REPLACE "
        "(if(repeat = 1, event_id, md5(event_id || ':' || repeat)) AS event_id) FROM "
        f"(SELECT {_EVENTS}, row_number() OVER (PARTITION BY event_id) AS repeat "
        "FROM accepted WHERE event_id IN (FROM frequent))"
    )


def _keep_one_each() -> str:
    """Return SQL that keeps one row of each given id: the first by all of its columns."""
    order = ", ".join(name for name in EVENT_COLUMNS if name != "event_id")
    return (
        f"SELECT {_EVENTS} FROM accepted WHERE event_id IN (FROM frequent) "
        f"QUALIFY row_number() OVER (PARTITION BY event_id ORDER BY {order}) = 1"
    )


def _summarize(connection: duckdb.DuckDBPyConnection, num_read: int) -> LoadSummary:
    """Count what was accepted, inserted, repeated and quarantined."""
    num_accepted, num_users, first, last = _fetch(
        connection,
        "SELECT count(*), count(DISTINCT user_id), min(occurred_at), max(occurred_at) "
        "FROM accepted",
    )
    num_inserted = _count(connection, "inserted")
    reasons = connection.execute(
        "SELECT reason, count(*) FROM quarantined GROUP BY reason ORDER BY reason"
    ).fetchall()
    return LoadSummary(
        num_read=num_read,
        num_accepted=num_accepted,
        num_inserted=num_inserted,
        num_repeated=num_accepted - num_inserted,
        num_quarantined=sum(count for _, count in reasons),
        num_users=num_users,
        first_event_at=first,
        last_event_at=last,
        reasons=dict(reasons),
    )


def _count(connection: duckdb.DuckDBPyConnection, relation: str) -> int:
    """Count the rows of a relation."""
    return int(_fetch(connection, f"SELECT count(*) FROM {relation}")[0])


def _fetch(connection: duckdb.DuckDBPyConnection, query: str) -> tuple[Any, ...]:
    """Return the one row that a query answers."""
    (row,) = connection.execute(query).fetchall()
    return row
