from __future__ import annotations

from collections import Counter

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from warehouse_builders import Built, make_preset, make_windows, new_load, shop_events

from behavior_pipeline.contracts import CANONICAL_EVENTS
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage
from behavior_pipeline.warehouse.build import build_warehouse


def test_dbt_builds_and_every_test_of_its_own_passes(built: Built):
    (compiling, *steps) = built.progress
    assert compiling == (0, 1, "compiling the models")
    total = len(steps)
    assert [(done, of) for done, of, _ in steps] == [(n, total) for n in range(1, total + 1)]
    buckets = Counter(name.split(": ")[-1] for _, _, name in steps)
    num_buckets = built.settings.num_buckets
    expected = {model.name: num_buckets for model in built.plan.of_grain("user")}
    expected |= {model.name: num_buckets + 1 for model in built.plan.of_grain("sum")}  # the total
    assert {name: count for name, count in buckets.items() if count > 1} == expected
    assert set(buckets) == {model.name for model in built.plan.models}
    assert built.storage.warehouse.is_file()
    assert len(built.plan.tests) >= 15
    assert built.summary.failures == {test.name: 0 for test in built.plan.tests}
    assert built.summary.rebuilt == "there is no warehouse yet"


def test_nothing_is_left_beside_the_warehouse(built: Built):
    names = {path.name for path in built.storage.home.iterdir()}
    assert names == {
        ".writer.lock", "events", "marts", "scratch", "warehouse.duckdb", "warehouse_plan.json",
    }  # fmt: skip
    assert list(built.storage.scratch.glob(".*")) == []


def test_every_relation_and_column_says_what_it_means(built: Built):
    with duckdb.connect(str(built.storage.warehouse), read_only=True) as connection:
        mute = connection.execute(
            "SELECT table_name, column_name FROM duckdb_columns() "
            "WHERE NOT internal AND comment IS NULL AND schema_name = 'main'"
        ).fetchall()
        described = connection.execute(
            "SELECT table_name, comment FROM duckdb_tables() WHERE schema_name = 'main' "
            "UNION ALL SELECT view_name, comment FROM duckdb_views() "
            "WHERE NOT internal AND schema_name = 'main'"
        ).fetchall()
    assert mute == []
    assert dict(described) == {model.name: model.description for model in built.plan.models}
    assert all(dict(described).values())


def test_all_events_are_in_the_warehouse_with_no_type_qualified_by_mistake(built: Built):
    events = shop_events()
    with duckdb.connect(str(built.storage.warehouse), read_only=True) as connection:
        found = connection.execute(
            "SELECT sum(num_events), sum(num_qualifying_events) FROM sessions"
        ).fetchone()
    assert found == (len(events), sum("purchase" in row["event_type"] for row in events))


def test_without_events_the_message_says_so(settings: Settings, storage: Storage):
    with pytest.raises(PipelineError, match="no events"):
        build_warehouse(storage, settings, make_preset(), make_windows())


def test_a_failed_build_names_the_model_and_leaves_the_old_warehouse(
    settings: Settings, storage: Storage
):
    broken = CANONICAL_EVENTS.schema.empty_table().drop_columns(["amount"])
    folder = new_load(storage, "history", 0, [], settings.num_buckets)
    pq.write_table(pa.table(broken), folder / "events.parquet")
    storage.warehouse.write_bytes(b"the old one")
    with pytest.raises(PipelineError, match="stg_events") as raised:
        build_warehouse(storage, settings, make_preset(), make_windows())
    assert "amount" in str(raised.value)
    assert storage.warehouse.read_bytes() == b"the old one"
    assert list(storage.scratch.glob(".*")) == []
