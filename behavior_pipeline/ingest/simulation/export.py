"""Writes a chunk's events the way a shop exports them: raw columns, a few rows broken."""

from __future__ import annotations

from datetime import UTC, datetime, time
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from behavior_pipeline.contracts import TIMESTAMP
from behavior_pipeline.ingest.simulation.rendering import (
    EVENT_TYPES,
    HAS_PRICE,
    HAS_QUANTITY,
    PURCHASE,
    SEARCH,
    Events,
)
from behavior_pipeline.ingest.simulation.world import (
    CATEGORIES,
    DEVICES,
    NUM_REGIONS,
    Array,
    World,
)

BROKEN_SHARE: Final = 0.0005
BROKEN_COLUMNS: Final = ("user_id", "event_time", "event_type")
FIRST_EVENT_ID: Final = 10**15
EVENT_IDS_PER_CHUNK: Final = 10**9
USER_IDS_PER_CHUNK: Final = 10**6
ROW_GROUP_ROWS: Final = 131_072

SOURCE_SCHEMA: Final = pa.schema(
    [
        ("event_id", pa.int64()),
        ("user_id", pa.string()),
        ("event_type", pa.string()),
        ("event_time", TIMESTAMP),
        ("product_id", pa.string()),
        ("category", pa.string()),
        ("region", pa.string()),
        ("device", pa.string()),
        ("price", pa.float64()),
        ("quantity", pa.int32()),
        ("amount", pa.float64()),
    ]
)


def write_events(path: Path, table: pa.Table) -> None:
    """Write a chunk's rows; the same rows give the same bytes."""
    texts = [field.name for field in SOURCE_SCHEMA if pa.types.is_string(field.type)]
    pq.write_table(
        table,
        path,
        row_group_size=ROW_GROUP_ROWS,
        compression="zstd",
        compression_level=1,
        use_dictionary=[*texts, "price", "amount", "quantity"],
        column_encoding=dict.fromkeys(("event_id", "event_time"), "DELTA_BINARY_PACKED"),
        store_schema=False,  # readers see plain text columns, not Arrow's dictionaries
        version="2.6",
    )


def to_table(rng: np.random.Generator, world: World, chunk: int, events: Events) -> pa.Table:
    """Return a chunk's source rows, by time; text columns are dictionary-encoded.

    About `BROKEN_SHARE` of the rows lack their user, time or type, each as often.
    """
    lacks = _break_rows(rng, events.size)
    kind = events.kind
    has_price, has_quantity = HAS_PRICE[kind], HAS_QUANTITY[kind]
    product = pa.array([f"p{number:05d}" for number in range(world.item_offsets[-1])])
    regions = [f"region_{number:02d}" for number in range(1, NUM_REGIONS + 1)]
    columns: dict[str, Any] = {
        "event_id": FIRST_EVENT_ID + chunk * EVENT_IDS_PER_CHUNK + np.arange(events.size),
        "user_id": _texts(events.user, _user_ids(chunk, events.user), lacks[0]),
        "event_type": _texts(kind, EVENT_TYPES, lacks[2]),
        "event_time": _timestamps(world, events.time_ms, lacks[1]),
        "product_id": _texts(events.item, product, kind == SEARCH),
        "category": _texts(events.category, CATEGORIES),
        "region": _texts(events.region, regions),
        "device": _texts(events.device, DEVICES),
        "price": pa.array(events.cents / 100.0, mask=~has_price),
        "quantity": pa.array(events.quantity.astype(np.int32), mask=~has_quantity),
        "amount": pa.array(events.cents * events.quantity / 100.0, mask=kind != PURCHASE),
    }
    return pa.table(columns)


def _break_rows(rng: np.random.Generator, size: int) -> Array:
    """Return which rows lack user, time, type (3, E); a row lacks one at the most."""
    uniform = rng.random(size)
    part = np.floor(uniform / (BROKEN_SHARE / len(BROKEN_COLUMNS)))
    result: Array = part == np.arange(len(BROKEN_COLUMNS))[:, None]
    return result


def _user_ids(chunk: int, users: Array) -> list[str]:
    """Return the id of every user up to the highest; chunks have disjoint numbers."""
    first = chunk * USER_IDS_PER_CHUNK
    return [f"u{first + user:011d}" for user in range(int(users.max(initial=-1)) + 1)]


def _texts(indexes: Array, values: Any, is_null: Array | None = None) -> pa.DictionaryArray:
    """Return a dictionary-encoded text column (E,)."""
    places = pa.array(indexes.astype(np.int32), mask=is_null)
    return pa.DictionaryArray.from_arrays(places, pa.array(values, pa.string()))


def _timestamps(world: World, time_ms: Array, is_null: Array) -> pa.Array:
    """Return UTC timestamps in microseconds (E,)."""
    midnight = int(datetime.combine(world.start, time(), tzinfo=UTC).timestamp())
    return pa.array(midnight * 1_000_000 + time_ms * 1000, TIMESTAMP, mask=is_null)
