"""Staging: a source's rows are judged and become `accepted`, `deletions` and `quarantined`.

Small loads are staged in DuckDB's memory. A bulk load streams into Parquet files by bucket of
users, so that a bucket is all that must fit into memory afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Final

import duckdb

from behavior_pipeline.contracts import CANONICAL_EVENTS
from behavior_pipeline.ingest.arrivals import EVENT_COLUMNS
from behavior_pipeline.ingest.presets import Preset
from behavior_pipeline.ingest.raw_rows import SEPARATORS
from behavior_pipeline.ingest.sources import MALFORMED_LINES, Source
from behavior_pipeline.ingest.validation import judged_rows
from behavior_pipeline.sql import fetch_one, parquet, quote_text, user_bucket
from behavior_pipeline.storage import make_private_folder
from behavior_pipeline.windows import midnight

BULK_ROWS: Final = 2_000_000
"""A source with more rows is staged on disk, by bucket of users."""

ROW_GROUP_ROWS: Final = 122_880
EVENTS: Final = ", ".join(EVENT_COLUMNS)
NOBODY: Final = "false"
"""SQL of whose rows are passed over, where nobody was erased."""


@dataclass(frozen=True)
class Scope:
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


@dataclass(frozen=True)
class Staged:
    """A staged source.

    Attributes:
        num_read: rows of the source, counted apart from staging.
        files: `user_bucket=<k>/<name>` of the accepted rows of a bulk load; none for a small one.
        num_suppressed: rows of erased users, which were passed over.
    """

    num_read: int
    files: list[Path]
    num_suppressed: int = 0


def stage(
    connection: duckdb.DuckDBPyConnection,
    preset: Preset,
    source: Source,
    scope: Scope,
    place: str,
    workspace: Path,
    suppressed: str = NOBODY,
) -> Staged:
    """Read the source into the relations `accepted`, `deletions` and `quarantined`.

    Twice: rows that are good are read in parallel and without a row number; only if some are not,
    the source is read in order, and those are kept with their number and their raw text.
    `accepted` has EVENT_COLUMNS, `ingested_at` and `user_bucket`; `deletions` has `event_id`.

    Args:
        connection: gets the relations.
        preset: maps the source's columns.
        source: what to read.
        scope: which rows to take.
        place: SQL of `ingested_at` and `user_bucket`, as `placed` writes it.
        workspace: an existing folder for the files of a bulk load.
        suppressed: SQL that says whether a row's user was erased, see `suppression.py`.
    """
    every = judged_rows(preset.columns, source.columns, source.plain_rows)
    judged = f"SELECT * FROM ({every}) WHERE NOT {suppressed}"
    good = f"({judged}) WHERE reason IS NULL AND NOT is_deleted AND {scope.condition}"
    query = f"SELECT {EVENTS}, {place} FROM {good}"
    files = []
    if source.num_rows > BULK_ROWS:
        files = _stage_on_disk(connection, query, workspace / "staged")
    else:
        connection.execute(f"CREATE TEMP TABLE accepted AS {query}")
    _stage_deletions(connection, preset, judged, scope)
    num_suppressed = 0
    if suppressed != NOBODY:
        rows = f"({every}) WHERE {suppressed} AND coalesce({_in_scope(scope)}, false)"
        num_suppressed = _count(connection, rows)
    num_suppressed += _stage_quarantined(
        connection, preset, source, scope, suppressed, num_suppressed
    )
    num_read = _count_read(connection, every, source, scope, num_suppressed)
    return Staged(num_read, files, num_suppressed)


def stage_nothing(connection: duckdb.DuckDBPyConnection, place: str) -> None:
    """Make the relations of `stage` and `deduplicate` without a row."""
    types = {"occurred_at": "TIMESTAMPTZ", "amount": "DOUBLE", "codes": "SMALLINT[]"}
    columns = ", ".join(f"NULL::{types.get(name, 'VARCHAR')} AS {name}" for name in EVENT_COLUMNS)
    connection.execute(
        f"CREATE TEMP TABLE stored AS SELECT *, {place} FROM (SELECT {columns}) LIMIT 0"
    )
    connection.execute("CREATE TEMP TABLE deletions (event_id VARCHAR)")
    connection.execute(
        "CREATE TEMP TABLE quarantined (source_file VARCHAR, row_number BIGINT, reason VARCHAR, "
        "column_name VARCHAR, raw_row VARCHAR)"
    )


def placed(ingested_at: datetime, num_buckets: int) -> str:
    """Return SQL of the canonical columns that say when a row came and where it lies."""
    time = f"TIMESTAMPTZ {quote_text(ingested_at.isoformat())} AS ingested_at"
    return f"{time}, {user_bucket('user_id', num_buckets)} AS user_bucket"


def _stage_on_disk(connection: duckdb.DuckDBPyConnection, query: str, folder: Path) -> list[Path]:
    """Stream a query into Parquet files by bucket; `accepted` becomes a view of them.

    In the contract's columns: they may become the arrival's files as they are.
    """
    make_private_folder(folder)
    columns = ", ".join(CANONICAL_EVENTS.schema.names)
    connection.execute(
        f"COPY (SELECT {columns} FROM ({query})) TO {quote_text(str(folder))} "
        "(FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL 1, "
        f"ROW_GROUP_SIZE {ROW_GROUP_ROWS}, PARTITION_BY (user_bucket), "
        "WRITE_PARTITION_COLUMNS true, OVERWRITE_OR_IGNORE true)"
    )
    files = sorted(folder.glob("user_bucket=*/*"))
    if files:
        rows = f"FROM {parquet(files)}"
        connection.execute(f"CREATE TEMP VIEW accepted AS {rows}")
    else:
        connection.execute(f"CREATE TEMP TABLE accepted AS {query} LIMIT 0")
    return files


def _stage_deletions(
    connection: duckdb.DuckDBPyConnection, preset: Preset, judged: str, scope: Scope
) -> None:
    """Keep the ids of tombstones; a tombstone without a time belongs to any day."""
    rows = "SELECT NULL::VARCHAR AS event_id LIMIT 0"
    if preset.columns.is_deleted is not None:
        rows = (
            f"SELECT event_id FROM ({judged}) WHERE reason IS NULL AND is_deleted "
            f"AND coalesce({scope.condition}, true)"
        )
    connection.execute(f"CREATE TEMP TABLE deletions AS {rows}")


def _in_scope(scope: Scope) -> str:
    """Return SQL that says whether a judged row is taken; a tombstone without a time always is."""
    if scope.day is None:
        return "true"
    return f"coalesce({scope.condition}, reason IS NULL AND is_deleted)"


def _stage_quarantined(
    connection: duckdb.DuckDBPyConnection,
    preset: Preset,
    source: Source,
    scope: Scope,
    suppressed: str,
    num_suppressed: int,
) -> int:
    """Keep rows that break the contract, with their number and their raw text.

    Returns:
        How many lines that are no rows were passed over, because they name an erased user.
    """
    num_good = _count(connection, "accepted") + _count(connection, "deletions") + num_suppressed
    is_complete = scope.day is None and num_good == source.num_rows
    judged = judged_rows(preset.columns, source.columns, source.numbered_rows)
    rejected = f"reason IS NOT NULL AND {scope.condition} AND NOT {suppressed}"
    rejected = "false" if is_complete else rejected
    connection.execute(
        "CREATE TEMP TABLE quarantined AS "
        f"SELECT source_file, row_number, reason, column_name, {source.raw_row} AS raw_row "
        f"FROM ({judged}) WHERE {rejected}"
    )
    if scope.day is not None:  # a line that is no row has no day
        return 0
    kept = f"{MALFORMED_LINES} WHERE NOT {_names_erased(suppressed)}"
    connection.execute(
        f"INSERT INTO quarantined SELECT source_file, row_number, reason, NULL, raw_row FROM {kept}"
    )
    return source.num_malformed - _count(connection, kept)


def _names_erased(suppressed: str) -> str:
    """Return SQL that says whether a line that is no row names an erased user anywhere."""
    if suppressed == NOBODY:
        return "false"
    values = f"unnest(regexp_split_to_array(raw_row, {quote_text(SEPARATORS)}))"
    named = (
        f"SELECT source_file, row_number FROM (SELECT source_file, row_number, {values} AS user_id "
        f"FROM {MALFORMED_LINES}) WHERE {suppressed}"
    )
    return f"(source_file, row_number) IN ({named})"


def _count_read(
    connection: duckdb.DuckDBPyConnection,
    judged: str,
    source: Source,
    scope: Scope,
    num_suppressed: int,
) -> int:
    """Count the rows of the source apart from staging, so that none can vanish between."""
    num_read = source.num_rows + source.num_malformed
    if scope.day is not None:
        num_read = _count(connection, f"({judged}) WHERE {_in_scope(scope)}")
    num_staged = sum(_count(connection, name) for name in ("accepted", "deletions", "quarantined"))
    num_staged += num_suppressed
    if num_staged != num_read:
        raise AssertionError(f"read {num_read} rows, but staged {num_staged}")
    return num_read


def deduplicate(
    connection: duckdb.DuckDBPyConnection,
    preset: Preset,
    source: Source,
    scope: Scope,
    place: str,
    suppressed: str = NOBODY,
) -> None:
    """Create the relation `stored`: accepted rows, one for each id.

    Of rows with one given id the newest counts: that of the last file by name; a tombstone before
    a row of the same file; then the greatest by its columns. If a tombstone wins, the id stays in
    `deletions`; otherwise it leaves them.

    Args:
        connection: has what `stage` left.
        preset, source, scope, suppressed: as for `stage`.
        place: as `placed` gave it to `stage`.
    """
    _find_frequent(connection)
    if not _count(connection, "frequent"):
        connection.execute("CREATE TEMP VIEW stored AS FROM accepted")
        return
    if preset.columns.event_id is None:
        connection.execute(f"CREATE TEMP TABLE settled AS {_number_identical_rows()}")
    else:
        judged = judged_rows(preset.columns, source.columns, source.plain_rows)
        rows = f"({judged}) WHERE reason IS NULL AND NOT {suppressed} "
        rows += f"AND coalesce({scope.condition}, is_deleted)"
        _settle_frequent(connection, rows, place)
    connection.execute(
        f"CREATE TEMP VIEW stored AS SELECT {_STORED} FROM accepted "
        f"WHERE event_id NOT IN (FROM frequent) UNION ALL SELECT {_STORED} FROM settled"
    )


_STORED: Final = f"{EVENTS}, ingested_at, user_bucket"
_IDS_AT_ONCE: Final = 40_000_000  # as 64-bit hashes with their counts, about 2 GB


def _find_frequent(connection: duckdb.DuckDBPyConnection) -> None:
    """Create the table `frequent` of ids that stand on more than one row.

    By 64-bit hashes first, a share of them at a time, so that memory is bounded; the few rows
    whose hash repeats are then compared by the ids themselves.
    """
    ids = "(SELECT event_id FROM accepted UNION ALL FROM deletions)"
    shares = 1 + _count(connection, ids) // _IDS_AT_ONCE
    connection.execute("CREATE TEMP TABLE suspects (id_hash UBIGINT)")
    for share in range(shares):
        connection.execute(
            "INSERT INTO suspects SELECT id_hash "
            f"FROM (SELECT hash(event_id) AS id_hash FROM {ids}) "
            f"WHERE id_hash % {shares} = {share} "
            "GROUP BY id_hash HAVING count(*) > 1"
        )
    is_suspect = "hash(event_id) IN (FROM suspects)" if _count(connection, "suspects") else "false"
    connection.execute(
        f"CREATE TEMP TABLE frequent AS SELECT event_id FROM {ids} WHERE {is_suspect} "
        "GROUP BY event_id HAVING count(*) > 1"
    )


def _settle_frequent(connection: duckdb.DuckDBPyConnection, rows: str, place: str) -> None:
    """Create the table `settled` with the repeated ids' rows that count; mend `deletions`."""
    order = ", ".join(f"{name} DESC" for name in EVENT_COLUMNS if name != "event_id")
    connection.execute(
        f"CREATE TEMP TABLE newest AS SELECT {EVENTS}, is_deleted "
        f"FROM {rows} AND event_id IN (FROM frequent) QUALIFY row_number() OVER "
        f"(PARTITION BY event_id ORDER BY source_file DESC, is_deleted DESC, {order}) = 1"
    )
    connection.execute(
        f"CREATE TEMP TABLE settled AS SELECT {EVENTS}, {place} FROM newest WHERE NOT is_deleted"
    )
    connection.execute(
        "CREATE OR REPLACE TEMP TABLE deletions AS SELECT DISTINCT event_id FROM deletions "
        "WHERE event_id NOT IN (SELECT event_id FROM settled)"
    )


def _number_identical_rows() -> str:
    """Return SQL that gives the second of identical rows, the third and so on ids of their own."""
    return (
        "SELECT * EXCLUDE (repeat) REPLACE "
        "(if(repeat = 1, event_id, md5(event_id || ':' || repeat)) AS event_id) FROM "
        f"(SELECT {_STORED}, row_number() OVER (PARTITION BY event_id) AS repeat "
        "FROM accepted WHERE event_id IN (FROM frequent))"
    )


def _count(connection: duckdb.DuckDBPyConnection, relation: str) -> int:
    """Count the rows of a relation."""
    return int(fetch_one(connection, f"SELECT count(*) FROM {relation}")[0])
