"""The point-in-time aggregates of a population: the strong baseline beside RFM."""

from __future__ import annotations

from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from behavior_pipeline.downstream.population import require_mart
from behavior_pipeline.downstream.users import Population
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.ingest.presets import Preset
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage
from behavior_pipeline.warehouse.past_aggregates import aggregates_at
from behavior_pipeline.windows import EvaluationWindows

KEYS: Final = ("observation_cutoff", "user_id")


def load_aggregates(
    storage: Storage,
    settings: Settings,
    preset: Preset,
    windows: EvaluationWindows,
    population: Population,
) -> NDArray[np.float64]:
    """Return the (N, F) features of the mart `user_aggregates` as of the population's cutoff.

    The mart holds them at the night's own cutoff. For another they are made of the users' events.

    Raises:
        PipelineError: if neither the mart nor the events have every user.
    """
    users = population.user_ids
    path = require_mart(storage, population.cutoff, "user_aggregates")
    mart = pq.read_table(path, filters=pc.field("user_id").isin(users))
    if not _has_all(mart, users):
        mart = aggregates_at(storage, settings, preset, windows, population.cutoff, users)
    if not _has_all(mart, users):
        raise PipelineError(
            f"Users of the population have no aggregates at {population.cutoff:%Y-%m-%d}.",
            "Run the warehouse stage for this night again.",
        )
    places = pc.index_in(users, value_set=mart["user_id"].combine_chunks())
    rows = mart.drop_columns(list(KEYS)).take(places)
    return np.column_stack([column.cast(pa.float64()).to_numpy() for column in rows.columns])


def _has_all(mart: pa.Table, users: pa.Array) -> bool:
    """Return whether a mart has a row of every user."""
    found = pc.is_in(users, value_set=mart["user_id"].combine_chunks())
    return bool(pc.all(found).as_py())
