"""A handful of events whose every mart was worked out by hand."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import duckdb
import pytest
from warehouse_builders import LIVE_CUTOFF, TEST_CUTOFF, TRAIN_CUTOFF, CompiledModels, event, rows

# The lookback of the train cutoff (2024-03-01) begins 2024-01-31, its window ends 2024-03-11.
# The test cutoff is 2024-03-11, the live one 2024-03-21: what becomes of it is not known yet.
EVENTS: list[dict[str, Any]] = [
    event("a1", "ann", "view", "2024-02-15 23:50", item_id="x", category="c1"),
    # exactly the session gap later, across midnight
    event("a2", "ann", "purchase", "2024-02-16 00:20", item_id="x", category="c1", amount=10.0),
    # at the same time
    event("a3", "ann", "purchase", "2024-02-16 00:20", item_id="y", category="c2", amount=5.5),
    # a microsecond more than the session gap later
    event("a4", "ann", "view", "2024-02-16 00:50:00.000001", item_id="y", category="c2"),
    # exactly at the train cutoff
    event("a5", "ann", "purchase", "2024-03-01 00:00", item_id="y", category="c2", amount=7.0),
    # exactly at the end of the train cutoff's label window
    event("a6", "ann", "purchase", "2024-03-11 00:00", item_id="x", category="c1", amount=1.0),
    # the last second before the lookback
    event("b1", "bob", "purchase", "2024-01-10 12:00", category="c9", amount=3.0),
    event("b2", "bob", "purchase", "2024-01-30 23:59:59", category="c9", amount=4.0),
    # the lookback's first instant; afterwards only a view
    event("c1", "cyd", "purchase", "2024-01-31 00:00", category="c2", amount=2.0),
    event("c2", "cyd", "view", "2024-03-05 08:00", category="c2"),
    # never qualifies
    event("d1", "dee", "view", "2024-02-01 10:00", category="c1"),
    # the end of the test cutoff's label window: completes it, and is outside
    event("e1", "eve", "purchase", "2024-03-21 00:00", category="c1", amount=50.0),
]


@pytest.fixture(scope="module")
def marts(compiled: CompiledModels) -> duckdb.DuckDBPyConnection:
    return compiled.run(EVENTS)


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def test_events_are_numbered_and_sessionized_in_total_order(marts: duckdb.DuckDBPyConnection):
    found = rows(
        marts,
        "SELECT event_id, event_number, gap_seconds, session_started_at FROM events_sessionized "
        "WHERE user_id = 'ann' ORDER BY event_number",
    )
    assert found == [
        ("a1", 1, None, at("2024-02-15 23:50")),
        ("a2", 2, 1800.0, at("2024-02-15 23:50")),
        ("a3", 3, 0.0, at("2024-02-15 23:50")),
        ("a4", 4, 1800.000001, at("2024-02-16 00:50:00.000001")),
        ("a5", 5, 1206599.999999, at("2024-03-01 00:00")),
        ("a6", 6, 864000.0, at("2024-03-11 00:00")),
    ]


def test_a_session_across_midnight_is_one(marts: duckdb.DuckDBPyConnection):
    found = rows(
        marts,
        "SELECT session_started_at, ended_at, duration_seconds, num_events, num_qualifying_events,"
        " num_items, num_event_types, amount, is_first_session, is_bounce "
        "FROM sessions WHERE user_id = 'ann' ORDER BY session_started_at LIMIT 2",
    )
    later = at("2024-02-16 00:50:00.000001")
    assert found == [
        (at("2024-02-15 23:50"), at("2024-02-16 00:20"), 1800.0, 3, 2, 2, 2, 15.5, True, False),
        (later, later, 0.0, 1, 0, 1, 1, 0.0, False, True),
    ]


def test_rfm(marts: duckdb.DuckDBPyConnection):
    found = rows(
        marts,
        "SELECT observation_cutoff, user_id, recency_days, frequency, monetary,"
        " last_qualifying_at, is_in_population FROM user_rfm ORDER BY ALL",
    )
    bought = at("2024-02-16 00:20")
    assert found == [
        (TRAIN_CUTOFF, "ann", 14.0, 1, 15.5, bought, True),
        (TRAIN_CUTOFF, "bob", 721 / 24, 2, 7.0, at("2024-01-30 23:59:59"), False),
        (TRAIN_CUTOFF, "cyd", 30.0, 1, 2.0, at("2024-01-31"), True),
        (TEST_CUTOFF, "ann", 10.0, 2, 22.5, at("2024-03-01"), True),
        (TEST_CUTOFF, "bob", 961 / 24, 2, 7.0, at("2024-01-30 23:59:59"), False),
        (TEST_CUTOFF, "cyd", 40.0, 1, 2.0, at("2024-01-31"), False),
        (LIVE_CUTOFF, "ann", 10.0, 3, 23.5, at("2024-03-11"), True),
        (LIVE_CUTOFF, "bob", 1201 / 24, 2, 7.0, at("2024-01-30 23:59:59"), False),
        (LIVE_CUTOFF, "cyd", 50.0, 1, 2.0, at("2024-01-31"), False),
    ]


def test_labels(marts: duckdb.DuckDBPyConnection):
    assert rows(marts, "SELECT * FROM labels ORDER BY ALL") == [
        (TRAIN_CUTOFF, "ann", False, 1, 7.0, "purchase"),
        (TRAIN_CUTOFF, "cyd", True, 0, 0.0, "view"),
        (TEST_CUTOFF, "ann", False, 1, 1.0, "purchase"),
    ]


def test_propensity(marts: duckdb.DuckDBPyConnection):
    assert rows(marts, "SELECT * FROM propensity_targets ORDER BY ALL") == [
        (1, "c2", 2),
        (2, "c1", 1),
    ]
    assert rows(marts, "SELECT * FROM propensity_labels ORDER BY ALL") == [
        (TRAIN_CUTOFF, "c2", "ann"),
        (TEST_CUTOFF, "c1", "ann"),
    ]


def test_aggregates_of_one_user(compiled: CompiledModels):
    """They are of the night's own cutoff alone, so the night is the train cutoff here."""
    (found,) = rows(
        compiled.at_night(TRAIN_CUTOFF).run(EVENTS),
        "SELECT num_events, num_events_7d, num_events_30d, num_active_days, num_sessions,"
        " num_qualifying_events_30d, amount_30d, num_items, top_category_share,"
        " repeat_item_share, mean_session_seconds, night_share, last_gap_seconds, recency_days,"
        " tenure_days, median_days_between_active_days "
        f"FROM user_aggregates WHERE user_id = 'ann' AND observation_cutoff = '{TRAIN_CUTOFF}'",
    )
    assert found == (
        *(4, 0, 4, 2, 2, 2, 15.5, 2, 0.5),
        *(0.5, 900.0, 1.0, 1800.000001, 14.0, 14 + 1 / 24, 1.0),
    )


@pytest.mark.parametrize("night", [TRAIN_CUTOFF, TEST_CUTOFF, LIVE_CUTOFF])
def test_aggregates_hold_everyone_with_an_event_and_no_null(
    compiled: CompiledModels, night: datetime
):
    marts = compiled.at_night(night).run(EVENTS)
    users = rows(
        marts,
        "SELECT observation_cutoff, string_agg(user_id, ' ' ORDER BY user_id) "
        "FROM user_aggregates GROUP BY ALL ORDER BY ALL",
    )
    assert users == [(night, "ann bob cyd dee")]
    table = marts.execute("SELECT * FROM user_aggregates").to_arrow_table()
    assert table.num_columns >= 92
    assert [name for name in table.column_names if table[name].null_count] == []


def test_of_several_cutoffs_the_nights_own_has_aggregates(marts: duckdb.DuckDBPyConnection):
    found = rows(marts, "SELECT DISTINCT observation_cutoff FROM user_aggregates")
    assert found == [(LIVE_CUTOFF,)]


def test_daily_activity(marts: duckdb.DuckDBPyConnection):
    found = rows(
        marts,
        "SELECT event_type, num_events, num_users, amount FROM daily_activity "
        "WHERE activity_date = '2024-02-16' ORDER BY ALL",
    )
    assert found == [("purchase", 2, 1, 15.5), ("view", 1, 1, 0.0)]


def test_a_night_at_the_end_of_the_data_knows_the_labels_before_it(compiled: CompiledModels):
    """The night's last event lies hours before the midnight that is its cutoff."""
    known = [row for row in EVENTS if row["occurred_at"] < LIVE_CUTOFF]
    with compiled.run(known) as connection:
        found = rows(
            connection,
            "SELECT observation_cutoff, user_id, is_churned FROM labels ORDER BY ALL",
        )
    assert found == [
        (TRAIN_CUTOFF, "ann", False),
        (TRAIN_CUTOFF, "cyd", True),
        (TEST_CUTOFF, "ann", False),
    ]
