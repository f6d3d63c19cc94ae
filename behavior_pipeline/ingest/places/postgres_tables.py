"""A table or view of PostgreSQL, streamed to Parquet in Arrow batches: never all rows in memory.

Who reads, and with which password, only the environment says, as libpq has it: PGUSER, PGPASSWORD,
PGPASSFILE, PGSERVICE, PGSSLMODE and so on.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from datetime import date, timedelta
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any, Final
from urllib.parse import parse_qsl, urlencode

import pyarrow as pa
import pyarrow.parquet as pq

from behavior_pipeline.errors import PipelineError
from behavior_pipeline.ingest.files import DATE_PLACE, RawFiles
from behavior_pipeline.ingest.places.addresses import (
    TableName,
    first_line,
    is_disk_full,
    no_room,
    no_table,
    parse_table,
    without_secrets,
)
from behavior_pipeline.progress import Report
from behavior_pipeline.sql import quote_identifier

BATCH_BYTES: Final = 16 * 2**20
"""About so much of a table is in memory at a time; the driver takes it as a hint."""

_HOST: Final = r"(?:[\w.%-]+|\[[0-9A-Fa-f:.]+\])?(?::\d+)?"
_SERVER: Final = re.compile(rf"{_HOST}(?:,{_HOST})*(?:/[^/]*)?")
_KEYS: Final = frozenset({"table", "arrived_at"})
_WAY_OUT: Final = (
    "Write postgresql://host:port/database?table=schema.table, and &arrived_at=column for nightly "
    "arrivals."
)
_NO_CREDENTIALS: Final = (
    "Leave them out, and set PGUSER and PGPASSWORD, PGPASSFILE or PGSERVICE in the environment."
)
_SAID_BY_SERVER: Final = re.compile(r"(?:ERROR|FATAL|PANIC):\s+(.+)")

_PLAIN: Final = frozenset(
    {"int2", "int4", "int8", "float4", "float8", "bool", "text", "varchar", "bytea", "time"}
)
_PLAIN_ITEMS: Final = _PLAIN - {"bytea", "time"}
_TIMES: Final = frozenset({"timestamptz", "timestamp", "date"})
_CASTS: Final = {"oid": "int8", "money": "numeric::text"}
# The driver wraps infinity around to some odd time. These bounds are finite for it and for
# DuckDB, and far outside the calendar, so such an event is quarantined as any unreadable time is.
_FIRST_TIME: Final = "4713-01-01 00:00:00+00 BC"
_LAST_TIME: Final = "294246-01-01 00:00:00+00"

# Of the catalog, not of information_schema: that one has no materialized views. A domain counts
# as the type below it.
_COLUMNS: Final = """
SELECT a.attname::text, coalesce(base.typname, t.typname)::text
FROM pg_catalog.pg_attribute a
JOIN pg_catalog.pg_class c ON c.oid = a.attrelid
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
JOIN pg_catalog.pg_type t ON t.oid = a.atttypid
LEFT JOIN pg_catalog.pg_type base ON t.typtype = 'd' AND base.oid = t.typbasetype
WHERE n.nspname = $1 AND c.relname = $2 AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
  AND a.attnum > 0 AND NOT a.attisdropped
ORDER BY a.attnum
"""
_TABLES: Final = """
SELECT n.nspname || '.' || c.relname
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f') AND n.nspname <> 'information_schema'
  AND n.nspname NOT LIKE 'pg\\_%' AND has_table_privilege(c.oid, 'SELECT')
ORDER BY 1 LIMIT 1000
"""


@dataclass(frozen=True)
class PostgresTable:
    """A table on a server.

    Attributes:
        server: `host:port/database`, each of them optional as in libpq.
        name: schema and table.
        arrived_at: the column that says when a row came, or None.
    """

    server: str
    name: TableName
    arrived_at: str | None

    @property
    def address(self) -> str:
        """The table as people know it."""
        return f"postgresql://{self.server}?table={self.name}"


def parse_postgres(path: str) -> PostgresTable:
    """Return the table that a path names.

    Raises:
        PipelineError: if the path carries a user or a password, or is not well formed. The path
            is not repeated then.
    """
    server, _, query = path.partition("://")[2].partition("?")
    pairs = parse_qsl(query, keep_blank_values=True)
    given = dict(pairs)
    if "@" in path or {key.lower() for key in given} & {"user", "password", "passfile"}:
        raise PipelineError("The PostgreSQL path carries a user or a password.", _NO_CREDENTIALS)
    if DATE_PLACE in path:
        raise PipelineError(f"A PostgreSQL path takes no {DATE_PLACE}.", _WAY_OUT)
    if not _SERVER.fullmatch(server):
        raise PipelineError("The PostgreSQL path names no host:port/database.", _WAY_OUT)
    if not given.keys() <= _KEYS or len(pairs) != len(given):
        raise PipelineError(
            "The PostgreSQL path may say `table` and `arrived_at`, once each, and nothing else.",
            "Other settings of the connection come from the environment, such as PGSSLMODE.",
        )
    name = parse_table(given.get("table", ""), "public")
    if name is None or given.get("arrived_at") == "":
        raise PipelineError("The PostgreSQL path names no table, or no column.", _WAY_OUT)
    return PostgresTable(server, name, given.get("arrived_at"))


def fetch_postgres(path: str, day: date | None, folder: Path, report: Report) -> RawFiles:
    """Stream a table's rows to Parquet, as of one moment.

    Args:
        path: `postgresql://host:port/database?table=schema.table&arrived_at=column`.
        day: with `arrived_at`, only rows that came on this UTC day; None takes all.
        folder: gets the copy.
        report: told of the rows that have come.

    Raises:
        PipelineError: if the server cannot be reached or refuses, the table or the column is not
            there, or no row came on the day.
    """
    table = parse_postgres(path)
    driver = _driver()
    copy = folder / "000000.parquet"
    try:
        with driver.connect(_uri(table)) as connection, connection.cursor() as cursor:
            _begin(cursor)
            query = _query(cursor, table, day)
            num_rows = _stream(cursor, query, copy, report)
    except (driver.Error, OSError, pa.ArrowException) as error:  # Arrow's: between two batches
        raise _failure(table, folder, error) from None
    if num_rows == 0 and day is not None and table.arrived_at is not None:
        raise PipelineError(
            f"'{table.address}' has no row whose '{table.arrived_at}' lies on {day} (UTC).",
            "Check that the table is filled before the night begins.",
        )
    return RawFiles(table.address, "parquet", (str(copy),), {str(copy): table.address})


def _driver() -> ModuleType:
    """Return the driver, which is an extra."""
    try:
        from adbc_driver_postgresql import dbapi  # noqa: PLC0415 - an optional dependency
    except ImportError:
        raise PipelineError(
            "Reading PostgreSQL needs a driver that is not installed.",
            "Install it, the extra 'postgres': pip install adbc-driver-postgresql",
        ) from None
    module: ModuleType = dbapi
    return module


def _uri(table: PostgresTable) -> str:
    """Return the address for libpq, which takes all else from the environment."""
    options = {"client_encoding": "UTF8"}
    if "PGCONNECT_TIMEOUT" not in os.environ:
        options["connect_timeout"] = "10"
    if "PGAPPNAME" not in os.environ:
        options["application_name"] = "behavior-pipeline"
    return f"postgresql://{table.server}?{urlencode(options)}"


def _begin(cursor: Any) -> None:
    """Let all that follows see one moment, write nothing and write times in UTC."""
    cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
    cursor.execute("SET LOCAL TIME ZONE 'UTC'")


def _query(cursor: Any, table: PostgresTable, day: date | None) -> str:
    """Return SQL of the rows, each column in a type that arrives as what it is."""
    cursor.execute(_COLUMNS, (table.name.schema, table.name.table))
    types: dict[str, str] = dict(cursor.fetchall())
    if not types:
        cursor.execute(_TABLES)
        known = [name for (name,) in cursor.fetchall()]
        raise no_table(str(table.name), f"postgresql://{table.server}", known)
    values = ", ".join(
        f"{_value(quote_identifier(name), type_)} AS {quote_identifier(name)}"
        for name, type_ in types.items()
    )
    relation = f"{quote_identifier(table.name.schema)}.{quote_identifier(table.name.table)}"
    return f"SELECT {values} FROM {relation}{_condition(cursor, table, types, day)}"


def _condition(cursor: Any, table: PostgresTable, types: dict[str, str], day: date | None) -> str:
    """Return SQL that keeps the rows that came on the day.

    The bounds are bound to settings of the transaction: the driver streams no query that has
    parameters of its own.
    """
    if table.arrived_at is None:
        return ""
    type_ = types.get(table.arrived_at)
    if type_ not in _TIMES:
        raise _no_arrival(table, types)
    if day is None:
        return ""
    bounds = [f"{bound} 00:00:00+00" for bound in (day, day + timedelta(days=1))]
    cursor.execute(
        "SELECT set_config('behavior_pipeline.begin', $1, true), "
        "set_config('behavior_pipeline.end', $2, true)",
        bounds,
    )
    cursor.fetchall()
    begin, end = (
        f"current_setting('behavior_pipeline.{name}')::{type_}" for name in ("begin", "end")
    )
    column = quote_identifier(table.arrived_at)
    return f" WHERE {column} >= {begin} AND {column} < {end}"


def _value(column: str, type_: str) -> str:
    """Return SQL for a column; what has no Arrow type of its own becomes exact text."""
    if type_ in _TIMES:
        bounded = f"least(greatest({column}, '{_FIRST_TIME}'), '{_LAST_TIME}')"
        return f"CASE WHEN {column} IS NOT NULL THEN {bounded}::{type_} END"
    if type_.startswith("_"):
        return f"{column}::{type_[1:] if type_[1:] in _PLAIN_ITEMS else 'text'}[]"
    return f"{column}::{type_ if type_ in _PLAIN else _CASTS.get(type_, 'text')}"


def _stream(cursor: Any, query: str, copy: Path, report: Report) -> int:
    """Write a query's rows to Parquet, batch by batch; return how many they are."""
    cursor.adbc_statement.set_options(**{"adbc.postgresql.batch_size_hint_bytes": str(BATCH_BYTES)})
    cursor.execute(query)
    num_rows = 0
    with (
        cursor.fetch_record_batch() as batches,
        pq.ParquetWriter(copy, batches.schema) as writer,
    ):
        for batch in batches:
            writer.write_batch(batch)
            num_rows += batch.num_rows
            report(0, 1, f"fetched {num_rows:,} rows")
    return num_rows


def _no_arrival(table: PostgresTable, types: dict[str, str]) -> PipelineError:
    """Return the error for an `arrived_at` that is no column of times."""
    name = table.arrived_at or ""
    if name in types:
        return PipelineError(
            f"The column '{name}' of '{table.address}' is of type {types[name]}, which tells no "
            "day of arrival.",
            "Name a column of type timestamptz, timestamp or date in arrived_at.",
        )
    close = get_close_matches(name, list(types), n=1, cutoff=0.5)
    hint = f"Did you mean '{close[0]}'? " if close else ""
    return PipelineError(
        f"'{table.address}' has no column '{name}'.",
        f"{hint}Its columns are: {', '.join(types)}.",
    )


def _failure(table: PostgresTable, folder: Path, error: Exception) -> PipelineError:
    """Return the error for what the driver or the server complains of."""
    if is_disk_full(error):
        return no_room(table.address, folder)
    said = _SAID_BY_SERVER.search(str(error))
    reason = without_secrets(said[1]) if said else first_line(error)
    return PipelineError(
        f"'{table.address}' cannot be read: {reason}",
        "Check the path, that the server runs, and PGUSER and PGPASSWORD (or PGPASSFILE, "
        "PGSERVICE) in the environment.",
    )
