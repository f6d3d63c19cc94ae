"""The features of `user_aggregates` for some users, as of a cutoff that is not the night's own.

A night keeps them for its own cutoff alone. A probe needs those of earlier cutoffs too, of the few
users that it is fitted on and judged on: here the mart's own SQL is run on their events alone.
"""

from __future__ import annotations

from datetime import datetime
from typing import Final

import duckdb
import pyarrow as pa

from behavior_pipeline.ingest.presets import Preset
from behavior_pipeline.layers import read_layers
from behavior_pipeline.settings import Settings
from behavior_pipeline.sql import open_engine, quote_identifier, quote_text
from behavior_pipeline.storage import Storage
from behavior_pipeline.warehouse.export import USER_AGGREGATES
from behavior_pipeline.warehouse.plan import Model, load_plan
from behavior_pipeline.warehouse.variables import written_cutoff
from behavior_pipeline.warehouse.workbench import EVENTS
from behavior_pipeline.windows import EvaluationWindows

MODELS: Final = (
    "user_days",
    "int_observation_cutoffs",
    "int_user_history",
    "int_user_diversity",
    USER_AGGREGATES,
)
"""What the mart is made of, each after what it reads."""
_COLUMNS: Final = (
    "user_id",
    "event_type",
    "event_number",
    "occurred_at",
    "gap_seconds",
    "item_id",
    "category",
    "amount",
)


def aggregates_at(
    storage: Storage,
    settings: Settings,
    preset: Preset,
    windows: EvaluationWindows,
    cutoff: datetime,
    user_ids: pa.Array,
) -> pa.Table:
    """Return the rows that the mart would hold if the cutoff were the night's, sorted by user.

    Users without an event before the cutoff have none. Events of the users alone are in memory,
    and spill to disk beyond its limit.

    Raises:
        PipelineError: if there are no sessionized events, or dbt cannot compile the models.
    """
    plan = load_plan(storage, settings, preset, windows)
    models = {model.name: model for model in plan.models}
    relation = read_layers(storage.events_sessionized).relation()
    with open_engine(settings.memory_limit, settings.threads, storage.scratch / "spill") as engine:
        engine.register("wanted", pa.table({"user_id": user_ids}))
        _lay_out(engine, relation, cutoff)
        for name in MODELS:
            engine.execute(f"CREATE TABLE {quote_identifier(name)} AS {models[name].sql}")
        return _rows(engine, models[USER_AGGREGATES])


def _lay_out(engine: duckdb.DuckDBPyConnection, relation: str, cutoff: datetime) -> None:
    """Make what the models read: the one cutoff, and what the users did before it."""
    moment = f"TIMESTAMPTZ {quote_text(written_cutoff(cutoff))}"
    columns = ", ".join(_COLUMNS)
    engine.execute(
        "CREATE SCHEMA pipeline; CREATE TABLE pipeline.night_cutoffs AS "
        f"SELECT {moment} AS observation_cutoff, false AS is_train_cutoff"
    )
    engine.execute(
        f"CREATE TABLE {EVENTS} AS SELECT {columns} FROM ({relation}) "
        f"SEMI JOIN wanted USING (user_id) WHERE occurred_at < {moment}"
    )


def _rows(engine: duckdb.DuckDBPyConnection, mart: Model) -> pa.Table:
    """Return the columns that the mart declares."""
    columns = ", ".join(f"{quote_identifier(column.name)}" for column in mart.columns)
    query = f"SELECT {columns} FROM {quote_identifier(mart.name)} ORDER BY user_id"
    return engine.execute(query).to_arrow_table()
