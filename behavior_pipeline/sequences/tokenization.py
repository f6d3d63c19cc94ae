"""Events become token sequences: a pure function from one table to another.

It needs whole histories of the users it is given, and no other user, so it runs on a bucket of
users as well as on all of them.
"""

from __future__ import annotations

from datetime import datetime
from typing import Final

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from behavior_pipeline.contracts import (
    NUM_SPECIAL_IDS,
    PAD_ID,
    SEQUENCES,
    TOKEN_FIELDS,
    UNKNOWN_ID,
)
from behavior_pipeline.sequences.vocabulary import VALUE_COLUMNS, Vocabulary

EVENT_COLUMNS: Final = (
    "user_id",
    "occurred_at",
    "event_id",
    "event_type",
    "item_id",
    "category",
    "location",
    "amount",
)
"""Columns of an event that its tokens are made of."""

_Places = npt.NDArray[np.int64]


def tokenize(
    events: pl.DataFrame, vocabulary: Vocabulary, cutoff: datetime, max_events: int
) -> pa.Table:
    """Turn events before the cutoff into one row of token lists per user.

    A user's events stand in the order (`occurred_at`, `event_id`); the newest `max_events` are
    kept. A field that the event does not have becomes `PAD_ID`, a value outside the vocabulary
    `UNKNOWN_ID`. Events of ignored types are no tokens; a user with no other event keeps a row
    with empty lists, `num_events` 0 and no times.

    Args:
        events: whole histories, in any order, with at least EVENT_COLUMNS.
        vocabulary: what the ids mean.
        cutoff: exclusive end of what is read; in UTC.
        max_events: longest list.

    Returns:
        A table under `contracts.SEQUENCES`, sorted by `user_id`. `num_events`, `first_event_at`
        and the first gap of a cut list are those of the whole token history.
    """
    past = _in_order(events.filter(pl.col("occurred_at") < cutoff).select(EVENT_COLUMNS))
    users, *_ = _runs(past["user_id"])
    kept = past
    if vocabulary.ignored_event_types:
        kept = past.filter(~pl.col("event_type").is_in(vocabulary.ignored_event_types))
    tokens = kept.select("user_id", "occurred_at", _gap_seconds(), *_token_ids(vocabulary))
    return _to_sequences(users.sort(), tokens, vocabulary, cutoff, max_events)


def _in_order(events: pl.DataFrame) -> pl.DataFrame:
    """Return events with each user's together and in order; sort them only if they are not."""
    user, time = pl.col("user_id"), pl.col("occurred_at")
    is_later = (time > time.shift(1)) | (
        (time == time.shift(1)) & (pl.col("event_id") > pl.col("event_id").shift(1))
    )
    checks = events.select(
        num_runs=(user != user.shift(1)).fill_null(value=True).sum(),
        num_users=user.n_unique(),
        in_order=(is_later | (user != user.shift(1))).fill_null(value=True).all(),
    ).row(0)
    is_ordered = checks[0] == checks[1] and checks[2]
    return events if is_ordered else events.sort("user_id", "occurred_at", "event_id")


def _runs(users: pl.Series) -> tuple[pl.Series, _Places, _Places]:
    """Return each run of equal users: who, where it begins and where it ends."""
    is_first = (users != users.shift(1)).fill_null(value=True)
    starts = np.asarray(is_first.arg_true(), dtype=np.int64)
    ends = np.append(starts, len(users))[1:]
    return users.gather(starts), starts, ends


def _gap_seconds() -> pl.Expr:
    """Seconds since the user's token before, 0 for the very first; rows must be in order."""
    is_first = pl.col("user_id").ne_missing(pl.col("user_id").shift(1))
    gap = pl.col("occurred_at").diff().dt.total_microseconds() / 1e6
    return pl.when(is_first).then(0.0).otherwise(gap).cast(pl.Float32).alias("gap_seconds")


def _token_ids(vocabulary: Vocabulary) -> list[pl.Expr]:
    """One column of ids per token field, named `<field>_ids`."""
    columns = {field: _value_ids(vocabulary, field) for field in VALUE_COLUMNS}
    columns["amount"] = _amount_ids(vocabulary.amount_edges)
    columns["hour"] = _hour_ids()
    return [columns[field].cast(pl.Int32).alias(f"{field}_ids") for field in TOKEN_FIELDS]


def _value_ids(vocabulary: Vocabulary, field: str) -> pl.Expr:
    """Ids of a field whose ids stand for values."""
    column = pl.col(VALUE_COLUMNS[field])
    known = column.cast(pl.Enum(vocabulary.values[field]), strict=False).to_physical()
    return _with_special_ids(column, known.cast(pl.Int32))


def _amount_ids(edges: tuple[float, ...] | None) -> pl.Expr:
    """Ids of the buckets of amounts: bucket k holds what is above k edges."""
    amount = pl.col("amount")
    if edges is None:
        return _with_special_ids(amount, pl.lit(None, pl.Int32))
    bucket = pl.lit(pl.Series(edges, dtype=pl.Float64)).search_sorted(amount, side="left")
    return _with_special_ids(amount, pl.when(amount.is_finite()).then(bucket.cast(pl.Int32)))


def _hour_ids() -> pl.Expr:
    """Ids of the hour of the week in UTC, Monday 00:00 first; every event has one."""
    at = pl.col("occurred_at").dt.convert_time_zone("UTC")
    return (at.dt.weekday().cast(pl.Int32) - 1) * 24 + at.dt.hour().cast(pl.Int32) + NUM_SPECIAL_IDS


def _with_special_ids(value: pl.Expr, known: pl.Expr) -> pl.Expr:
    """Shift known ids past the special ones; without a value PAD, without a known id UNKNOWN."""
    ids = (known + NUM_SPECIAL_IDS).fill_null(UNKNOWN_ID)
    return pl.when(value.is_null()).then(PAD_ID).otherwise(ids)


def _to_sequences(
    users: pl.Series,
    tokens: pl.DataFrame,
    vocabulary: Vocabulary,
    cutoff: datetime,
    max_events: int,
) -> pa.Table:
    """Cut tokens into one list per user; `users` is sorted, each user's tokens are together."""
    names, run_starts, run_ends = _runs(tokens["user_id"])
    places = np.asarray(users.search_sorted(names), dtype=np.int64)
    starts, ends = np.zeros((2, len(users)), np.int64)
    starts[places], ends[places] = run_starts, run_ends
    lengths = ends - starts
    kept, offsets = _newest(starts, ends, max_events)
    rows = tokens[kept].to_arrow()
    times = tokens["occurred_at"]
    columns: dict[str, pa.Array] = {
        "user_id": users.to_arrow(),
        "observation_cutoff": pa.repeat(pa.scalar(cutoff), len(users)),
        "vocabulary_id": pa.repeat(vocabulary.vocabulary_id, len(users)),
        "num_events": pa.array(lengths),
        "first_event_at": _times_at(times, starts, lengths),
        "last_event_at": _times_at(times, ends - 1, lengths),
    }
    for name in SEQUENCES.schema.names[len(columns) :]:
        values = rows[name].combine_chunks()
        columns[name] = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)
    return pa.table(columns).cast(SEQUENCES.schema)


def _newest(starts: _Places, ends: _Places, max_events: int) -> tuple[_Places, _Places]:
    """Return the places of each user's newest events, and where each user's list begins in them."""
    kept_starts = np.maximum(starts, ends - max_events)
    lengths = ends - kept_starts
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    places = np.arange(offsets[-1]) + np.repeat(kept_starts - offsets[:-1], lengths)
    return places, offsets


def _times_at(times: pl.Series, places: _Places, lengths: _Places) -> pa.Array:
    """Return the time at each user's place, null for a user without tokens."""
    known = pl.Series(places).set(pl.Series(lengths == 0), None)
    return times.gather(known).to_arrow()
