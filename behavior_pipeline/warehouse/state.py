"""What a warehouse was built from, kept inside it, and what has changed since."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import duckdb

from behavior_pipeline.ingest.arrivals import CHANGES_FILE, Arrival
from behavior_pipeline.sql import fetch_one, parquet

MAX_TOUCHED_SHARE: Final = 0.2
"""A night that touches a larger share of the users rebuilds everybody: that is then cheaper."""

MAX_LAYERS: Final = 30
MAX_LAYERED_SHARE: Final = 0.5
"""So many layers, or users in them, and the next night rebuilds everybody: reading stays fast."""

TOUCHED: Final = "pipeline.touched_users"


@dataclass(frozen=True)
class State:
    """What a warehouse was built from.

    Attributes:
        fingerprint: of the plan.
        applied: load that was worked in, by arrival.
        night_cutoff: the night's own cutoff, as the models read it.
        num_users: users with an event.
        layers: the sessionized events that go with it, as `Layers.document` writes them.
    """

    fingerprint: str
    applied: Mapping[str, str]
    night_cutoff: str
    num_users: int
    layers: Mapping[str, Any]


def read_state(warehouse: Path) -> State | None:
    """Return the state of a warehouse, None if there is none that can be read."""
    if not warehouse.is_file():
        return None
    try:
        with duckdb.connect(str(warehouse), read_only=True) as connection:
            (text,) = fetch_one(connection, "SELECT document FROM pipeline.state")
    except duckdb.Error:  # such as the file of another release, or one that dbt made
        return None
    return State(**json.loads(text))


def write_state(connection: duckdb.DuckDBPyConnection, state: State) -> None:
    """Keep a state in the open warehouse."""
    connection.execute("CREATE OR REPLACE TABLE pipeline.state (document VARCHAR)")
    text = json.dumps(asdict(state), sort_keys=True)
    connection.execute("INSERT INTO pipeline.state VALUES (?)", [text])


def why_rebuild(state: State | None, fingerprint: str, arrivals: list[Arrival]) -> str:
    """Say why everybody must be rebuilt, or return an empty text."""
    if state is None:
        return "there is no warehouse yet"
    if state.fingerprint != fingerprint:
        return "the SQL or its variables have changed"
    if set(state.applied) - {arrival.key for arrival in arrivals}:
        return "an arrival is gone"
    if any(arrival.changes_everything for arrival in _changed(state, arrivals)):
        return "a bulk load came"
    if len(state.layers["layers"]) >= MAX_LAYERS:
        return f"there are {MAX_LAYERS} layers"
    return ""


def _changed(state: State, arrivals: list[Arrival]) -> list[Arrival]:
    """Return the arrivals whose load is not the one that was worked in."""
    return [arrival for arrival in arrivals if state.applied.get(arrival.key) != arrival.load_id]


def find_touched(
    connection: duckdb.DuckDBPyConnection,
    state: State,
    arrivals: list[Arrival],
    night_cutoff: str,
) -> int:
    """Make the table TOUCHED of the open warehouse; return how many users it has.

    Touched are the users that an arrival changed, and those with an event between the cutoffs of
    the last night and of this one, whose features see it for the first time, or no longer.
    """
    files = [arrival.folder / CHANGES_FILE for arrival in _changed(state, arrivals)]
    changes = "SELECT NULL::VARCHAR AS user_id LIMIT 0"
    if files:
        changes = f"FROM {parquet(files)}"
    between = (
        "SELECT user_id FROM main.user_days WHERE "
        "activity_date >= least($before::DATE, $now::DATE) "
        "AND activity_date < greatest($before::DATE, $now::DATE)"
    )
    connection.execute(
        f"CREATE OR REPLACE TABLE {TOUCHED} AS "
        f"SELECT DISTINCT user_id FROM (SELECT user_id FROM ({changes}) UNION ALL {between})",
        {"before": state.night_cutoff[:10], "now": night_cutoff[:10]},
    )
    return int(fetch_one(connection, f"SELECT count(*) FROM {TOUCHED}")[0])
