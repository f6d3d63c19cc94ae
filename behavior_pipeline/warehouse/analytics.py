"""Publishes what analysts open: one DuckDB file with marts, segments and predictions."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Final

import duckdb
import pyarrow as pa

from behavior_pipeline.contracts import PREDICTIONS, SEGMENTS, Contract
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.settings import Settings
from behavior_pipeline.sql import fetch_one, open_engine, quote_identifier, quote_text
from behavior_pipeline.storage import Storage, working_alone
from behavior_pipeline.warehouse.readers import keep_for_readers
from behavior_pipeline.warehouse.state import read_state
from behavior_pipeline.warehouse.swap import database_aside, swap_in
from behavior_pipeline.warehouse.variables import written_cutoff

USER_SEGMENTS: Final = "user_segments"
USER_PREDICTIONS: Final = "user_predictions"

_DESCRIPTIONS: Final[Mapping[str, str]] = MappingProxyType(
    {
        USER_SEGMENTS: "The segment of every user with an embedding at the latest cutoff.",
        USER_PREDICTIONS: "Calibrated scores of every user of the population at the latest cutoff.",
    }
)
_INTERNAL_PREFIXES: Final = ("stg_", "int_")


def publish_analytics(storage: Storage, settings: Settings, cutoff: datetime) -> bool:
    """Build `analytics.duckdb` from the warehouse and the night's files, then rename it into place.

    It holds every mart and view of the dbt project, without staging and intermediate models, and
    the tables `user_segments` and `user_predictions` of the cutoff: empty where these stages have
    not run for it. Tables and columns carry comments. Whoever has the old file open keeps reading
    the old file, and the sessionized events that it needs stay until it is closed.

    Returns:
        Whether it was published: a newer night is never replaced by an older one.

    Raises:
        PipelineError: if there is no warehouse of this night.
    """
    with working_alone(storage):
        _check_warehouse(storage, cutoff)
        published = published_cutoff(storage)
        if published is not None and published > cutoff:
            return False
        with database_aside(storage, storage.analytics) as aside:
            _fill(storage, settings, cutoff, aside)
            keep_for_readers(storage)
            swap_in(aside, storage.analytics)
    return True


def published_cutoff(storage: Storage) -> datetime | None:
    """Return the night that analysts see; None if there is none or nobody is in it."""
    if not storage.analytics.is_file():
        return None
    with duckdb.connect(str(storage.analytics), read_only=True) as connection:
        connection.execute("SET TimeZone = 'UTC'")
        (cutoff,) = fetch_one(connection, "SELECT max(observation_cutoff) FROM user_aggregates")
    return cutoff if cutoff is None else cutoff.astimezone(UTC)


def _check_warehouse(storage: Storage, cutoff: datetime) -> None:
    """Refuse a warehouse that is missing or of another night.

    Raises:
        PipelineError: saying which.
    """
    state = read_state(storage.warehouse)
    if state is None:
        raise PipelineError(f"There is no warehouse at {storage.warehouse}.", "Build it first.")
    if state.night_cutoff != written_cutoff(cutoff):
        raise PipelineError(
            f"The warehouse was built for the cutoff {state.night_cutoff[:10]}, not for "
            f"{cutoff:%Y-%m-%d}.",
            "Build it for this night first; nights follow one another.",
        )


def _fill(storage: Storage, settings: Settings, cutoff: datetime, aside: Path) -> None:
    """Copy the warehouse and add what the stages to the right know of its users."""
    sources = (
        (USER_SEGMENTS, SEGMENTS, storage.segments(cutoff) / "segments.parquet"),
        (USER_PREDICTIONS, PREDICTIONS, storage.predictions(cutoff) / "predictions.parquet"),
    )
    duckdb.connect(str(storage.warehouse)).close()  # works in what a killed build left in a log
    shutil.copyfile(storage.warehouse, aside)
    spill = storage.scratch / "spill"
    with open_engine(settings.memory_limit, settings.threads, spill, aside) as connection:
        _drop_internal(connection)
        for table, contract, path in sources:
            _create_table(connection, table, contract, path)


def _drop_internal(connection: duckdb.DuckDBPyConnection) -> None:
    """Drop what only the build needs; its views read Parquet that later nights replace."""
    relations = connection.execute(
        "SELECT table_name, table_type FROM information_schema.tables "
        "WHERE table_schema = 'main' ORDER BY table_name"
    ).fetchall()
    for schema in ("pipeline", "scope"):
        connection.execute(f"DROP SCHEMA IF EXISTS {schema} CASCADE")
    for name, type_ in relations:
        if name.startswith(_INTERNAL_PREFIXES):
            kind = "VIEW" if type_ == "VIEW" else "TABLE"
            connection.execute(f"DROP {kind} {quote_identifier(name)}")


def _create_table(
    connection: duckdb.DuckDBPyConnection, table: str, contract: Contract, path: Path
) -> None:
    """Create a table with the contract's columns and comments, filled from the file if any."""
    name = quote_identifier(table)
    connection.register("empty", contract.schema.empty_table())
    connection.execute(f"CREATE TABLE {name} AS FROM empty")
    connection.unregister("empty")
    if path.is_file():
        columns = ", ".join(quote_identifier(column) for column in contract.schema.names)
        order = ", ".join(quote_identifier(column) for column in contract.sort_order)
        connection.execute(
            f"INSERT INTO {name} SELECT {columns} FROM read_parquet(?, hive_partitioning = false) "
            f"ORDER BY {order}",
            [str(path)],
        )
    connection.execute(f"COMMENT ON TABLE {name} IS {quote_text(_DESCRIPTIONS[table])}")
    for field in contract.schema:
        column = f"{name}.{quote_identifier(field.name)}"
        connection.execute(f"COMMENT ON COLUMN {column} IS {quote_text(_meaning(field))}")


def _meaning(field: pa.Field) -> str:
    """Return what a contract says about a column."""
    meaning: bytes = field.metadata[b"meaning"]
    return meaning.decode()
