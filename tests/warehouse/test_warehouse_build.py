from __future__ import annotations

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from warehouse_builders import Built, make_preset, make_windows, shop_events

from behavior_pipeline.contracts import CANONICAL_EVENTS
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage
from behavior_pipeline.warehouse.build import build_warehouse


def test_dbt_builds_and_every_test_of_its_own_passes(built: Built):
    done, total, _ = built.progress[-1]
    assert done == total == len(built.progress)
    assert built.storage.warehouse.is_file()


def test_nothing_is_left_beside_the_warehouse(built: Built):
    names = {path.name for path in built.storage.home.iterdir()}
    assert names == {"events", "marts", "scratch", "warehouse.duckdb"}
    assert list(built.storage.scratch.glob(".*")) == []


def test_every_relation_and_column_says_what_it_means(built: Built):
    with duckdb.connect(str(built.storage.warehouse), read_only=True) as connection:
        mute = connection.execute(
            "SELECT table_name, column_name FROM duckdb_columns() "
            "WHERE NOT internal AND comment IS NULL"
        ).fetchall()
        assert mute == []


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
    (storage.events / "arrival=first").mkdir(parents=True)
    pq.write_table(pa.table(broken), storage.events / "arrival=first" / "part.parquet")
    storage.warehouse.write_bytes(b"the old one")
    with pytest.raises(PipelineError, match="stg_events") as raised:
        build_warehouse(storage, settings, make_preset(), make_windows())
    assert "amount" in str(raised.value)
    assert storage.warehouse.read_bytes() == b"the old one"
    assert list(storage.scratch.glob(".*")) == []
