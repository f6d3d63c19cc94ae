"""The few rules for talking to DuckDB: quoted identifiers, bound values, bounded memory."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb


def quote_identifier(name: str) -> str:
    """Quote a column or table name so that nothing in it is read as SQL."""
    return '"' + name.replace('"', '""') + '"'


def quote_text(text: str) -> str:
    """Quote a text constant, for the places where DuckDB takes no bound parameter (COPY, SET)."""
    return "'" + text.replace("'", "''") + "'"


def user_bucket(user_id: str, num_buckets: int) -> str:
    """Return SQL for a user's bucket: the first 32 bits of the MD5 of the id, modulo the number.

    Every engine and every release puts a user into the same bucket.
    """
    digits = f"cast('0x' || substr(md5({user_id}), 1, 8) AS BIGINT)"
    return f"cast({digits} % {int(num_buckets)} AS INTEGER)"


def utc_date(column: str) -> str:
    """Return SQL for the UTC day of a timestamp with time zone, whatever the session's zone."""
    return f"cast(make_timestamp(epoch_us({column})) AS DATE)"


def fetch_one(
    connection: duckdb.DuckDBPyConnection, query: str, values: Sequence[object] = ()
) -> tuple[Any, ...]:
    """Return the one row that a query answers."""
    (row,) = connection.execute(query, list(values)).fetchall()
    return tuple(row)


def parquet(files: Iterable[Path], *, with_folders: bool = False) -> str:
    """Return the SQL call that reads some Parquet files, and nothing but them.

    Args:
        files: at least one.
        with_folders: whether folders named `key=value` become text columns; where they do not, a
            home whose own path has such a name reads the same.
    """
    folders = "true, hive_types_autocast = false" if with_folders else "false"
    return f"read_parquet({file_list(files)}, hive_partitioning = {folders})"


def file_list(paths: Iterable[Path]) -> str:
    """Return a SQL list of paths as they are; glob characters in a name stay characters."""
    names = (re.sub(r"([*?\[])", r"[\1]", str(path)) for path in paths)
    return "[" + ", ".join(quote_text(name) for name in names) + "]"


@contextmanager
def open_engine(
    memory_limit: str, threads: int, spill_folder: Path, database: Path | None = None
) -> Iterator[duckdb.DuckDBPyConnection]:
    """Yield a DuckDB connection in UTC that spills to `spill_folder` above `memory_limit`.

    Args:
        memory_limit: as DuckDB writes it, such as "4GB".
        threads: number of threads.
        spill_folder: made when missing.
        database: file to open; in memory when absent.
    """
    spill_folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    connection = duckdb.connect(str(database) if database else ":memory:")
    try:
        connection.execute(f"SET memory_limit = {quote_text(memory_limit)}")
        connection.execute(f"SET threads = {int(threads)}")
        connection.execute(f"SET temp_directory = {quote_text(str(spill_folder))}")
        connection.execute("SET TimeZone = 'UTC'")
        connection.execute("SET preserve_insertion_order = false")
        yield connection
    finally:
        connection.close()


@contextmanager
def transaction(connection: duckdb.DuckDBPyConnection) -> Iterator[None]:
    """Do all that is done inside, or nothing of it."""
    connection.execute("BEGIN")
    try:
        yield
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")
