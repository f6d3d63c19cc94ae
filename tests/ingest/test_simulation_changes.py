"""Changes of what a simulated shop records."""

from __future__ import annotations

from datetime import UTC, date, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from behavior_pipeline.ingest.simulation.changes import Change
from behavior_pipeline.ingest.simulator import is_simulated, simulate

START = date(2026, 4, 1)
SINCE = date(2026, 4, 20)
FEW = {"num_users": 60, "num_days": 40, "seed": 3, "start": START}


def events(folder: Path, *changes: Change) -> pa.Table:
    simulate(folder, **FEW, changes=changes)
    table = pq.read_table(folder, columns=["user_id", "event_type", "event_time"])
    return table.filter(pc.is_valid(table["event_time"]))


def counts(table: pa.Table, *, is_before: bool) -> dict[str, int]:
    since = pa.scalar(datetime(2026, 4, 20, tzinfo=UTC), table["event_time"].type)
    is_chosen = pc.less(table["event_time"], since)
    part = table.filter(is_chosen if is_before else pc.invert(is_chosen))
    found = part["event_type"].value_counts().to_pylist()
    return {row["values"]: row["counts"] for row in found if row["values"] is not None}


def test_a_type_whose_tracking_breaks_is_lost_from_that_day_on_alone(tmp_path: Path) -> None:
    calm = events(tmp_path / "calm")
    broken = events(tmp_path / "broken", Change(SINCE, "add_to_cart", 1.0))
    assert counts(broken, is_before=True) == counts(calm, is_before=True)
    after, usual = counts(broken, is_before=False), counts(calm, is_before=False)
    assert "add_to_cart" not in after
    del usual["add_to_cart"]
    assert after == pytest.approx(usual, rel=0.02)  # other rows lack their type


def test_another_mix_moves_a_share_of_a_type_to_another(tmp_path: Path) -> None:
    calm = counts(events(tmp_path / "calm"), is_before=False)
    mixed = counts(events(tmp_path / "mix", Change(SINCE, "view", 0.5, "search")), is_before=False)
    assert mixed["view"] == pytest.approx(calm["view"] / 2, rel=0.1)
    assert mixed["view"] + mixed["search"] == pytest.approx(calm["view"] + calm["search"], rel=0.01)


def test_a_changed_simulation_is_another_one(tmp_path: Path) -> None:
    events(tmp_path / "shop")
    first = (tmp_path / "shop" / "events-00000.parquet").read_bytes()
    assert is_simulated(tmp_path / "shop", **FEW)
    events(tmp_path / "shop", Change(SINCE, "view", 0.5))
    assert not is_simulated(tmp_path / "shop", **FEW)
    events(tmp_path / "shop")
    assert (tmp_path / "shop" / "events-00000.parquet").read_bytes() == first


def test_a_change_of_what_there_is_not() -> None:
    with pytest.raises(ValueError, match="no event type 'click'"):
        Change(SINCE, "click", 0.5)
    with pytest.raises(ValueError, match="between 0 and 1"):
        Change(SINCE, "view", 1.5)
