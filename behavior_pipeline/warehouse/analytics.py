"""Publishes what analysts open: one DuckDB file with marts, segments and predictions."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Final

import duckdb
import pyarrow as pa

from behavior_pipeline.contracts import PREDICTIONS, SEGMENTS, Contract
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.settings import Settings
from behavior_pipeline.sql import open_engine, quote_identifier, quote_text
from behavior_pipeline.storage import Storage
from behavior_pipeline.warehouse.swap import database_aside, swap_in

USER_SEGMENTS: Final = "user_segments"
USER_PREDICTIONS: Final = "user_predictions"

_DESCRIPTIONS: Final[Mapping[str, str]] = MappingProxyType(
    {
        USER_SEGMENTS: "The segment of every user with an embedding at the latest cutoff.",
        USER_PREDICTIONS: "Calibrated scores of every user of the population at the latest cutoff.",
    }
)
_INTERNAL_PREFIXES: Final = ("stg_", "int_")


def publish_analytics(storage: Storage, settings: Settings, cutoff: datetime) -> None:
    """Build `analytics.duckdb` from the warehouse and the night's files, then rename it into place.

    It holds every mart and view of the dbt project, without staging and intermediate models, and
    the tables `user_segments` and `user_predictions` of the cutoff: empty where these stages have
    not run for it. Tables and columns carry comments. Whoever has the old file open keeps reading
    the old file.

    Raises:
        PipelineError: if there is no warehouse yet.
    """
    if not storage.warehouse.is_file():
        raise PipelineError(f"There is no warehouse at {storage.warehouse}.", "Build it first.")
    sources = (
        (USER_SEGMENTS, SEGMENTS, storage.segments(cutoff) / "segments.parquet"),
        (USER_PREDICTIONS, PREDICTIONS, storage.predictions(cutoff) / "predictions.parquet"),
    )
    with database_aside(storage, storage.analytics) as aside:
        shutil.copyfile(storage.warehouse, aside)
        spill = storage.scratch / "spill"
        with open_engine(settings.memory_limit, settings.threads, spill, aside) as connection:
            _drop_internal(connection)
            for table, contract, path in sources:
                _create_table(connection, table, contract, path)
        swap_in(aside, storage.analytics)


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
