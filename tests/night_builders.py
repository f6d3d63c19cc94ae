"""A shop whose nights bring late events, repeats, corrections and deletions, through ingest."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from warehouse_builders import INGESTED_AT, LIVE_CUTOFF, make_preset, make_windows, run_at_once

from behavior_pipeline.ingest.arrivals import LoadSummary
from behavior_pipeline.ingest.load import load_arrival
from behavior_pipeline.ingest.presets import Preset
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage
from behavior_pipeline.warehouse.plan import Plan
from behavior_pipeline.windows import EvaluationWindows

COLUMNS = ("event_id", "user_id", "event_type", "occurred_at", "item_id", "category", "amount")

Row = dict[str, Any]


def night_preset(**tasks: object) -> Preset:
    """The shop of `make_preset` with ids and tombstones."""
    columns = {name: name for name in COLUMNS} | {"occurred_at": {"column": "occurred_at"}}
    mapped = columns | {"is_deleted": {"column": "is_deleted"}}
    return Preset.model_validate(make_preset(**tasks).model_dump() | {"columns": mapped})


def tombstone(event_id: str) -> Row:
    """Deletes an event, and says nothing else."""
    return {"event_id": event_id, "is_deleted": "true"}


def bring(
    rows: Sequence[Row],
    storage: Storage,
    settings: Settings,
    arrival: str = "history",
    at: datetime = INGESTED_AT,
) -> LoadSummary:
    """Load rows as an arrival."""
    names = (*COLUMNS, "is_deleted")
    file = Path(storage.home.parent) / f"raw of {storage.home.name}" / f"{arrival}.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])
    for place, name in enumerate(names):  # a column of nulls has no type
        if pa.types.is_null(table.schema.field(name).type):
            table = table.set_column(place, name, table[name].cast(pa.string()))
    pq.write_table(table, file)
    return load_arrival(night_preset(), str(file), storage, settings, arrival, at)


def warehouse_rows(
    connection: duckdb.DuckDBPyConnection, plan: Plan
) -> dict[str, list[tuple[Any, ...]]]:
    """Return the rows of every model, columns by name and as texts, sorted.

    Views over canonical events are left out: in a warehouse they show what it was at work on last.
    """
    found = {}
    for model in plan.models:
        if model.grain == "view" and model.name.startswith(("stg_", "int_")):
            continue
        columns = ", ".join(f'"{column.name}"::VARCHAR' for column in model.columns)
        query = f"SELECT {columns} FROM {model.name} ORDER BY ALL"
        found[model.name] = connection.execute(query).fetchall()
    return found


def rows_of(warehouse: Path, plan: Plan) -> dict[str, list[tuple[Any, ...]]]:
    """Return the rows of every model of a warehouse on disk."""
    with duckdb.connect(str(warehouse), read_only=True) as connection:
        connection.execute("SET TimeZone = 'UTC'")
        return warehouse_rows(connection, plan)


def rows_at_once(
    storage: Storage, plan: Plan, windows: EvaluationWindows | None = None
) -> dict[str, list[tuple[Any, ...]]]:
    """Return the rows that every model has when all arrivals are built at once."""
    with run_at_once(plan, storage, windows or make_windows(LIVE_CUTOFF)) as connection:
        return warehouse_rows(connection, plan)


def differences(
    one: dict[str, list[tuple[Any, ...]]], other: dict[str, list[tuple[Any, ...]]]
) -> list[str]:
    """Name the models whose rows differ."""
    return [name for name in one if one[name] != other[name]]
