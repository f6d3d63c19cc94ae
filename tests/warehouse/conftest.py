"""One warehouse built by dbt, and one set of compiled models, for all tests of this room."""

from __future__ import annotations

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
from behavior_pipeline.warehouse.build import build_warehouse
from behavior_pipeline.warehouse.export import export_marts
from behavior_pipeline.warehouse.plan import load_plan


@pytest.fixture(scope="session")
def small_settings() -> Settings:
    return Settings(memory_limit="1GB", threads=2, num_buckets=3, num_targets=5)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory, small_settings: Settings) -> Built:
    """A shop in a home with a troublesome name."""
    storage = Storage(tmp_path_factory.mktemp("warehouse") / "shop's {new} [home]")
    write_events(shop_events(), storage)
    windows = make_windows(LIVE_CUTOFF)
    progress: list[tuple[int, int, str]] = []
    summary = build_warehouse(
        storage,
        small_settings,
        make_preset(),
        windows,
        lambda done, total, name: progress.append((done, total, name)),
    )
    rows = export_marts(storage, small_settings, windows)
    plan = load_plan(storage, small_settings, make_preset(), windows)
    return Built(storage, small_settings, windows, rows, progress, plan, summary)


@pytest.fixture(scope="session")
def compiled(built: Built, tmp_path_factory: pytest.TempPathFactory) -> CompiledModels:
    """The models that dbt compiled for that warehouse, ready to run on any events."""
    return CompiledModels(tmp_path_factory.mktemp("compiled"), built.plan, built.windows)
