"""dbt alone, as an engineer runs it: the same tables, its own tests, a documented catalog."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from night_builders import bring, differences, night_preset, rows_at_once, rows_of, tombstone
from warehouse_builders import LIVE_CUTOFF, Built, make_windows, shop_events

from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage, read_json
from behavior_pipeline.warehouse.build import build_warehouse
from behavior_pipeline.warehouse.dbt import dbt_arguments, run_dbt
from behavior_pipeline.warehouse.variables import dbt_variables

WINDOWS = make_windows(LIVE_CUTOFF)
EVENTS = shop_events()


class Alone(NamedTuple):
    """A home that dbt alone has built, beside the pipeline's own warehouse."""

    storage: Storage
    database: Path
    work: Path
    lines: list[str]
    variables: dict[str, object]


@pytest.fixture(scope="module")
def alone(
    tmp_path_factory: pytest.TempPathFactory, small_settings: Settings, built: Built
) -> Alone:
    """A history and nights with a late event, a correction, a deletion and a second load."""
    folder = tmp_path_factory.mktemp("alone")
    storage = Storage(folder / "shop's [home]")
    storage.home.mkdir()
    plan = built.storage.home / "warehouse_plan.json"
    shutil.copyfile(plan, storage.home / plan.name)
    one, two, three, *_ = EVENTS
    bring(EVENTS, storage, small_settings)
    bring([one | {"amount": 1.0}, two], storage, small_settings, "2024-03-19")
    bring([one | {"amount": 2.0}, two], storage, small_settings, "2024-03-20")
    late = three | {"event_id": "late", "user_id": "user 01"}
    bring([late, tombstone(three["event_id"])], storage, small_settings, "2024-03-20")
    orphan = next((storage.events / "arrival=2024-03-20").glob("load=*"))
    shutil.copytree(orphan, orphan.with_name("load=killed"))  # a kill may leave an old load
    build_warehouse(storage, small_settings, night_preset(), WINDOWS)
    variables = dbt_variables(small_settings, night_preset(), storage, WINDOWS)
    database, work, lines = folder / "dbt.duckdb", folder / "work", []
    run_dbt(
        dbt_arguments("build", variables, work, database),
        lambda _done, _total, line: lines.append(line),
    )
    return Alone(storage, database, work, lines, variables)


def test_a_plain_build_gives_the_tables_of_the_pipeline(alone: Alone, built: Built) -> None:
    by_dbt = rows_of(alone.database, built.plan)
    assert differences(by_dbt, rows_of(alone.storage.warehouse, built.plan)) == []
    assert differences(by_dbt, rows_at_once(alone.storage, built.plan)) == []
    assert len(by_dbt["events_sessionized"]) == len(EVENTS)  # one was deleted, one was late


def test_a_plain_build_runs_every_data_and_unit_test(alone: Alone, built: Built) -> None:
    results = read_json(alone.work / "target" / "run_results.json")["results"]
    outcomes = {result["unique_id"]: result["status"] for result in results}
    kinds: dict[str, set[str]] = {}
    for node, status in outcomes.items():
        kinds.setdefault(node.split(".")[0], set()).add(status)
    assert kinds == {
        "operation": {"success"}, "model": {"success"}, "test": {"pass"}, "unit_test": {"pass"},
    }  # fmt: skip
    num_of = {kind: sum(node.startswith(f"{kind}.") for node in outcomes) for kind in kinds}
    manifest = read_json(alone.work / "target" / "manifest.json")
    assert num_of["model"] == len(built.plan.models)
    assert num_of["test"] == len(built.plan.tests)
    assert num_of["unit_test"] == len(manifest["unit_tests"]) >= 10


def test_the_catalog_describes_every_mart_and_column(alone: Alone, built: Built) -> None:
    run_dbt(["docs", *dbt_arguments("generate", alone.variables, alone.work, alone.database)])
    catalog = read_json(alone.work / "target" / "catalog.json")
    assert not catalog["errors"]
    manifest = read_json(alone.work / "target" / "manifest.json")
    found: dict[str, dict[str, Any]] = {
        node["metadata"]["name"]: node | manifest["nodes"][key]
        for key, node in catalog["nodes"].items()
    }
    assert set(found) == {model.name for model in built.plan.models}
    for model in built.plan.models:
        node, columns = found[model.name], catalog["nodes"][f"model.behavior_pipeline.{model.name}"]
        described = {name: said["description"] for name, said in node["columns"].items()}
        assert node["description"]
        assert columns["metadata"]["comment"] == node["description"]
        assert set(columns["columns"]) == set(described)
        assert all(described.values()), model.name
        assert {name: said["comment"] for name, said in columns["columns"].items()} == described
