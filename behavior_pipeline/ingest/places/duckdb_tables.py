"""Tables and views of a DuckDB file, copied to Parquet so that its writer waits no longer.

DuckDB has one writer: a reader holds the file for as long as it has it open. So it is opened to
read only, and only for the copying.
"""

from __future__ import annotations

import glob
import re
import time
from dataclasses import dataclass
from datetime import date
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

import duckdb

from behavior_pipeline.errors import PipelineError
from behavior_pipeline.ingest.files import RawFiles, put_day
from behavior_pipeline.ingest.places.addresses import (
    DUCKDB_FILE,
    TableName,
    first_line,
    no_table,
    parse_table,
)
from behavior_pipeline.progress import Report
from behavior_pipeline.settings import Settings
from behavior_pipeline.sql import open_engine, quote_identifier, quote_text

PATIENCE_SECONDS: Final = 30.0
"""How long a load waits for a writer to let go of the file."""
_POLL_SECONDS: Final = 0.5
_IS_LOCKED: Final = "Could not set lock"
_WAY_OUT: Final = "Write file.duckdb::table or file.duckdb::schema.table."
# Parquet has no such type, or one of less precision: their text is exact.
_INEXACT: Final = re.compile(r"\b(U?HUGEINT|INTERVAL|UNION|TIME WITH TIME ZONE)\b")


@dataclass(frozen=True)
class DuckDBTable:
    """A table in a file; both may hold wildcards, which stand for any day."""

    file: str
    name: TableName


def parse_duckdb(path: str) -> DuckDBTable:
    """Return the file and the table that a path names.

    Raises:
        PipelineError: if there is no table in it.
    """
    found = DUCKDB_FILE.fullmatch(path)
    name = parse_table(found["table"] or "", "main") if found else None
    if found is None or name is None:
        raise PipelineError(f"'{path}' names no table of the DuckDB file.", _WAY_OUT)
    return DuckDBTable(found["file"], name)


def fetch_duckdb(
    path: str, day: date | None, folder: Path, settings: Settings, report: Report
) -> RawFiles:
    """Copy a table or view to Parquet, as DuckDB streams it.

    Args:
        path: `file.duckdb::schema.table`; `{date}` in it stands for the day.
        day: the night's day, or None for all.
        folder: gets the copies.
        settings: memory and threads.
        report: told of each table.

    Raises:
        PipelineError: if the file or the table is missing, held by a writer or not readable.
    """
    pattern = put_day(path, day)
    wanted = parse_duckdb(pattern)
    is_there = Path(wanted.file).exists()
    files = [wanted.file] if is_there else sorted(glob.glob(wanted.file))  # noqa: PTH207 - as files.py
    if not files:
        raise PipelineError(f"There is no DuckDB file '{wanted.file}'.", _WAY_OUT)
    names: dict[str, str] = {}
    for number, file in enumerate(files):
        report(number, len(files), f"copying {file}")
        names |= _copy_tables(file, wanted.name, folder, len(names), settings)
    return RawFiles(pattern, "parquet", tuple(names), names)


def _copy_tables(
    file: str, wanted: TableName, folder: Path, first: int, settings: Settings
) -> dict[str, str]:
    """Copy the tables of one file that are wanted; return their names by copy."""
    names = {}
    with open_engine(settings.memory_limit, settings.threads, folder / "spill") as connection:
        connection.execute("SET autoinstall_known_extensions = false")
        connection.execute("SET preserve_insertion_order = true")  # rows are numbered
        try:
            _attach(connection, file)
            for number, table in enumerate(_find_tables(connection, file, wanted), first):
                copy = folder / f"{number:06}.parquet"
                _copy_table(connection, table, copy)
                names[str(copy)] = f"{file}::{table}"
        except duckdb.OutOfMemoryException:
            raise  # a matter of memory_limit, not of the file
        except duckdb.Error as error:
            raise PipelineError(
                f"'{file}' cannot be read: {first_line(error)}",
                "Check that it is a DuckDB file and that this version of DuckDB reads it.",
            ) from None
    return names


def _attach(connection: duckdb.DuckDBPyConnection, file: str) -> None:
    """Open a file to read only, when its writer lets go of it."""
    # the whole path and the type: nothing in a name chooses another engine
    place = quote_text(str(Path(file).resolve()))
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            connection.execute(f"ATTACH {place} AS source (TYPE duckdb, READ_ONLY)")
            break
        except duckdb.IOException as error:
            if _IS_LOCKED not in str(error):
                raise
            if time.monotonic() >= end:
                raise PipelineError(
                    f"'{file}' is held by another program that has it open for writing.",
                    "Load when that program has closed it.",
                ) from None
        time.sleep(_POLL_SECONDS)
    connection.execute("USE source")  # what a view leaves unsaid lies beside it


def _find_tables(
    connection: duckdb.DuckDBPyConnection, file: str, wanted: TableName
) -> list[TableName]:
    """Return the tables and views that a name stands for; DuckDB's names have no case."""
    rows = connection.execute(
        "SELECT schema_name, table_name FROM duckdb_tables() WHERE database_name = 'source' "
        "UNION ALL SELECT schema_name, view_name FROM duckdb_views() "
        "WHERE database_name = 'source' AND NOT internal ORDER BY ALL"
    ).fetchall()
    tables = [TableName(schema, table) for schema, table in rows]
    exact = [table for table in tables if str(table).lower() == str(wanted).lower()]
    found = exact or [
        table
        for table in tables
        if table.schema.lower() == wanted.schema.lower()
        and fnmatchcase(table.table.lower(), wanted.table.lower())
    ]
    if not found:
        raise no_table(str(wanted), file, [str(table) for table in tables])
    return found


def _copy_table(connection: duckdb.DuckDBPyConnection, table: TableName, copy: Path) -> None:
    """Write a table to Parquet, inexact types as text."""
    relation = f"source.{quote_identifier(table.schema)}.{quote_identifier(table.table)}"
    described = connection.execute(f"DESCRIBE SELECT * FROM {relation}").fetchall()
    columns = ", ".join(_as_exact(name, type_) for name, type_, *_ in described)
    connection.execute(
        f"COPY (SELECT {columns} FROM {relation}) TO {quote_text(str(copy))} (FORMAT parquet)"
    )


def _as_exact(name: str, type_: str) -> str:
    """Return SQL for a column that Parquet holds exactly."""
    quoted = quote_identifier(name)
    return f"{quoted}::VARCHAR AS {quoted}" if _INEXACT.search(type_) else quoted
