"""The warehouse's data tests as checks of its assets, through Dagster."""

from __future__ import annotations

from pathlib import Path

import dagster as dg
import pytest
from ingest_builders import SHOP
from warehouse_builders import LIVE_CUTOFF, shop_events, write_events

from behavior_pipeline.defs.resources import PipelineResource
from behavior_pipeline.defs.warehouse import CHECKS, warehouse
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage
from behavior_pipeline.windows import partition_of

NAMELESS = "events_sessionized_name_who_and_what"


@pytest.fixture
def resource(tmp_path: Path, settings: Settings) -> PipelineResource:
    """A shop whose events lie in canonical files already."""
    (tmp_path / "shop.yaml").write_text(SHOP)
    overrides = {"source": str(tmp_path / "shop.yaml"), "data_root": str(settings.data_root)}
    return PipelineResource(overrides=overrides | {"memory_limit": "1GB", "threads": 1})


def build(resource: PipelineResource) -> dg.ExecuteInProcessResult:
    return dg.materialize(
        [warehouse],
        resources={"pipeline": resource},
        partition_key=partition_of(LIVE_CUTOFF),
        raise_on_error=False,
    )


def test_the_page_shows_which_check_held_a_night_back(
    resource: PipelineResource, settings: Settings
) -> None:
    storage = Storage(settings.data_root / "shop")
    events = shop_events(num_users=6)
    write_events(events, storage)
    good = build(resource)
    assert good.success
    assert {check.check_name for check in good.get_asset_check_evaluations()} == set(CHECKS)
    assert all(check.passed for check in good.get_asset_check_evaluations())

    storage.warehouse.unlink()  # so that everybody is built
    write_events([*events[:-2], *({**event, "event_type": ""} for event in events[-2:])], storage)
    held = build(resource)
    assert not held.success
    failed = {
        check.check_name: check.metadata["num_failing_rows"].value
        for check in held.get_asset_check_evaluations()
        if not check.passed
    }
    assert failed == {NAMELESS: 2}
    assert len(held.get_asset_check_evaluations()) == len(CHECKS)
    assert not held.get_asset_materialization_events()
    assert not storage.warehouse.exists()
