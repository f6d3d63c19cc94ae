"""The warehouse, and what analysts open, without some users.

Rows are copied into a new file: a database keeps what was deleted in pages that are free. Sums over
users lose what the erased ones added, as on a night that touches them, so the next night goes on
from here.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

import duckdb
import pyarrow as pa

from behavior_pipeline.layers import Layers, layers_of
from behavior_pipeline.settings import Settings
from behavior_pipeline.sql import fetch_one, open_engine, quote_identifier, quote_text
from behavior_pipeline.storage import Storage
from behavior_pipeline.warehouse.plan import Plan, kept_plan
from behavior_pipeline.warehouse.state import State, read_state, write_state
from behavior_pipeline.warehouse.swap import database_aside, swap_in
from behavior_pipeline.warehouse.workbench import EVENTS, Workbench

_USERS: Final = "pipeline.users_to_remove"
_EVENT_IDS: Final = "pipeline.events_to_remove"
_MARK: Final = "pipeline.removals"

_Change = Callable[[duckdb.DuckDBPyConnection], None]


def count_rows(database: Path, users: pa.Array) -> int:
    """Count the rows of some users in all tables of a database; 0 if there is none."""
    if not database.exists():
        return 0
    with duckdb.connect(str(database), read_only=True) as connection:
        connection.register("removed", pa.table({"user_id": users}))
        semi = "SEMI JOIN removed USING (user_id)"
        return sum(
            int(fetch_one(connection, f"SELECT count(*) FROM {table} {semi}")[0])
            for table in _tables_with(connection, "user_id")
        )


def remove_from_warehouse(
    storage: Storage, settings: Settings, users: pa.Array, event_ids: pa.Array, removal_id: str
) -> None:
    """Replace the warehouse by one without some users and some ids of events.

    The sessionized events must still hold the users: what they added to sums is counted from them.
    A removal that was done already, by its id, changes nothing. A warehouse that the next night
    could not build upon is removed instead: that night builds everybody.

    The caller holds `working_alone(storage)`.
    """
    if not storage.warehouse.exists():
        return
    duckdb.connect(str(storage.warehouse)).close()  # works in what a killed build left in a log
    state, plan = read_state(storage.warehouse), kept_plan(storage)
    layers = layers_of(storage.events_sessionized, dict(state.layers)) if state else None
    if state is None or plan is None or layers is None or not layers.are_there:
        storage.warehouse.unlink()
        return
    if state.fingerprint != plan.fingerprint:
        storage.warehouse.unlink()
        return
    if _is_done(storage.warehouse, removal_id):
        return

    def change(connection: duckdb.DuckDBPyConnection) -> None:
        _lay_out(connection, users, event_ids)
        _take_out_of_sums(connection, plan, layers)
        _delete(connection)
        _record(connection, state, removal_id)

    _replace(storage, settings, storage.warehouse, change)


def remove_from_analytics(storage: Storage, settings: Settings, users: pa.Array) -> None:
    """Replace what analysts open by a file without some users, with the sums of the warehouse.

    Whoever has the old file open keeps reading it, for as long as it is open. The caller holds
    `working_alone(storage)`, and has removed the users from the warehouse.
    """
    shutil.rmtree(storage.replaced_analytics, ignore_errors=True)
    if not count_rows(storage.analytics, users):
        return
    plan = kept_plan(storage)
    sums = [model.name for model in plan.of_grain("sum")] if plan else []

    def change(connection: duckdb.DuckDBPyConnection) -> None:
        _lay_out(connection, users, pa.array([], pa.string()))
        _delete(connection)
        connection.execute("DROP SCHEMA pipeline CASCADE")
        if storage.warehouse.exists():
            connection.execute(f"ATTACH {quote_text(str(storage.warehouse))} AS built (READ_ONLY)")
            for name in map(quote_identifier, sums):
                connection.execute(f"DELETE FROM main.{name}")
                connection.execute(f"INSERT INTO main.{name} BY NAME FROM built.main.{name}")
            connection.execute("DETACH built")

    _replace(storage, settings, storage.analytics, change)


def _replace(storage: Storage, settings: Settings, database: Path, change: _Change) -> None:
    """Copy a database, change the copy, and put what is left of it in place, in a new file."""
    spill = storage.scratch / "spill"
    with database_aside(storage, database) as aside:
        between = aside.with_name("between.duckdb")
        shutil.copyfile(database, between)
        with open_engine(settings.memory_limit, settings.threads, spill, between) as connection:
            change(connection)
        with open_engine(settings.memory_limit, settings.threads, spill) as connection:
            connection.execute("SET preserve_insertion_order = true")
            connection.execute(f"ATTACH {quote_text(str(between))} AS kept (READ_ONLY)")
            connection.execute(f"ATTACH {quote_text(str(aside))} AS fresh")
            connection.execute("COPY FROM DATABASE kept TO fresh")
        swap_in(aside, database)


def _is_done(warehouse: Path, removal_id: str) -> bool:
    """Tell whether a removal was worked in."""
    with duckdb.connect(str(warehouse), read_only=True) as connection:
        there = connection.execute(
            "SELECT count(*) FROM duckdb_tables() WHERE schema_name = 'pipeline' "
            "AND table_name = 'removals'"
        ).fetchall()
        if not there[0][0]:
            return False
        query = f"SELECT count(*) FROM {_MARK} WHERE id = ?"
        return bool(fetch_one(connection, query, [removal_id])[0])


def _lay_out(connection: duckdb.DuckDBPyConnection, users: pa.Array, event_ids: pa.Array) -> None:
    """Make the tables of what goes; the copy that counts has them no more."""
    connection.execute("CREATE SCHEMA IF NOT EXISTS pipeline")
    for table, name, values in (
        (_USERS, "user_id", users),
        (_EVENT_IDS, "event_id", event_ids),
    ):
        connection.register("given", pa.table({name: values}))
        connection.execute(f"CREATE OR REPLACE TABLE {table} AS FROM given")
        connection.unregister("given")


def _take_out_of_sums(connection: duckdb.DuckDBPyConnection, plan: Plan, layers: Layers) -> None:
    """Take what the users added out of what is summed over everybody."""
    bench = Workbench(connection, plan, lambda _: None)
    rows = f"SELECT * FROM ({layers.relation()}) WHERE user_id IN (SELECT user_id FROM {_USERS})"
    bench.set_scope(EVENTS, rows)
    for model in plan.of_grain("sum"):
        bench.begin_sum(model, with_what_is_there=True)
        bench.add(model, -1)
        bench.total(model)
    bench.clear_scope()


def _delete(connection: duckdb.DuckDBPyConnection) -> None:
    """Delete the rows of the users and of their events, and the lists of them."""
    for column, removed in (("user_id", _USERS), ("event_id", _EVENT_IDS)):
        for table in _tables_with(connection, column):
            if table not in {_USERS, _EVENT_IDS}:
                connection.execute(
                    f"DELETE FROM {table} WHERE {column} IN (SELECT {column} FROM {removed})"
                )
    for table in (_USERS, _EVENT_IDS):
        connection.execute(f"DROP TABLE {table}")


def _record(connection: duckdb.DuckDBPyConnection, state: State, removal_id: str) -> None:
    """Keep how many users are left, and that this removal is done."""
    (num_users,) = fetch_one(connection, "SELECT count(DISTINCT user_id) FROM main.user_days")
    write_state(connection, replace(state, num_users=int(num_users)))
    connection.execute(f"CREATE TABLE IF NOT EXISTS {_MARK} (id VARCHAR)")
    connection.execute(f"INSERT INTO {_MARK} VALUES (?)", [removal_id])


def _tables_with(connection: duckdb.DuckDBPyConnection, column: str) -> list[str]:
    """Return the tables that have a column, with their schema."""
    rows = connection.execute(
        "SELECT tables.schema_name, table_name FROM duckdb_tables() AS tables "
        "JOIN duckdb_columns() AS columns USING (table_oid, database_name, table_name) "
        "WHERE column_name = ? AND NOT tables.temporary "
        "AND database_name = current_database() ORDER BY ALL",
        [column],
    ).fetchall()
    return [f"{schema}.{name}" for schema, name in rows]  # models' names: plain words
