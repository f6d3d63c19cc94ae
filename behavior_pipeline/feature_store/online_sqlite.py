"""Writing many users to Feast's SQLite store: the rows that Feast would write, in few statements.

Feast sends one statement per feature and user. Here a statement is prepared once for a chunk of
users and SQLite runs it over their rows; all of a chunk is one transaction. The file is in SQLite's
write-ahead mode, so that whoever reads meanwhile sees a chunk as it was before or after, and waits
for nobody.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing
from datetime import UTC
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa

from behavior_pipeline.feature_store.serialization import entity_keys, online_features
from behavior_pipeline.progress import Report, report_nothing
from behavior_pipeline.sql import quote_identifier

if TYPE_CHECKING:
    from feast import FeatureStore, FeatureView

TIMEOUT_SECONDS: Final = 60.0  # waited for another writer
CACHE_KIBIBYTES: Final = 128 * 1024  # of the index, which is written in the order of the keys
COLUMNS: Final = ("entity_key", "feature_name", "value", "value_text", "event_ts", "created_ts")


def write_online(
    store: FeatureStore,
    view: FeatureView,
    batches: Iterable[pa.RecordBatch],
    total: int,
    report: Report = report_nothing,
) -> int:
    """Write users to the SQLite store behind Feast, each batch in one transaction.

    Args:
        store: opened Feast.
        view: the feature view; its table exists.
        batches: columns `user_id`, `observation_cutoff`, `written_at` and every feature; users in
            the order of their ids make the fewest changes of pages.
        total: users expected, for the report.
        report: called with the users written so far.

    Returns:
        How many users were written.
    """
    done = 0
    with closing(_connect(store)) as connection:
        statement = _statement(table_of(store, view))
        for batch in batches:
            with connection:
                connection.executemany(statement, _rows(store, view, batch))
            done += batch.num_rows
            report(done, total, view.name)
    return done


def delete_online(store: FeatureStore, view: FeatureView, user_ids: pa.Array) -> int:
    """Remove users' rows of a view in one transaction; return how many users were there.

    What is removed is overwritten with zeros, and the write-ahead file is emptied unless somebody
    is reading just then: erasing must leave nothing behind in the file.
    """
    version = store.config.entity_key_serialization_version
    keys = entity_keys(user_ids, view.join_keys[0], version)
    table = quote_identifier(table_of(store, view))
    there = f"SELECT entity_key FROM {table} WHERE entity_key = erased.key"
    with closing(_connect(store)) as connection:
        connection.execute("PRAGMA secure_delete = ON")
        connection.execute("PRAGMA temp_store = MEMORY")
        connection.execute("CREATE TEMP TABLE erased (key BLOB PRIMARY KEY) WITHOUT ROWID")
        with connection:
            connection.executemany("INSERT OR IGNORE INTO erased VALUES (?)", zip(keys))
            query = f"SELECT count(*) FROM erased WHERE EXISTS ({there})"
            ((found,),) = connection.execute(query).fetchall()
            connection.execute(f"DELETE FROM {table} WHERE entity_key IN (SELECT key FROM erased)")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return int(found)


def table_of(store: FeatureStore, view: FeatureView) -> str:
    """Return the name of a view's table."""
    from feast.infra.online_stores.helpers import compute_table_id  # noqa: PLC0415 - takes seconds

    is_versioned = store.config.registry.enable_online_feature_view_versioning
    name: str = compute_table_id(store.project, view, is_versioned)
    return name


def _connect(store: FeatureStore) -> sqlite3.Connection:
    """Open the store's file for writing."""
    connection = sqlite3.connect(store.config.online_store.path, timeout=TIMEOUT_SECONDS)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute(f"PRAGMA cache_size = -{CACHE_KIBIBYTES}")
    return connection


def _statement(table: str) -> str:
    """Return the statement that inserts or replaces one feature of one user."""
    names, places = ", ".join(COLUMNS), ", ".join("?" * len(COLUMNS))
    changed = ", ".join(f"{name} = excluded.{name}" for name in COLUMNS[2:])
    return (
        f"INSERT INTO {quote_identifier(table)} ({names}) VALUES ({places}) "
        f"ON CONFLICT (entity_key, feature_name) DO UPDATE SET {changed}"
    )


def _rows(
    store: FeatureStore, view: FeatureView, batch: pa.RecordBatch
) -> Iterator[tuple[Any, ...]]:
    """Yield the table's rows of a batch, each user's together: they lie together in the index."""
    version = store.config.entity_key_serialization_version
    keys = entity_keys(batch.column("user_id"), view.join_keys[0], version)
    valid_from = _seconds(batch.column("observation_cutoff"))
    written = _seconds(batch.column("written_at"))
    by_feature = [
        zip(keys, repeat(name), values, texts, valid_from, written, strict=False)
        for name, values, texts in online_features(batch, view)
    ]
    return chain.from_iterable(zip(*by_feature, strict=True))


def _seconds(times: pa.Array) -> list[int]:
    """Return times in whole seconds, as Feast's SQLite store keeps them.

    It takes the time in UTC, forgets the zone, and counts the seconds as if the clock were local;
    reading, it does the reverse. So must we, for the same time to come back in every zone.
    """
    coded = times.dictionary_encode()
    naive = [time.astimezone(UTC).replace(tzinfo=None) for time in coded.dictionary.to_pylist()]
    known = [int(time.timestamp()) for time in naive]
    return [known[at] for at in coded.indices.to_pylist()]
