"""What a load changes: ids that several arrivals hold, and the users whose history is another now.

Of an id that several arrivals hold, the newest arrival's row counts (a correction), or none if the
newest deletes it. Which users a load touches follows from the rows that count before and after it,
so it depends neither on the order of loads nor on how often they are run.

A row's `state` is a hash of what it says, and 0 for a deletion.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import duckdb

from behavior_pipeline.contracts import CHANGES, VERSIONS, Contract
from behavior_pipeline.ingest.arrivals import (
    CHANGES_FILE,
    DELETIONS_FILE,
    EVENT_COLUMNS,
    VERSIONS_FILE,
    Arrival,
    arrival_rank,
)
from behavior_pipeline.sql import fetch_one, parquet, quote_identifier, quote_text, utc_date

_SIDE: Final = "event_id, user_id, activity_date, state, ingested_at"
_NOTHING: Final = (
    "SELECT NULL::VARCHAR AS event_id, NULL::VARCHAR AS user_id, NULL::DATE AS activity_date, "
    "NULL::UBIGINT AS state, NULL::TIMESTAMPTZ AS ingested_at, NULL::VARCHAR AS arrival, "
    "NULL::VARCHAR AS load LIMIT 0"
)
DELETED: Final = "0::UBIGINT"


def state_of_row() -> str:
    """Return SQL that hashes what a row says, the same in every release; null is no empty text."""
    parts = ", ".join(_part(name) for name in EVENT_COLUMNS)
    return f"md5_number_lower(concat_ws(chr(31), {parts})) | 1"


def find_versions(
    connection: duckdb.DuckDBPyConnection, others: list[Arrival], own: Arrival | None
) -> None:
    """Create the views `own_new` and `own_old` and the table `others`.

    The views have what the arrival says now (of the relations `stored` and `deletions`) and what it
    said before. The table has, of the ids in either, each row and deletion of another arrival, with
    its `arrival` and `load`.
    """
    stored = f"SELECT event_id, user_id, {utc_date('occurred_at')} AS activity_date, "
    new = (
        f"{stored} {state_of_row()} AS state, ingested_at FROM stored UNION ALL "
        f"SELECT event_id, NULL, NULL, {DELETED}, NULL FROM deletions"
    )
    connection.execute(f"CREATE TEMP VIEW own_new AS {new}")
    connection.execute(f"CREATE TEMP VIEW own_old AS {_rows_of([own] if own else [])}")
    ids = "SELECT event_id FROM stored UNION ALL FROM deletions"
    if own is not None:
        ids += " UNION ALL SELECT event_id FROM own_old"
    connection.execute(f"CREATE TEMP TABLE others AS {_rows_of(others, ids)}")


def find_changes(connection: duckdb.DuckDBPyConnection, arrival: str) -> None:
    """Create the table `changes`: the user-days that the load of the arrival changes.

    And `changed`, the ids of which the arrival says something else than before.
    """
    connection.execute(
        "CREATE TEMP TABLE changed AS SELECT event_id FROM own_new FULL JOIN own_old "
        "USING (event_id) WHERE own_new.state IS DISTINCT FROM own_old.state"
    )
    alone = "event_id IN (FROM changed) AND event_id NOT IN (SELECT event_id FROM others)"
    rows = " UNION ALL ".join(
        f"SELECT user_id, activity_date FROM {side} WHERE {alone}"
        for side in ("own_new", "own_old")
    )
    connection.execute(
        "CREATE TEMP TABLE changes AS SELECT DISTINCT user_id, activity_date "
        f"FROM ({rows} UNION ALL {_changed_winners(arrival)}) WHERE user_id IS NOT NULL"
    )


def keep_times(connection: duckdb.DuckDBPyConnection, own: Arrival | None) -> None:
    """Create the view `timed`: the relation `stored`, with the times of rows that came before.

    A row that the arrival held already as it is keeps the time at which it first came like that.
    """
    files = own.event_files() if own else []
    if not files:
        connection.execute("CREATE TEMP VIEW timed AS FROM stored")
        return
    connection.execute(
        "CREATE TEMP VIEW timed AS SELECT stored.* REPLACE "
        "(coalesce(held.ingested_at, stored.ingested_at) AS ingested_at) FROM stored LEFT JOIN "
        f"(SELECT event_id, user_bucket, ingested_at FROM {parquet(files)} "
        "WHERE event_id NOT IN (FROM changed)) AS held "
        "ON stored.event_id = held.event_id AND stored.user_bucket = held.user_bucket"
    )


def changes_everything(connection: duckdb.DuckDBPyConnection, own: Arrival | None) -> bool:
    """Tell whether a load is its arrival's first, and no other arrival holds an id of it."""
    return own is None and fetch_one(connection, "SELECT count(*) FROM others")[0] == 0


def count_known(connection: duckdb.DuckDBPyConnection) -> tuple[int, int]:
    """Return how many stored rows other arrivals hold as they are, and with other content only."""
    known, held = fetch_one(
        connection,
        "SELECT count(*) FILTER (WHERE is_same), count(*) FROM ("
        "SELECT bool_or(others.state = own_new.state) AS is_same FROM own_new "
        f"JOIN others USING (event_id) WHERE own_new.state <> {DELETED} "
        f"AND others.state <> {DELETED} GROUP BY event_id)",
    )
    return int(known), int(held - known)


def write_versions(
    connection: duckdb.DuckDBPyConnection, arrival: str, load_id: str, folder: Path
) -> None:
    """Write `versions.parquet`: of each id that others hold, or that is deleted, every version."""
    contested = "(FROM timed SEMI JOIN others USING (event_id))"
    own = " UNION ALL ".join(
        f"SELECT event_id, {quote_text(arrival)} AS arrival, {quote_text(load_id)} AS load_id, "
        f"state, ingested_at FROM {rows}"
        for rows in (
            # apart, so that states are computed of contested rows alone
            f"(SELECT event_id, {state_of_row()} AS state, ingested_at FROM {contested})",
            f"(SELECT event_id, {DELETED} AS state, NULL AS ingested_at FROM deletions)",
        )
    )
    theirs = (
        "SELECT event_id, arrival, load AS load_id, state, ingested_at FROM others "
        "WHERE event_id IN (SELECT event_id FROM own_new)"
    )
    _write(connection, f"{own} UNION ALL {theirs}", VERSIONS, folder / VERSIONS_FILE)


def write_changes(connection: duckdb.DuckDBPyConnection, own: Arrival | None, folder: Path) -> None:
    """Write `changes.parquet`: what this load and those before it changed.

    Those before it too, since nobody may have worked on them yet.
    """
    before = [own.folder / CHANGES_FILE] if own else []
    query = "SELECT * FROM changes"
    if before:
        query += f" UNION SELECT * FROM {parquet(before)}"
    _write(connection, query, CHANGES, folder / CHANGES_FILE)


def write_deletions(connection: duckdb.DuckDBPyConnection, folder: Path) -> None:
    """Write `deletions.parquet`: the ids that the arrival deletes."""
    _copy(connection, "SELECT event_id FROM deletions ORDER BY event_id", folder / DELETIONS_FILE)


def _rows_of(arrivals: list[Arrival], ids: str | None = None) -> str:
    """Return SQL of the rows and deletions of some arrivals, of some ids only."""
    wanted = f"WHERE event_id IN ({ids})" if ids else ""
    events = [file for arrival in arrivals for file in arrival.event_files()]
    deletions = [
        file for arrival in arrivals if (file := arrival.folder / DELETIONS_FILE).is_file()
    ]
    parts = [_NOTHING]
    if events:
        parts.append(
            f"SELECT event_id, user_id, {utc_date('occurred_at')}, {state_of_row()}, ingested_at, "
            f"arrival, load FROM {parquet(events, with_folders=True)} {wanted}"
        )
    if deletions:
        parts.append(
            f"SELECT event_id, NULL, NULL, {DELETED}, NULL, arrival, load "
            f"FROM {parquet(deletions, with_folders=True)} {wanted}"
        )
    return " UNION ALL ".join(f"({part})" for part in parts)


def _changed_winners(arrival: str) -> str:
    """Return SQL of the user-days of contested ids whose counting row, or its time, is another."""
    winner = (
        "SELECT *, min(ingested_at) OVER (PARTITION BY event_id, state) AS came_at FROM "
        f"(SELECT {_SIDE}, {rank_of('arrival')} AS arrival_rank FROM others "
        f"UNION ALL SELECT {_SIDE}, {quote_text(arrival_rank(arrival))} FROM {{side}}) "
        "WHERE event_id IN (FROM changed) AND event_id IN (SELECT event_id FROM others) "
        "QUALIFY row_number() OVER (PARTITION BY event_id ORDER BY arrival_rank DESC) = 1"
    )
    both = "unnest([a.{0}, b.{0}]) AS {0}"
    return (
        f"SELECT {both.format('user_id')}, {both.format('activity_date')} "
        f"FROM ({winner.format(side='own_new')}) AS a "
        f"FULL JOIN ({winner.format(side='own_old')}) AS b USING (event_id) "
        f"WHERE nullif(a.state, {DELETED}) IS DISTINCT FROM nullif(b.state, {DELETED}) "
        "OR a.came_at IS DISTINCT FROM b.came_at"
    )


def rank_of(column: str) -> str:
    """Return SQL of `arrival_rank`: the history comes before all days."""
    return f"CASE WHEN {column} = 'history' THEN '' ELSE {column} END"


def _part(column: str) -> str:
    """Return SQL for a column's share of a row's text; null differs from an empty text."""
    name = quote_identifier(column)
    value = f"epoch_us({name})" if column == "occurred_at" else name
    return f"coalesce({value}::VARCHAR, chr(30))"


def _write(
    connection: duckdb.DuckDBPyConnection, query: str, contract: Contract, file: Path
) -> None:
    """Write a query under a contract, in its order."""
    selected = ", ".join(contract.schema.names)
    order = ", ".join(contract.sort_order)
    _copy(connection, f"SELECT {selected} FROM ({query}) ORDER BY {order}", file)


def _copy(connection: duckdb.DuckDBPyConnection, query: str, file: Path) -> None:
    """Write a query to a private Parquet file."""
    connection.execute(
        f"COPY ({query}) TO {quote_text(str(file))} (FORMAT parquet, COMPRESSION zstd)"
    )
    file.chmod(0o600)
