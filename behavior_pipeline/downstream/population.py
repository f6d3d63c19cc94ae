"""Reads the users that probes are fitted on or judged on, with their RFM and their labels."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any, Final

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from behavior_pipeline import sql
from behavior_pipeline.downstream.users import Population
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage

RFM_COLUMNS: Final = ("recency_days", "frequency", "monetary")


def load_population(
    storage: Storage, settings: Settings, cutoff: datetime, targets: list[str]
) -> Population:
    """Read the population of a cutoff with RFM and labels, `max_probe_users` at the most.

    The sample takes the users whose ids have the smallest MD5: it depends on nothing but the ids.

    Raises:
        PipelineError: if a mart is missing, belongs to another cutoff or has holes, or if there is
            nobody in the population.
    """
    labels = require_mart(storage, cutoff, "labels")
    rfm = require_mart(storage, cutoff, "user_rfm")
    with sql.open_engine(settings.memory_limit, settings.threads, storage.scratch) as engine:
        for mart in (labels, rfm):
            _check_cutoff(engine, mart, cutoff)
        table = _sample(engine, labels, rfm, settings.max_probe_users)
        num_users = _count(engine, labels)
        positives = _positives(storage, engine, table["user_id"].combine_chunks(), cutoff, targets)
    _check_complete(table, cutoff)
    return Population(
        cutoff=cutoff,
        user_ids=table["user_id"].combine_chunks(),
        rfm=np.column_stack([table[name].to_numpy() for name in RFM_COLUMNS]),
        is_churned=table["is_churned"].to_numpy(zero_copy_only=False),
        next_event_types=table["next_event_type"].combine_chunks(),
        positives=positives,
        num_users=num_users,
    )


def load_targets(storage: Storage, cutoff: datetime, most: int) -> list[str]:
    """Return the `most` most frequent propensity targets, the most frequent first.

    Raises:
        PipelineError: if the mart is missing.
    """
    mart = require_mart(storage, cutoff, "propensity_targets")
    query = "select target from read_parquet($mart) order by target_rank limit $most"
    rows = duckdb.connect().execute(query, {"mart": str(mart), "most": most}).fetchall()
    return [row[0] for row in rows]


def require_mart(storage: Storage, cutoff: datetime, name: str) -> Path:
    """Return the path of a mart.

    Raises:
        PipelineError: if it was not built.
    """
    path = storage.marts(cutoff) / f"{name}.parquet"
    if not path.is_file():
        raise PipelineError(
            f"The mart {name} at {cutoff:%Y-%m-%d} is missing: there is no {path}.",
            "Run the warehouse stage for this cutoff first.",
        )
    return path


def _sample(engine: duckdb.DuckDBPyConnection, labels: Path, rfm: Path, most: int) -> pa.Table:
    """Return the sampled users with labels and RFM, sorted by id."""
    query = """
        with sample as (
            select user_id, is_churned, next_event_type
            from read_parquet($labels) order by md5(user_id), user_id limit $most
        )
        select
            user_id, is_churned, next_event_type,
            recency_days::double as recency_days,
            frequency::double as frequency,
            coalesce(monetary, 0)::double as monetary
        from sample left join read_parquet($rfm) using (user_id) order by user_id
    """
    values: dict[str, Any] = {"labels": str(labels), "rfm": str(rfm), "most": most}
    return engine.execute(query, values).to_arrow_table()


def _count(engine: duckdb.DuckDBPyConnection, mart: Path) -> int:
    """Return the number of rows of a mart."""
    row = engine.execute("select count(*) from read_parquet($mart)", {"mart": str(mart)}).fetchone()
    return int(row[0]) if row else 0


def _positives(
    storage: Storage,
    engine: duckdb.DuckDBPyConnection,
    user_ids: pa.Array,
    cutoff: datetime,
    targets: list[str],
) -> dict[str, NDArray[np.bool_]]:
    """Return who of the users took each target in the label window."""
    positives = {target: np.zeros(len(user_ids), dtype=np.bool_) for target in targets}
    if not targets:
        return positives
    mart = require_mart(storage, cutoff, "propensity_labels")
    _check_cutoff(engine, mart, cutoff)
    query = "select target, user_id from read_parquet($mart) where list_contains($targets, target)"
    pairs = engine.execute(query, {"mart": str(mart), "targets": targets}).to_arrow_table()
    places = pc.index_in(pairs["user_id"], value_set=user_ids)
    for target in targets:
        chosen = pc.drop_null(places.filter(pc.equal(pairs["target"], target)))
        positives[target][chosen.to_numpy()] = True
    return positives


def _check_cutoff(engine: duckdb.DuckDBPyConnection, mart: Path, cutoff: datetime) -> None:
    """Refuse a mart whose rows say that they belong to another cutoff."""
    query = """
        select count(*) from read_parquet($mart) where observation_cutoff is distinct from $cutoff
    """
    row = engine.execute(query, {"mart": str(mart), "cutoff": cutoff}).fetchone()
    if row and row[0]:
        raise PipelineError(
            f"{row[0]:,} rows of {mart} do not belong to the cutoff {cutoff:%Y-%m-%d}.",
            "Run the warehouse stage for this cutoff again.",
        )


def _check_complete(table: pa.Table, cutoff: datetime) -> None:
    """Refuse an empty population, and labeled users without RFM."""
    if not table.num_rows:
        raise PipelineError(
            f"No user is in the population at {cutoff:%Y-%m-%d}, so nothing can be measured.",
            "Choose another cutoff or a longer lookback (--lookback-days).",
        )
    holes = table["recency_days"].null_count + table["is_churned"].null_count
    if holes:
        raise PipelineError(
            f"{holes:,} users of the population at {cutoff:%Y-%m-%d} lack RFM or a label.",
            "Run the warehouse stage for this cutoff again.",
        )
