"""The shop of two years, against counts computed independently of this project."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest
from warehouse_builders import make_preset, new_load

from behavior_pipeline.settings import Settings
from behavior_pipeline.sql import quote_text, user_bucket
from behavior_pipeline.storage import Storage
from behavior_pipeline.warehouse.build import build_warehouse
from behavior_pipeline.warehouse.export import export_marts
from behavior_pipeline.windows import EvaluationWindows, parse_cutoff

CANONICAL = """
    COPY (
        SELECT
            row_number() OVER ()::VARCHAR AS event_id, user_id::VARCHAR AS user_id, event_type,
            ts::TIMESTAMPTZ AS occurred_at, ts::TIMESTAMPTZ AS ingested_at, item_id,
            left(item_id, 2) AS category, country AS location, NULL::VARCHAR AS context,
            quantity * price AS amount, NULL::SMALLINT[] AS codes, {bucket} AS user_bucket
        FROM read_parquet({source}) WHERE user_id IS NOT NULL
    ) TO {target}
"""


@pytest.mark.realdata
@pytest.mark.slow
def test_population_and_churn_of_the_shop(realdata: Path, settings: Settings, storage: Storage):
    target = new_load(storage, "history", 0, [], settings.num_buckets) / "events.parquet"
    source = quote_text(str(realdata / "online_retail_ii.parquet"))
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        bucket = user_bucket("user_id::VARCHAR", settings.num_buckets)
        connection.execute(
            CANONICAL.format(source=source, target=quote_text(str(target)), bucket=bucket)
        )
    cutoffs = parse_cutoff("2011-10-10"), parse_cutoff("2011-11-09")
    windows = EvaluationWindows(
        cutoffs[1], *cutoffs, horizon=timedelta(days=30), lookback=timedelta(days=180)
    )
    preset = make_preset(qualifying_event_types=["purchase"], horizon_days=30, lookback_days=180)
    build_warehouse(storage, settings, preset, windows)
    export_marts(storage, settings, windows)
    for cutoff, num_users, churn_rate in zip(
        cutoffs, (2984, 3245), (0.66287, 0.60894), strict=True
    ):
        churned = pq.read_table(storage.marts(cutoff) / "labels.parquet")["is_churned"].to_pylist()
        assert len(churned) == num_users
        assert sum(churned) / num_users == pytest.approx(churn_rate, abs=5e-6)
