"""Events, vocabularies and sequence files for the tests of several rooms."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl
from hypothesis import strategies as st

from behavior_pipeline.contracts import EVENTS_SESSIONIZED
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


def write_events_sessionized(storage: Storage, events: pl.DataFrame, num_buckets: int = 3) -> None:
    """Write `user_bucket=<k>/data_0.parquet`, replacing what was there."""
    bucket_of = {
        user: zlib.crc32(user.encode()) % num_buckets for user in events["user_id"].unique()
    }
    bucket = pl.col("user_id").replace_strict(bucket_of, return_dtype=pl.Int32)
    bucketed = events.with_columns(user_bucket=bucket if bucket_of else pl.lit(0))
    for number in range(num_buckets):
        folder = storage.events_sessionized / f"user_bucket={number}"
        folder.mkdir(parents=True, exist_ok=True)
        rows = bucketed.filter(user_bucket=number).sort("user_id", "occurred_at", "event_id")
        rows.write_parquet(folder / "data_0.parquet")


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
