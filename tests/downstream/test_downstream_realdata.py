"""RFM on a real shop's invoices against figures computed elsewhere."""

from __future__ import annotations

from datetime import date, datetime, timedelta
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from downstream_builders import preset, write_aggregates, write_mart, write_vectors

from behavior_pipeline.contracts import (
    LABELS,
    PROPENSITY_LABELS,
    PROPENSITY_TARGETS,
    USER_RFM,
    Contract,
)
from behavior_pipeline.downstream.comparison import compare
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage
from behavior_pipeline.windows import EvaluationWindows, midnight

TRAIN, TEST = midnight(date(2011, 10, 10)), midnight(date(2011, 11, 9))
DAYS = timedelta(days=1)
WINDOWS = EvaluationWindows(TEST, TRAIN, TEST, 30 * DAYS, 180 * DAYS)

RFM_QUERY = """
    select $cutoff::timestamp as observation_cutoff, user_id,
        date_diff('hour', max(ts), $cutoff) / 24 as recency_days,
        count(distinct ts::date) as frequency, sum(amount) as monetary,
        max(ts) as last_qualifying_at,
        max(ts) >= $cutoff - interval 180 day as is_in_population
    from purchases where ts < $cutoff group by user_id order by user_id
"""
LABELS_QUERY = """
    with population as (
        select distinct user_id from purchases
        where ts < $cutoff and ts >= $cutoff - interval 180 day
    ), later as (
        select user_id, count(*) as num_later from purchases
        where ts >= $cutoff and ts < $cutoff + interval 30 day group by user_id
    )
    select $cutoff::timestamp as observation_cutoff, user_id, num_later is null as is_churned,
        coalesce(num_later, 0) as num_qualifying_events, 0.0 as amount,
        if(num_later is null, null, 'purchase') as next_event_type
    from population left join later using (user_id) order by user_id
"""


@pytest.fixture
def shop(realdata: Path) -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect()
    connection.execute("set TimeZone = 'UTC'")
    query = """
        create table purchases as
        select user_id::varchar as user_id, ts, quantity * price as amount
        from read_parquet(?) where event_type = 'purchase' and user_id is not null
    """
    connection.execute(query, [str(realdata / "online_retail_ii.parquet")])
    return connection


def write_cutoff(storage: Storage, shop: duckdb.DuckDBPyConnection, cutoff: datetime) -> None:
    def mart(contract: Contract, query: str) -> pa.Table:
        table = shop.execute(query, {"cutoff": cutoff.replace(tzinfo=None)}).to_arrow_table()
        write_mart(
            storage.marts(cutoff),
            contract,
            {name: table[name].combine_chunks() for name in contract.schema.names},
        )
        return table

    users = mart(USER_RFM, RFM_QUERY)["user_id"].to_pylist()
    mart(LABELS, LABELS_QUERY)
    for contract in (PROPENSITY_TARGETS, PROPENSITY_LABELS):
        pq.write_table(
            contract.schema.empty_table(), storage.marts(cutoff) / f"{contract.name}.parquet"
        )
    vectors = np.random.default_rng(0).normal(size=(len(users), 8))
    write_aggregates(storage.marts(cutoff), cutoff, users, vectors[:, 0])
    write_vectors(storage.embeddings(cutoff), users, vectors, cutoff)
    write_vectors(storage.control_embeddings(cutoff), users, vectors, cutoff, "untrained")


@pytest.mark.realdata
def test_rfm_reaches_the_score_computed_elsewhere(
    storage: Storage, shop: duckdb.DuckDBPyConnection
) -> None:
    for cutoff in (TRAIN, TEST):
        write_cutoff(storage, shop, cutoff)
    settings = Settings(threads=2, bootstrap_samples=50)
    comparison = compare(storage, settings, preset(), WINDOWS)
    rfm = next(
        row
        for row in comparison["results"]
        if (row["task"], row["representation"], row["probe"])
        == ("churn", "rfm", "logistic_regression")
    )
    assert (rfm["num_train"], rfm["num_test"]) == (2984, 3245)
    assert comparison["population"]["train"]["churn_rate"] == pytest.approx(0.663, abs=5e-4)
    assert rfm["positive_rate"] == pytest.approx(0.609, abs=5e-4)
    assert rfm["value"] == pytest.approx(0.688, abs=0.001)
    assert rfm["ci_low"] < 0.688 < rfm["ci_high"]
    assert {row["task"] for row in comparison["results"]} == {"churn", "segments"}
    reasons = {row["task"]: row["reason"] for row in comparison["left_out"]}
    assert "same type" in reasons["next_action"]
