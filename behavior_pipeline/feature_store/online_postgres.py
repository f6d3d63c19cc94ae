"""Writing many users to Feast's PostgreSQL store: the rows that Feast would write, copied in.

Feast sends one INSERT per feature and user. Here a batch of users is one binary COPY: straight into
the view's table while that is empty, and otherwise into a temporary table, from which one INSERT
takes them. Each batch is a transaction.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa

from behavior_pipeline.feature_store.configuration import speaking_to_server
from behavior_pipeline.feature_store.in_parallel import in_parallel
from behavior_pipeline.feature_store.online_sqlite import table_of
from behavior_pipeline.feature_store.serialization import (
    OnlineFeature,
    entity_keys,
    online_features,
)
from behavior_pipeline.progress import Report, report_nothing
from behavior_pipeline.sql import quote_identifier

if TYPE_CHECKING:
    from feast import FeatureStore, FeatureView

NUM_CONNECTIONS: Final = 2  # one copies while rows for the other are made
COPIED: Final = ("entity_key", "event_ts", "created_ts", "feature_name", "value", "value_text")
CHANGED: Final = ("value", "value_text", "vector_value", "event_ts", "created_ts")
EPOCH: Final = datetime(2000, 1, 1, tzinfo=UTC)  # of PostgreSQL's binary times
COPY_HEADER: Final = b"PGCOPY\n\xff\r\n\0" + bytes(8)
COPY_TRAILER: Final = struct.pack(">h", -1)
NULL: Final = struct.pack(">i", -1)


def write_online(
    store: FeatureStore,
    view: FeatureView,
    batches: Iterable[pa.RecordBatch],
    total: int,
    report: Report = report_nothing,
) -> int:
    """Write users to the PostgreSQL store behind Feast; see `online.write_online`."""
    table, done = quote_identifier(table_of(store, view)), 0
    with _connections(store) as connections:
        is_empty = _is_empty(connections, table)

        def write(batch: pa.RecordBatch) -> int:
            connection = connections.get()
            try:
                _write(connection, table, store, view, batch, is_empty=is_empty)
            finally:
                connections.put(connection)
            return int(batch.num_rows)

        for written in in_parallel(write, batches, NUM_CONNECTIONS):
            done += written
            report(done, total, view.name)
    return done


def delete_online(store: FeatureStore, view: FeatureView, user_ids: pa.Array) -> int:
    """Remove users' rows of a view in one transaction."""
    version = store.config.entity_key_serialization_version
    keys = entity_keys(user_ids, view.join_keys[0], version)
    statement = (
        f"WITH gone AS (DELETE FROM {quote_identifier(table_of(store, view))} "
        "WHERE entity_key = ANY(%s) RETURNING entity_key) "
        "SELECT count(DISTINCT entity_key) FROM gone"
    )
    with _connections(store) as connections:
        connection = connections.get()
        with connection.transaction():
            ((found,),) = connection.execute(statement, [keys]).fetchall()
    return int(found)


@contextmanager
def _connections(store: FeatureStore) -> Iterator[SimpleQueue[Any]]:
    """Yield connections to the server, set up as Feast's.

    Raises:
        PipelineError: if the server cannot be reached or refuses.
    """
    opened, free = list[Any](), SimpleQueue[Any]()
    try:
        with speaking_to_server():
            from feast.infra.utils.postgres import connection_utils  # noqa: PLC0415 - optional

            for _ in range(NUM_CONNECTIONS):
                opened.append(connection_utils._get_conn(store.config.online_store))  # noqa: SLF001
                free.put(opened[-1])
            yield free
    finally:
        for connection in opened:
            connection.close()


def _is_empty(connections: SimpleQueue[Any], table: str) -> bool:
    """Say whether a table has no row."""
    connection = connections.get()
    try:
        with connection.transaction():
            return not connection.execute(f"SELECT 1 FROM {table} LIMIT 1").fetchall()
    finally:
        connections.put(connection)


def _write(
    connection: Any,
    table: str,
    store: FeatureStore,
    view: FeatureView,
    batch: pa.RecordBatch,
    *,
    is_empty: bool,
) -> None:
    """Write a batch in one transaction, into a table that had no row when writing began, or not."""
    starts = _row_starts(connection, store, view, batch, has_zone=is_empty)
    content = _copied(starts, online_features(batch, view))
    with connection.transaction():
        if is_empty:
            _copy(connection, table, content)
        else:
            connection.execute(
                "CREATE TEMPORARY TABLE incoming (entity_key bytea, event_ts timestamp, "
                "created_ts timestamp, feature_name text, value bytea, value_text text) "
                "ON COMMIT DROP"
            )
            _copy(connection, "incoming", content)
            connection.execute(_insert(table))


def _copy(connection: Any, table: str, content: bytes) -> None:
    """Copy rows into a table."""
    columns = ", ".join(COPIED)
    with connection.cursor() as cursor:
        statement = f"COPY {table} ({columns}) FROM STDIN (FORMAT BINARY)"
        with cursor.copy(statement) as copy:
            copy.write(content)


def _insert(table: str) -> str:
    """Return the statement that inserts what came, or replaces what was there."""
    columns = ", ".join(COPIED)
    changed = ", ".join(f"{name} = excluded.{name}" for name in CHANGED)
    return (
        f"INSERT INTO {table} ({columns}) SELECT {columns} FROM incoming "
        f"ON CONFLICT (entity_key, feature_name) DO UPDATE SET {changed}"
    )


def _row_starts(
    connection: Any,
    store: FeatureStore,
    view: FeatureView,
    batch: pa.RecordBatch,
    *,
    has_zone: bool,
) -> list[bytes]:
    """Return what each of a user's rows begins with: their number of columns, key and times."""
    version = store.config.entity_key_serialization_version
    keys = entity_keys(batch.column("user_id"), view.join_keys[0], version)
    valid_from = _times(connection, batch.column("observation_cutoff"), has_zone=has_zone)
    written = _times(connection, batch.column("written_at"), has_zone=has_zone)
    head = struct.pack(">h", len(COPIED))
    return [
        head + _field(key) + valid + wrote
        for key, valid, wrote in zip(keys, valid_from, written, strict=True)
    ]


def _times(connection: Any, times: pa.Array, *, has_zone: bool) -> list[bytes]:
    """Return times as fields of a binary copy.

    Feast takes the time in UTC, forgets the zone, and PostgreSQL reads it as of the session's zone.
    A column with a zone needs the same; where it has none, PostgreSQL will do it later.
    """
    coded = times.dictionary_encode()
    known = [time.astimezone(UTC) for time in coded.dictionary.to_pylist()]
    if has_zone:
        naive = [time.replace(tzinfo=None) for time in known]
        query = "SELECT %s::timestamp[]::timestamptz[]"
        with connection.transaction():
            ((known,),) = connection.execute(query, [naive]).fetchall()
    microsecond = timedelta(microseconds=1)
    fields = [_field(struct.pack(">q", (time - EPOCH) // microsecond)) for time in known]
    return [fields[at] for at in coded.indices.to_pylist()]


def _copied(starts: Sequence[bytes], features: Sequence[OnlineFeature]) -> bytes:
    """Return a whole binary copy of users' rows, each user's together."""
    columns: list[Sequence[bytes]] = []
    for feature in features:
        columns += [starts, _values(feature)]
    rows = [piece for user in zip(*columns, strict=True) for piece in user]
    return b"".join([COPY_HEADER, *rows, COPY_TRAILER])


def _values(feature: OnlineFeature) -> list[bytes]:
    """Return what the rows of a feature end with: its name, value and text."""
    name = _field(feature.name.encode())
    return [
        name + _field(value) + (NULL if text is None else _field(text.encode()))
        for value, text in zip(feature.values, feature.texts, strict=True)
    ]


def _field(value: bytes) -> bytes:
    """Return a value as a field of a binary copy."""
    return struct.pack(">i", len(value)) + value
