"""What must hold for any events, checked on the compiled SQL."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import duckdb
from hypothesis import given, settings
from hypothesis import strategies as st
from warehouse_builders import INGESTED_AT, TEST_CUTOFF, TRAIN_CUTOFF, CompiledModels, rows

START = datetime(2024, 1, 20, tzinfo=UTC)
MARTS = (
    "events_sessionized", "sessions", "user_days", "user_rfm", "user_aggregates", "labels",
    "propensity_targets", "propensity_labels", "daily_activity", "rfm_segments", "session_funnel",
    "user_overview",
)  # fmt: skip

Event = dict[str, Any]


@st.composite
def event_lists(draw: st.DrawFn) -> list[Event]:
    """Events of a few users, many at the same time, some exactly at a cutoff."""
    times = st.one_of(
        st.sampled_from([TRAIN_CUTOFF, TEST_CUTOFF, START, TRAIN_CUTOFF - timedelta(days=30)]),
        st.integers(0, 70 * 48).map(lambda steps: START + timedelta(minutes=30 * steps)),
        st.integers(0, 70 * 86_400_000).map(lambda ms: START + timedelta(milliseconds=ms)),
    )
    fields = st.tuples(
        st.sampled_from("uvw"),
        st.sampled_from(("view", "purchase")),
        times,
        st.sampled_from((None, "i", "j", "k")),
        st.sampled_from((None, "c", "d")),
        st.one_of(st.none(), st.floats(-1e6, 1e6), st.sampled_from((0.1, 1e300, float("nan")))),
    )
    drawn = draw(st.lists(fields, min_size=1, max_size=40))
    return [_event(number, *values) for number, values in enumerate(drawn)]


def _event(
    number: int,
    user_id: str,
    event_type: str,
    occurred_at: datetime,
    item_id: str | None,
    category: str | None,
    amount: float | None,
) -> Event:
    return {
        "event_id": f"{number * 7919 % 1000:03}",
        "user_id": user_id,
        "event_type": event_type,
        "occurred_at": occurred_at,
        "ingested_at": INGESTED_AT,
        "item_id": item_id,
        "category": category,
        "amount": amount,
    }


def _features(connection: duckdb.DuckDBPyConnection) -> dict[str, list[tuple[Any, ...]]]:
    where = f"WHERE observation_cutoff = '{TRAIN_CUTOFF}' ORDER BY ALL"
    return {
        mart: rows(connection, f"SELECT * FROM {mart} {where}")
        for mart in ("user_rfm", "user_aggregates", "rfm_segments")
    }


@settings(max_examples=12)
@given(events=event_lists())
def test_events_from_the_cutoff_on_change_no_feature(
    compiled: CompiledModels, events: list[Event]
) -> None:
    known = [row for row in events if row["occurred_at"] < TRAIN_CUTOFF]
    night = compiled.at_night(TRAIN_CUTOFF)
    with night.run(known) as before, night.run(events) as after:
        assert _features(before) == _features(after)
        assert len(_features(after)["user_aggregates"]) == len({row["user_id"] for row in known})


@settings(max_examples=8)
@given(events=event_lists(), seed=st.integers(0, 1000))
def test_the_order_of_rows_changes_nothing(
    compiled: CompiledModels, events: list[Event], seed: int
) -> None:
    shuffled = random.Random(seed).sample(events, len(events))  # noqa: S311 - no secret
    with compiled.run(events) as one, compiled.run(shuffled) as other:
        for mart in MARTS:
            query = f"SELECT COLUMNS(*)::VARCHAR FROM {mart} ORDER BY ALL"
            assert rows(one, query) == rows(other, query), mart


@settings(max_examples=8)
@given(events=event_lists())
def test_an_event_that_arrives_again_changes_nothing(
    compiled: CompiledModels, events: list[Event]
) -> None:
    again = [row | {"ingested_at": INGESTED_AT + timedelta(days=1)} for row in events[::2]]
    with compiled.run(events) as one, compiled.run(events, again) as other:
        assert _all_rows(one) == _all_rows(other)


@settings(max_examples=8)
@given(events=event_lists())
def test_corrections_and_deletions_equal_a_history_that_says_so(
    compiled: CompiledModels, events: list[Event]
) -> None:
    corrected = [row | {"user_id": "w", "amount": 7.0, "state": 2} for row in events[::3]]
    deleted = [row | {"state": 0} for row in events[1::3]]
    mended = [row | {"state": 1} for row in [*corrected, *events[2::3]]]
    with (
        compiled.run(events, corrected[::2], [*corrected[1::2], *deleted]) as nights,
        compiled.run(mended) as at_once,
    ):
        assert _all_rows(nights) == _all_rows(at_once)


def _all_rows(connection: duckdb.DuckDBPyConnection) -> dict[str, list[tuple[Any, ...]]]:
    """Return the rows of every mart as texts, sorted."""
    query = "SELECT COLUMNS(*)::VARCHAR FROM {} ORDER BY ALL"
    return {mart: rows(connection, query.format(mart)) for mart in MARTS}


@settings(max_examples=12)
@given(events=event_lists())
def test_sessions_partition_the_events(compiled: CompiledModels, events: list[Event]) -> None:
    with compiled.run(events) as connection:
        (sums,) = rows(connection, "SELECT sum(num_events), count(*) FROM sessions")
        expected = _count_sessions(events)
        assert sums == (len(events), expected)
        (days,) = rows(connection, "SELECT sum(num_events), sum(num_sessions) FROM user_days")
        assert days == sums


def _count_sessions(events: list[Event]) -> int:
    """Count first events and gaps beyond the session gap, in plain Python."""
    count = 0
    for user_id in {row["user_id"] for row in events}:
        times = sorted(row["occurred_at"] for row in events if row["user_id"] == user_id)
        gaps = [later - earlier for earlier, later in pairwise(times)]
        count += 1 + sum(gap > timedelta(minutes=30) for gap in gaps)
    return count


@settings(max_examples=12)
@given(events=event_lists())
def test_rfm_and_labels_agree_with_plain_python(
    compiled: CompiledModels, events: list[Event]
) -> None:
    with compiled.run(events) as connection:
        found = rows(
            connection,
            "SELECT user_id, frequency, is_in_population FROM user_rfm "
            f"WHERE observation_cutoff = '{TRAIN_CUTOFF}' ORDER BY user_id",
        )
        churned = rows(
            connection,
            "SELECT user_id, is_churned FROM labels "
            f"WHERE observation_cutoff = '{TRAIN_CUTOFF}' ORDER BY user_id",
        )
    history, future = _purchases(events)
    population = {
        user: max(times) >= TRAIN_CUTOFF - timedelta(days=30) for user, times in history.items()
    }
    assert found == [
        (user, len({time.date() for time in times}), population[user])
        for user, times in sorted(history.items())
    ]
    users = sorted(user for user in population if population[user])
    assert churned == [(user, user not in future) for user in users]


def _purchases(events: list[Event]) -> tuple[dict[str, list[datetime]], set[str]]:
    """Return each buyer's times before the cutoff, and the buyers of the label window."""
    history: dict[str, list[datetime]] = {}
    future = set()
    for row in events:
        if row["event_type"] == "purchase" and row["occurred_at"] < TRAIN_CUTOFF:
            history.setdefault(row["user_id"], []).append(row["occurred_at"])
        elif row["event_type"] == "purchase" and row["occurred_at"] < TEST_CUTOFF:
            future.add(row["user_id"])
    return history, future
