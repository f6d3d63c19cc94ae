"""The few rules for talking to DuckDB: quoted identifiers, bound values, bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb


def quote_identifier(name: str) -> str:
    """Quote a column or table name so that nothing in it is read as SQL."""
    return '"' + name.replace('"', '""') + '"'


def quote_text(text: str) -> str:
    """Quote a text constant, for the places where DuckDB takes no bound parameter (COPY, SET)."""
    return "'" + text.replace("'", "''") + "'"


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
