"""Writing many users to Feast's Redis store: the commands that Feast would send, without a read.

Feast keeps all views of a user in one hash: the key is the user's entity key and the project; a
field is the murmur hash of `view:feature`, and `_ts:view` holds the event time. Feast's client
packs each argument of each command; here the parts of a command that repeat are packed once (RESP,
the protocol that Redis specifies), and a batch of users is one send.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa

from behavior_pipeline.errors import PipelineError
from behavior_pipeline.feature_store.configuration import speaking_to_server
from behavior_pipeline.feature_store.in_parallel import in_parallel
from behavior_pipeline.feature_store.serialization import entity_keys, online_features
from behavior_pipeline.progress import Report, report_nothing

if TYPE_CHECKING:
    from feast import FeatureStore, FeatureView

NUM_THREADS: Final = 2  # one makes commands while the other waits for the server, which has one
DELETED_USERS: Final = 8_192  # of one send


def write_online(
    store: FeatureStore,
    view: FeatureView,
    batches: Iterable[pa.RecordBatch],
    total: int,
    report: Report = report_nothing,
) -> int:
    """Write users to the Redis store behind Feast; see `online.write_online`.

    A user's command is one change: readers see all of the old values or all of the new ones.
    """

    def write(batch: pa.RecordBatch) -> int:
        commands = _hsets(store, view, batch)
        num_replies = batch.num_rows * (2 if store.config.online_store.key_ttl_seconds else 1)
        _send(client, commands, num_replies)
        return int(batch.num_rows)

    done = 0
    with _client(store) as client:
        for written in in_parallel(write, batches, NUM_THREADS):
            done += written
            report(done, total, view.name)
    return done


def delete_online(store: FeatureStore, view: FeatureView, user_ids: pa.Array) -> int:
    """Remove users' fields of a view; Redis removes a hash with its last field."""
    fields = b"".join([_text(_time_field(store, view)), *_fields(store, view)])
    head = b"*%d\r\n" % (3 + len(view.features)) + _text(b"HDEL")
    found, user_ids = 0, user_ids.unique()
    with _client(store) as client:
        for start in range(0, len(user_ids), DELETED_USERS):
            keys = _keys(store, view, user_ids.slice(start, DELETED_USERS))
            commands = b"".join([head + _text(key) + fields for key in keys])
            found += sum(removed > 0 for removed in _send(client, commands, len(keys)))
    return found


@contextmanager
def _client(store: FeatureStore) -> Iterator[Any]:
    """Yield Feast's client of the server.

    Raises:
        PipelineError: if the server cannot be reached, refuses, or is a cluster.
    """
    configuration = store.config.online_store
    if configuration.redis_type == "redis_cluster":
        raise PipelineError("Users cannot be written to a Redis cluster.", "Use one Redis server.")
    with speaking_to_server():
        from feast.infra.online_stores.redis import RedisOnlineStore  # noqa: PLC0415 - seconds

        with RedisOnlineStore()._get_client(configuration) as client:  # noqa: SLF001 - no other way
            yield client


def _send(client: Any, commands: bytes, num_replies: int) -> list[Any]:
    """Send packed commands over a connection of its own, and return the replies.

    Raises:
        RedisError: if the server refuses one of them; those before it are done.
    """
    connection = client.connection_pool.get_connection()
    try:
        connection.send_packed_command([commands])
        return [connection.read_response() for _ in range(num_replies)]
    except BaseException:
        connection.disconnect()  # replies that nobody read must not answer the next command
        raise
    finally:
        client.connection_pool.release(connection)


def _hsets(store: FeatureStore, view: FeatureView, batch: pa.RecordBatch) -> bytes:
    """Return the packed commands that set all features of the users of a batch."""
    keys = _keys(store, view, batch.column("user_id"))
    head = b"*%d\r\n" % (4 + 2 * len(view.features)) + _text(b"HSET")
    starts = [head + _text(key) for key in keys]
    columns = [starts, _times(store, view, batch.column("observation_cutoff"))]
    for field, feature in zip(_fields(store, view), online_features(batch, view), strict=True):
        columns.append(_pieces(field, feature.values))
    if seconds := store.config.online_store.key_ttl_seconds:
        columns.append(_expires(keys, seconds))
    return b"".join([piece for user in zip(*columns, strict=True) for piece in user])


def _keys(store: FeatureStore, view: FeatureView, user_ids: pa.Array) -> list[bytes]:
    """Return the keys of users' hashes."""
    version = store.config.entity_key_serialization_version
    project = store.project.encode()
    return [key + project for key in entity_keys(user_ids, view.join_keys[0], version)]


def _fields(store: FeatureStore, view: FeatureView) -> list[bytes]:
    """Return the packed names of a view's fields, in the order of its features."""
    from feast.infra.online_stores.helpers import _mmh3  # noqa: PLC0415 - takes seconds

    return [_text(_mmh3(f"{_name(store, view)}:{feature.name}")) for feature in view.features]


def _time_field(store: FeatureStore, view: FeatureView) -> bytes:
    """Return the name of the field that holds a view's event time."""
    return f"_ts:{_name(store, view)}".encode()


def _name(store: FeatureStore, view: FeatureView) -> str:
    """Return a view's name with its version, as Feast writes it online."""
    from feast.infra.online_stores.helpers import compute_versioned_name  # noqa: PLC0415 - as above

    is_versioned = store.config.registry.enable_online_feature_view_versioning
    name: str = compute_versioned_name(view, is_versioned)
    return name


def _times(store: FeatureStore, view: FeatureView, times: pa.Array) -> list[bytes]:
    """Return the packed field and value of each user's event time."""
    from google.protobuf.timestamp_pb2 import (  # type: ignore[import-untyped]  # noqa: PLC0415 - comes with feast
        Timestamp,
    )

    coded = times.dictionary_encode()
    known = []
    for time in coded.dictionary.to_pylist():
        stamp = Timestamp()
        stamp.FromDatetime(time.astimezone(UTC))
        known.append(_text(_time_field(store, view)) + _text(stamp.SerializeToString()))
    return [known[at] for at in coded.indices.to_pylist()]


def _pieces(field: bytes, values: Sequence[bytes]) -> list[bytes]:
    """Return a packed field with each value."""
    return [b"%b$%d\r\n%b\r\n" % (field, len(value), value) for value in values]


def _expires(keys: Sequence[bytes], seconds: int) -> list[bytes]:
    """Return the packed commands that let the users' hashes expire."""
    head, tail = b"*3\r\n" + _text(b"EXPIRE"), _text(b"%d" % seconds)
    return [head + _text(key) + tail for key in keys]


def _text(argument: bytes) -> bytes:
    """Return a packed argument of a command (RESP's bulk string)."""
    return b"$%d\r\n%b\r\n" % (len(argument), argument)
