"""Writing many users to Feast's SQLite store: the rows that Feast would write, in few statements.

Feast sends one statement per feature and user. Here one statement takes all features of some users,
prepared once, and all of a batch is one transaction. The file is in SQLite's write-ahead mode, so
that whoever reads meanwhile sees a batch as it was before or after, and waits for nobody.

Three threads share the work, for SQLite lets go of Python while it runs: one makes the next batch's
values, one writes, one moves what was written from the write-ahead file to where it belongs. A
night's few changes stay in the write-ahead file, brought safely to the disk, until it is large:
moving them costs more than writing them, and a page that changes every night is moved once.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from datetime import UTC
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa

from behavior_pipeline.feature_store.in_parallel import ahead
from behavior_pipeline.feature_store.serialization import entity_keys, online_features
from behavior_pipeline.progress import Report, report_nothing
from behavior_pipeline.sql import quote_identifier, quote_text
from behavior_pipeline.storage import PRIVATE_FILE

if TYPE_CHECKING:
    from feast import FeatureStore, FeatureView

TIMEOUT_SECONDS: Final = 60.0  # waited for another writer
LAST_WAIT_MILLISECONDS: Final = 5_000  # waited for readers before the write-ahead file is emptied
CACHE_KIBIBYTES: Final = 128 * 1024  # of the index, which is written in the order of the keys
BATCHES_BETWEEN_RESETS: Final = 16  # after so many, the write-ahead file begins anew
MAX_LEFT_BYTES: Final = 512 * 1024 * 1024  # of the write-ahead file that may stay
FEW_USERS: Final = 50_000  # as a night changes; their pages may stay in the write-ahead file
MAX_USERS: Final = 64  # of one statement
MAX_PARAMETERS: Final = 32_000  # of one statement: SQLite takes 32,766
SMALL_PAGE: Final = 8 * 1024  # bytes: a night copies a page for every user
LARGE_PAGE: Final = 16 * 1024  # for vectors that would fill a small page each
LONG_VECTOR: Final = 512  # floats, and longer
_VECTOR: Final = pa.FixedSizeListType
COLUMNS: Final = ("entity_key", "feature_name", "value", "value_text", "event_ts", "created_ts")


def make_file(path: Path) -> None:
    """Make the store's file, private and in write-ahead mode, unless it is there.

    Feast makes its tables.
    """
    if not path.exists():
        path.touch(PRIVATE_FILE)  # and so are the files that SQLite puts beside it
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")


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
    table, names, done = table_of(store, view), [field.name for field in view.features], 0
    first, batches = _peek(batches)
    _fit_pages(store, table, first)
    prepared = (_values(store, view, batch) for batch in batches)
    with (
        closing(_reader(store)),
        closing(_connect(store)) as connection,
        ThreadPoolExecutor(1) as pool,
    ):
        mover = _Mover(store, pool, is_eager=total > FEW_USERS)
        for values in ahead(prepared):
            mover.before_batch()
            with connection:
                _insert(connection, table, names, values)
            done += len(values) // _num_parameters(names)
            mover.after_batch()
            report(done, total, view.name)
        mover.finish()
        _settle(store, connection)
    return done


def _peek(batches: Iterable[pa.RecordBatch]) -> tuple[pa.Schema, Iterable[pa.RecordBatch]]:
    """Return the columns of batches, and all of the batches."""
    rest = iter(batches)
    first = list(islice(rest, 1))
    return first[0].schema if first else pa.schema([]), chain(first, rest)


def _fit_pages(store: FeatureStore, table: str, columns: pa.Schema) -> None:
    """Before a view's first rows are written, give the file pages of the size that suits them.

    All that the file holds is rewritten then. Where somebody has it open, it stays as it is: any
    size works.
    """
    lengths = [field.type.list_size for field in columns if isinstance(field.type, _VECTOR)]
    wanted = LARGE_PAGE if max(lengths, default=0) >= LONG_VECTOR else SMALL_PAGE
    with closing(_connect(store)) as connection:
        ((now,),) = connection.execute("PRAGMA page_size").fetchall()
        is_new = not connection.execute(
            f"SELECT 1 FROM {quote_identifier(table)} LIMIT 1"
        ).fetchall()
        if not lengths or now == wanted or not is_new:
            return
        connection.execute("PRAGMA busy_timeout = 0")
        with suppress(sqlite3.OperationalError):  # locked
            connection.execute("PRAGMA journal_mode = DELETE")  # write-ahead mode fixes the size
            connection.execute(f"PRAGMA page_size = {wanted}")
            connection.execute("VACUUM")
        with suppress(sqlite3.OperationalError):  # locked meanwhile: the next to connect waits
            connection.execute("PRAGMA journal_mode = WAL")


class _Mover:
    """Moves written pages from the write-ahead file into the store, beside the writing.

    Of few users it waits until the file is large.

    The write-ahead file begins anew when a batch begins and nothing is left to move. So that it
    does not grow without end, the writer waits for that now and then.
    """

    def __init__(self, store: FeatureStore, pool: ThreadPoolExecutor, *, is_eager: bool) -> None:
        self._store = store
        self._is_eager = is_eager
        self._pool = pool
        self._moving: Future[None] | None = None
        self._batches = 0

    def before_batch(self) -> None:
        """Wait until all is moved, if it is time for that."""
        self._batches += 1
        if self._batches % BATCHES_BETWEEN_RESETS == 0:
            self.finish()
            self._move()

    def after_batch(self) -> None:
        """Move what is there, unless somebody is at it."""
        is_idle = self._moving is None or self._moving.done()
        if is_idle and (self._is_eager or not _may_stay(self._store)):
            self._moving = self._pool.submit(self._move)

    def finish(self) -> None:
        """Wait for what is being moved."""
        if self._moving is not None:
            self._moving.result()

    def _move(self) -> None:
        with closing(_connect(self._store)) as connection:
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()


def _insert(
    connection: sqlite3.Connection, table: str, names: list[str], values: list[Any]
) -> None:
    """Insert or replace users, as many at once as a statement takes, and the others one by one."""
    num_parameters = _num_parameters(names)
    num_users = min(MAX_USERS, MAX_PARAMETERS // num_parameters)
    for users in (num_users, 1):
        statement, step = _statement(table, names, users), users * num_parameters
        whole = len(values) // step * step
        for start in range(0, whole, step):
            connection.execute(statement, values[start : start + step])
        values = values[whole:]


def _settle(store: FeatureStore, connection: sqlite3.Connection) -> None:
    """Bring all that was written safely to the disk; a large write-ahead file is emptied."""
    if _may_stay(store):
        with _write_ahead_file(store).open("rb") as file:
            os.fsync(file.fileno())
    else:
        _empty(connection)


def _may_stay(store: FeatureStore) -> bool:
    """Tell whether the write-ahead file, which is there while the store is open, is small."""
    return _write_ahead_file(store).stat().st_size <= MAX_LEFT_BYTES


def _write_ahead_file(store: FeatureStore) -> Path:
    return Path(f"{store.config.online_store.path}-wal")


def _empty(connection: sqlite3.Connection) -> None:
    """Move all to where it belongs, and empty the write-ahead file unless somebody is reading."""
    connection.execute(f"PRAGMA busy_timeout = {LAST_WAIT_MILLISECONDS}")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


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
        connection.execute("CREATE TEMP TABLE erased (key BLOB PRIMARY KEY) WITHOUT ROWID")
        with connection:
            connection.executemany("INSERT OR IGNORE INTO erased VALUES (?)", zip(keys))
            query = f"SELECT count(*) FROM erased WHERE EXISTS ({there})"
            ((found,),) = connection.execute(query).fetchall()
            connection.execute(f"DELETE FROM {table} WHERE entity_key IN (SELECT key FROM erased)")
        _empty(connection)
    return int(found)


def table_of(store: FeatureStore, view: FeatureView) -> str:
    """Return the name of a view's table."""
    from feast.infra.online_stores.helpers import compute_table_id  # noqa: PLC0415 - takes seconds

    is_versioned = store.config.registry.enable_online_feature_view_versioning
    name: str = compute_table_id(store.project, view, is_versioned)
    return name


def _connect(store: FeatureStore) -> sqlite3.Connection:
    """Open the store's file for writing.

    A kill loses no commit. A power failure may lose the newest ones, which `_settle` ends: the file
    stays whole either way, for pages reach the disk in the write-ahead file before they are moved.
    """
    connection = sqlite3.connect(store.config.online_store.path, timeout=TIMEOUT_SECONDS)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA wal_autocheckpoint = 0")
    connection.execute("PRAGMA temp_store = MEMORY")
    connection.execute(f"PRAGMA cache_size = -{CACHE_KIBIBYTES}")
    return connection


def _reader(store: FeatureStore) -> sqlite3.Connection:
    """Open the store's file for reading, until the last writer has closed it.

    SQLite empties the write-ahead file, whatever its size, when the last connection is closed that
    may write. Services that read keep one open; this one stands in for them where there is none.
    """
    path = Path(store.config.online_store.path).absolute()
    connection = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)
    connection.execute("SELECT 1 FROM sqlite_master").fetchall()  # opens the file
    return connection


def _num_parameters(names: list[str]) -> int:
    """Return how many parameters a user takes: key, two times, value and text of each feature."""
    return 3 + 2 * len(names)


def _statement(table: str, names: list[str], num_users: int) -> str:
    """Return the statement that inserts or replaces all features of some users."""
    rows = []
    for first in range(1, 1 + num_users * _num_parameters(names), _num_parameters(names)):
        for at, name in enumerate(names):
            value = first + 3 + 2 * at
            text = quote_text(name)
            rows.append(f"(?{first}, {text}, ?{value}, ?{value + 1}, ?{first + 1}, ?{first + 2})")
    changed = ", ".join(f"{name} = excluded.{name}" for name in COLUMNS[2:])
    return (
        f"INSERT INTO {quote_identifier(table)} ({', '.join(COLUMNS)}) VALUES {', '.join(rows)} "
        f"ON CONFLICT (entity_key, feature_name) DO UPDATE SET {changed}"
    )


def _values(store: FeatureStore, view: FeatureView, batch: pa.RecordBatch) -> list[Any]:
    """Return the parameters of a batch, user by user: see `_num_parameters`."""
    version = store.config.entity_key_serialization_version
    columns: list[Iterable[Any]] = [
        entity_keys(batch.column("user_id"), view.join_keys[0], version),
        _seconds(batch.column("observation_cutoff")),
        _seconds(batch.column("written_at")),
    ]
    for _, values, texts in online_features(batch, view):
        columns += [values, texts]
    return list(chain.from_iterable(zip(*columns, strict=True)))


def _seconds(times: pa.Array) -> list[int]:
    """Return times in whole seconds, as Feast's SQLite store keeps them.

    It takes the time in UTC, forgets the zone, and counts the seconds as if the clock were local;
    reading, it does the reverse. So must we, for the same time to come back in every zone.
    """
    coded = times.dictionary_encode()
    naive = [time.astimezone(UTC).replace(tzinfo=None) for time in coded.dictionary.to_pylist()]
    known = [int(time.timestamp()) for time in naive]
    return [known[at] for at in coded.indices.to_pylist()]
