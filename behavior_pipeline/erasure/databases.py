"""Databases without some users, and without what deleted rows leave behind in a file."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import duckdb
import pyarrow as pa

from behavior_pipeline.feature_store.exclusive import exclusive
from behavior_pipeline.feature_store.online import delete_online
from behavior_pipeline.feature_store.repository import open_store, view_of
from behavior_pipeline.feature_store.versions import VERSIONED, read_versions
from behavior_pipeline.sql import fetch_one, quote_identifier, quote_text
from behavior_pipeline.storage import Storage, writing_file

_BATCH_USERS = 8_192


def erase_from_warehouse(storage: Storage) -> int:
    """Remove the warehouse; the next night builds it anew from the events that are left.

    Its sums over users, such as events a day, hold what erased users added: taking that out is a
    build from nothing, and a file that is gone leaves no page behind.

    Returns:
        How many files went.
    """
    found = [storage.warehouse, storage.warehouse.with_name(f"{storage.warehouse.name}.wal")]
    there = [path for path in found if path.exists()]
    for path in there:
        path.unlink()
    shutil.rmtree(storage.replaced_analytics, ignore_errors=True)
    return len(there)


def erase_from_analytics(storage: Storage, users: pa.Array) -> int:
    """Replace what analysts open by a copy without the users; return how many rows went.

    The rows are copied into a new file: a database keeps what was deleted in pages that are free.
    """
    if not storage.analytics.exists():
        return 0
    with duckdb.connect(str(storage.analytics), read_only=True) as connection:
        tables = _tables_of_users(connection)
        connection.register("erased", pa.table({"user_id": users}))
        counts = [
            int(
                fetch_one(
                    connection,
                    f"SELECT count(*) FROM {quote_identifier(table)} SEMI JOIN erased "
                    "USING (user_id)",
                )[0]
            )
            for table in tables
        ]
    if sum(counts):
        with writing_file(storage.analytics) as target:
            _copy_without(storage.analytics, target, users)
    return sum(counts)


def _tables_of_users(connection: duckdb.DuckDBPyConnection) -> list[str]:
    """Return the tables with a row per user, or more."""
    rows = connection.execute(
        "SELECT table_name FROM duckdb_tables() JOIN duckdb_columns() "
        "USING (database_name, schema_name, table_name) "
        "WHERE column_name = 'user_id' AND NOT duckdb_tables.internal ORDER BY table_name"
    ).fetchall()
    return [name for (name,) in rows]


def _copy_without(source: Path, target: Path, users: pa.Array) -> None:
    """Copy a database into a new file: all of it, then without the users, then what is left."""
    between = target.with_name(f"{target.name}.between")
    try:
        shutil.copyfile(source, between)
        with duckdb.connect(str(between)) as connection:
            connection.register("erased", pa.table({"user_id": users}))
            for table in _tables_of_users(connection):
                connection.execute(
                    f"DELETE FROM {quote_identifier(table)} "
                    "WHERE user_id IN (SELECT user_id FROM erased)"
                )
        with duckdb.connect() as connection:
            connection.execute(f"ATTACH {quote_text(str(between))} AS kept (READ_ONLY)")
            connection.execute(f"ATTACH {quote_text(str(target))} AS fresh")
            connection.execute("COPY FROM DATABASE kept TO fresh")
            _copy_comments(connection)
            connection.execute("DETACH fresh")
    finally:
        between.unlink(missing_ok=True)


def _copy_comments(connection: duckdb.DuckDBPyConnection) -> None:
    """Say of tables and columns what was said of them: a copied database may not."""
    tables = connection.execute(
        "SELECT table_name, comment FROM duckdb_tables() "
        "WHERE database_name = 'kept' AND comment IS NOT NULL"
    ).fetchall()
    columns = connection.execute(
        "SELECT c.table_name, c.column_name, c.comment FROM duckdb_columns() AS c "
        "JOIN duckdb_tables() AS t ON c.database_name = t.database_name "
        "AND c.table_name = t.table_name "
        "WHERE c.database_name = 'kept' AND c.comment IS NOT NULL"
    ).fetchall()
    for table, comment in tables:
        name = f"fresh.main.{quote_identifier(table)}"
        connection.execute(f"COMMENT ON TABLE {name} IS {quote_text(comment)}")
    for table, column, comment in columns:
        name = f"fresh.main.{quote_identifier(table)}.{quote_identifier(column)}"
        connection.execute(f"COMMENT ON COLUMN {name} IS {quote_text(comment)}")


def erase_from_online(storage: Storage, users: pa.Array) -> int:
    """Remove users from every view of every version online; return how many rows went."""
    if not (storage.feature_store / "registry.db").exists():
        return 0
    store = open_store(storage)
    removed = 0
    with exclusive(storage):
        for view in store.list_feature_views():
            numbers = sorted(read_versions(storage).known) if view.name in VERSIONED else [1]
            for number in numbers:
                defined = view_of(store, view.name, number)
                for start in range(0, len(users), _BATCH_USERS):
                    batch = users.slice(start, _BATCH_USERS)
                    removed += delete_online(store, defined, batch)
    if store.config.online_store.type == "sqlite":
        _compact(Path(store.config.online_store.path))
    return removed


def _compact(path: Path) -> None:
    """Write a SQLite file anew, so that no free page keeps what was deleted."""
    with closing(sqlite3.connect(path, timeout=60)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.execute("VACUUM")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
