"""One warehouse built by dbt, and one set of compiled models, for all tests of this room."""

from __future__ import annotations

import json

import pytest
from warehouse_builders import (
    LIVE_CUTOFF,
    Built,
    CompiledModels,
    make_preset,
    make_windows,
    shop_events,
    write_events,
)

from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage
from behavior_pipeline.warehouse.build import (
    dbt_arguments,
    run_dbt,
    swap_in_warehouse,
    warehouse_aside,
)
from behavior_pipeline.warehouse.export import export_marts
from behavior_pipeline.warehouse.variables import dbt_variables


@pytest.fixture(scope="session")
def small_settings() -> Settings:
    return Settings(memory_limit="1GB", threads=2, num_buckets=3, num_targets=5)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory, small_settings: Settings) -> Built:
    """A shop in a home with a troublesome name, built with every test that dbt knows."""
    storage = Storage(tmp_path_factory.mktemp("warehouse") / "shop's {new} [home]")
    write_events(shop_events(), storage.events)
    windows = make_windows(LIVE_CUTOFF)
    variables = dbt_variables(small_settings, make_preset(), storage, windows)
    progress: list[tuple[int, int, str]] = []
    with warehouse_aside(storage) as aside:
        arguments = dbt_arguments("build", variables | {"warehouse_path": str(aside)}, aside.parent)
        run_dbt(arguments, lambda done, total, name: progress.append((done, total, name)))
        manifest = json.loads((aside.parent / "target" / "manifest.json").read_text())
        swap_in_warehouse(storage, aside)
    rows = export_marts(storage, small_settings, windows)
    return Built(storage, small_settings, windows, rows, progress, manifest)


@pytest.fixture(scope="session")
def compiled(built: Built, tmp_path_factory: pytest.TempPathFactory) -> CompiledModels:
    """The models that dbt compiled for that warehouse, ready to run on any events."""
    return CompiledModels.read(built, tmp_path_factory.mktemp("compiled"))
