"""Features as of an earlier cutoff are those of a night that ended there."""

from __future__ import annotations

import pyarrow as pa
import pytest
from warehouse_builders import (
    LIVE_CUTOFF,
    TEST_CUTOFF,
    TRAIN_CUTOFF,
    Built,
    CompiledModels,
    make_preset,
    shop_events,
)

from behavior_pipeline.warehouse.past_aggregates import aggregates_at

USERS = ["user 01", "user 17", "user 42", "nobody"]


@pytest.mark.parametrize("cutoff", [TRAIN_CUTOFF, TEST_CUTOFF, LIVE_CUTOFF])
def test_past_aggregates_are_those_of_a_night_at_that_cutoff(
    built: Built, compiled: CompiledModels, cutoff
):
    found = aggregates_at(
        built.storage, built.settings, make_preset(), built.windows, cutoff, pa.array(USERS)
    )
    night = compiled.at_night(cutoff).run(shop_events())
    wanted = night.execute(
        "SELECT * FROM user_aggregates WHERE list_contains($users, user_id) ORDER BY user_id",
        {"users": USERS},
    ).to_arrow_table()
    assert found["user_id"].to_pylist() == USERS[:3]
    assert found.to_pylist() == wanted.select(found.column_names).to_pylist()
