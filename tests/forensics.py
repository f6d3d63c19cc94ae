"""What a forensic reader finds below a home: names in every byte, decoded and as they lie."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq


def places_with(home: Path, names: Iterable[str]) -> list[str]:
    """Return the files below a home in which one of the names stands, and how it was found."""
    wanted = [name.encode() for name in names]
    files = sorted(path for path in home.rglob("*") if path.is_file())
    # All bytes first: opening a database may clear away the log of whoever was killed.
    raw = [path for path in files if _has(path.read_bytes(), wanted)]
    decoded = [path for path in files if path.exists() and _has(_decoded(path), wanted)]
    return [f"{path.relative_to(home)}: bytes" for path in raw] + [
        f"{path.relative_to(home)}: content" for path in decoded
    ]


def _has(content: bytes, wanted: list[bytes]) -> bool:
    return any(name in content for name in wanted)


def _decoded(path: Path) -> bytes:
    """Return the content of a file that compresses it, as text."""
    if path.suffix == ".parquet":
        return repr(pq.ParquetFile(path).read().to_pydict()).encode()
    if path.suffix == ".duckdb":
        return repr(tables_of(path)).encode()
    if path.suffix == ".db" and path.read_bytes()[:6] == b"SQLite":
        with closing(sqlite3.connect(path)) as connection:
            return "\n".join(connection.iterdump()).encode()
    return b""


def tables_of(database: Path) -> dict[str, list[tuple[Any, ...]]]:
    """Return the rows of every table of a DuckDB file."""
    with duckdb.connect(str(database), read_only=True) as connection:
        names = connection.execute(
            "SELECT schema_name || '.' || table_name FROM duckdb_tables() ORDER BY 1"
        ).fetchall()
        return {name: connection.execute(f"FROM {name}").fetchall() for (name,) in names}


def rows_without(home: Path, names: frozenset[str]) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of every Parquet file of users, but for those of some users."""
    found = {}
    for path in sorted(home.rglob("*.parquet")):
        table = pq.ParquetFile(path).read()
        if "user_id" in table.column_names:
            rows = [row for row in table.to_pylist() if row["user_id"] not in names]
            found[str(path.relative_to(home))] = rows
    return found
