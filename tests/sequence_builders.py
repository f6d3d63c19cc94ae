"""Events, vocabularies and sequence files for the tests of several rooms."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import polars as pl
from hypothesis import strategies as st
from warehouse_builders import bucket_of

from behavior_pipeline.contracts import EVENTS_SESSIONIZED
from behavior_pipeline.layers import (
    CURRENT_FILE,
    EVENTS_FILE,
    USERS_FILE,
    Layer,
    Layers,
    bucket_file,
    point_to_layers,
    read_layers,
)
from behavior_pipeline.storage import Storage

START = datetime(2024, 1, 1, tzinfo=UTC)  # a Monday
CUTOFF = START + timedelta(days=20)

EventRow = dict[str, Any]


def event(
    user_id: str,
    hours: float,
    event_id: str,
    event_type: str = "view",
    **values: Any,
) -> EventRow:
    """One event, so many hours after START."""
    nothing = dict.fromkeys(("item_id", "category", "location", "amount"))
    occurred_at = START + timedelta(microseconds=round(hours * 3_600_000_000))
    known = {"user_id": user_id, "event_id": event_id, "event_type": event_type}
    return {**nothing, **known, "occurred_at": occurred_at, **values}


def events_frame(rows: Iterable[EventRow]) -> pl.DataFrame:
    """Events under the sessionized contract, in the order given; unused columns are null."""
    empty = pl.DataFrame(pl.from_arrow(EVENTS_SESSIONIZED.schema.empty_table()))
    names = set(EVENTS_SESSIONIZED.schema.names)
    given = pl.DataFrame([{n: row.get(n) for n in names} for row in rows], schema=empty.schema)
    return given.with_columns(pl.col("occurred_at").alias("ingested_at"))


def write_events_sessionized(
    storage: Storage, events: pl.DataFrame, num_buckets: int = 3
) -> Layers:
    """Write a base of all users and point to it, as a build of everybody does."""
    folder = storage.events_sessionized
    version = read_layers(folder).version + 1 if (folder / CURRENT_FILE).is_file() else 1
    layers = Layers(folder, Layer(uuid4().hex[:12], version), (), num_buckets)
    base = folder / f"base={layers.base.id}"
    base.mkdir(parents=True)
    bucketed = _bucketed(events, num_buckets)
    for number in range(num_buckets):
        bucketed.filter(user_bucket=number).write_parquet(base / bucket_file(number))
    point_to_layers(layers)
    return layers


def add_layer(storage: Storage, events: pl.DataFrame, users: Iterable[str]) -> Layers:
    """Add a layer with all events of some users, who may have none, and point to it."""
    known = read_layers(storage.events_sessionized)
    layer = Layer(uuid4().hex[:12], known.version + 1)
    layers = replace(known, layers=(*known.layers, layer))
    folder = layers.layer_folder(layer)
    folder.mkdir()
    wanted = pl.DataFrame({"user_id": sorted(users)}, schema={"user_id": pl.String})
    wanted.write_parquet(folder / USERS_FILE)
    own = _bucketed(events.join(wanted, on="user_id", how="semi"), known.num_buckets)
    own.write_parquet(folder / EVENTS_FILE)
    point_to_layers(layers)
    return layers


def _bucketed(events: pl.DataFrame, num_buckets: int) -> pl.DataFrame:
    """Return events with their bucket, each user's together and in order, users in no order."""
    bucket_of_user = {user: bucket_of(user, num_buckets) for user in events["user_id"].unique()}
    bucket = pl.col("user_id").replace_strict(bucket_of_user, return_dtype=pl.Int32)
    bucketed = events.with_columns(user_bucket=bucket if bucket_of_user else pl.lit(0, pl.Int32))
    order = pl.col("user_id").hash(seed=7)
    return bucketed.sort(order, "user_id", "occurred_at", "event_id")


@st.composite
def event_lists(
    draw: st.DrawFn, min_hours: int = 0, max_hours: int = 479, prefix: str = "e"
) -> list[EventRow]:
    """Events of few users with many ties in time; hours in [min_hours, max_hours] after START."""
    rows = draw(
        st.lists(
            st.tuples(
                st.sampled_from(["ann", "bob", "cäcilie", "dan"]),
                st.integers(min_hours, max_hours),
                st.sampled_from(["view", "view", "buy", "adjust"]),
                st.sampled_from([None, "i1", "i2", "i3", "i4"]),
                st.sampled_from([None, "c1", "c2"]),
                st.sampled_from([None, "", "north"]),
                st.sampled_from([None, -5.0, 0.0, -0.0, 1.5, 1e9]),
            ),
            max_size=25,
        )
    )
    return [
        event(user, hours, f"{prefix}{number}", kind, item_id=i, category=c, location=p, amount=a)
        for number, (user, hours, kind, i, c, p, a) in enumerate(rows)
    ]
