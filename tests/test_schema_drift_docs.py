"""The example of docs/schema_drift.md, loaded."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ingest_builders import load, quarantine

from behavior_pipeline.defs.drift_checks import _is_schema_as_known, _unseen_metadata
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.ingest.presets import parse_preset
from behavior_pipeline.ingest.schemas import read_schemas
from behavior_pipeline.ingest.unseen import find_unseen_types
from behavior_pipeline.pipeline import Pipeline
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage

DOCS = Path(__file__).parents[1] / "docs" / "schema_drift.md"
PRESET = """
name: my_shop
description: Orders and page views of our shop.
columns: {user_id: customer, event_type: action, occurred_at: at, item_id: sku, amount: price}
tasks: {qualifying_event_types: [order], propensity_column: item_id, horizon_days: 30,
  lookback_days: 180}
"""
HISTORY_TYPES = [*["view"] * 7, *["cart"] * 2, "order"]
NIGHT_TYPES = [*["view"] * 4, *["refund"] * 3, *["cart"] * 2, "order"]


def export(file: Path, day: int, types: list[str], num_rows: int, **changes: list[Any]) -> Path:
    """Write a day's file; a column that is changed to an empty list is left out."""
    rows, begin = range(num_rows), datetime(2024, 3, day, tzinfo=UTC)
    columns: dict[str, list[Any] | pa.Array] = {
        "customer": [number % 97 for number in rows],
        "action": [types[number % len(types)] for number in rows],
        "at": [begin + timedelta(seconds=number) for number in rows],
        "sku": [f"s{number % 50}" for number in rows],
        "price": pa.array([number % 9 for number in rows], pa.int32()),
        "referrer": ["web"] * num_rows,
        **changes,
    }
    pq.write_table(pa.table({name: values for name, values in columns.items() if values}), file)
    return file


def test_the_example_is_what_happens(tmp_path: Path, storage: Storage, settings: Settings) -> None:
    docs, preset = DOCS.read_text(), parse_preset(PRESET, "docs")
    first = export(tmp_path / "history.parquet", 1, HISTORY_TYPES, 10_000)
    load(first, storage, settings, preset=preset)
    night = export(
        tmp_path / "2024-03-05.parquet", 5, NIGHT_TYPES, 4_000,
        customer=[f"c-{number % 97}" for number in range(4_000)],
        price=["n/a" if number < 13 else str(number % 9) for number in range(4_000)],
        coupon=["SPRING"] * 4_000,
        referrer=[],
    )  # fmt: skip
    load(night, storage, settings, preset=preset, arrival="2024-03-05")
    reasons = [row["reason"] for row in quarantine(storage, "2024-03-05")]
    assert reasons == ["amount is not a number"] * 13
    check = _is_schema_as_known(Pipeline(settings, preset, storage), "2024-03-05")
    assert not check.passed
    assert str(check.metadata["drift"].value) in docs

    unseen = find_unseen_types(read_schemas(storage), "2024-03-05", HISTORY_TYPES, ())
    assert unseen.arrived_share == pytest.approx(0.3, abs=0.005)
    assert str(_unseen_metadata(unseen, 0.0, 0.01)["unseen_event_types"].value) in docs

    renamed = export(
        tmp_path / "2024-03-06.parquet", 6, HISTORY_TYPES, 40,
        price=[], referrer=[], cost=[1] * 40,
    )  # fmt: skip
    with pytest.raises(PipelineError) as caught:
        load(renamed, storage, settings, preset=preset, arrival="2024-03-06")
    assert str(caught.value).replace(f"{tmp_path}/", "") in docs
