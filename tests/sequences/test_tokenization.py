from __future__ import annotations

import random
from datetime import timedelta
from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from sequence_builders import CUTOFF, START, EventRow, event, event_lists, events_frame

from behavior_pipeline.contracts import SEQUENCES, TOKEN_FIELDS
from behavior_pipeline.sequences.tokenization import tokenize
from behavior_pipeline.sequences.vocabulary import VALUE_COLUMNS, Vocabulary

PAD, UNKNOWN, FIRST = 0, 1, 4

VOCABULARY = Vocabulary(
    values={"action": ("view",), "item": ("i2", "i1"), "category": ("c1",), "location": ("",)},
    counts={"action": (9,), "item": (5, 4), "category": (3,), "location": (2,)},
    amount_edges=(-1.0, 0.0, 1.5),
    ignored_event_types=("adjust",),
    trained_through=CUTOFF,
)


def reference(rows: list[EventRow], vocabulary: Vocabulary, max_events: int) -> list[dict]:
    """Tokens by the shortest way to say it: user by user, event by event."""
    past = [row for row in rows if row["occurred_at"] < CUTOFF]
    return [
        reference_row(user, [row for row in past if row["user_id"] == user], vocabulary, max_events)
        for user in sorted({row["user_id"] for row in past})
    ]


def reference_row(
    user: str, rows: list[EventRow], vocabulary: Vocabulary, max_events: int
) -> dict[str, Any]:
    rows = [row for row in rows if row["event_type"] not in vocabulary.ignored_event_types]
    rows = sorted(rows, key=lambda row: (row["occurred_at"], row["event_id"]))
    times = [row["occurred_at"] for row in rows]
    gaps = [0.0] + [(b - a).total_seconds() for a, b in pairwise(times)]
    newest = slice(max(0, len(rows) - max_events), len(rows))
    return {
        "user_id": user,
        "observation_cutoff": CUTOFF,
        "vocabulary_id": vocabulary.vocabulary_id,
        "num_events": len(rows),
        "first_event_at": times[0] if times else None,
        "last_event_at": times[-1] if times else None,
        **{
            f"{field}_ids": [reference_id(field, row, vocabulary) for row in rows[newest]]
            for field in TOKEN_FIELDS
        },
        "gap_seconds": gaps[newest],
        "occurred_at": times[newest],
    }


def reference_id(field: str, row: EventRow, vocabulary: Vocabulary) -> int:
    if field == "hour":
        return FIRST + (row["occurred_at"] - START).days % 7 * 24 + row["occurred_at"].hour
    value = row["amount"] if field == "amount" else row[VALUE_COLUMNS[field]]
    if value is None:
        return PAD
    if field == "amount":
        return FIRST + sum(edge < value for edge in vocabulary.amount_edges or ())
    known = vocabulary.values[field]
    return FIRST + known.index(value) if value in known else UNKNOWN


def test_tokens_of_a_small_history_worked_out_by_hand():
    rows = [
        event("bob", 3, "2", "view", item_id="i1", category="c1", location="", amount=-1.0),
        event("bob", 1.5, "9", "buy", item_id="i9", category="c9", location="x", amount=-1.5),
        event("bob", 3, "1", "view", amount=0.1),
        event("bob", 2, "3", "adjust", item_id="i1"),
        event("ann", 1, "4", "adjust"),
        event("bob", 480, "5", "view"),  # at the cutoff
        event("eve", 480, "6", "view"),
    ]
    table = tokenize(events_frame(rows), VOCABULARY, CUTOFF, 10)
    assert table.schema.equals(SEQUENCES.schema, check_metadata=True)
    table.validate(full=True)
    ann, bob = table.to_pylist()
    assert (ann["user_id"], ann["num_events"]) == ("ann", 0)
    assert ann["first_event_at"] is None
    assert ann["last_event_at"] is None
    assert ann["action_ids"] == ann["gap_seconds"] == ann["occurred_at"] == []
    assert (bob["user_id"], bob["num_events"]) == ("bob", 3)
    assert bob["action_ids"] == [UNKNOWN, FIRST, FIRST]
    assert bob["item_ids"] == [UNKNOWN, PAD, FIRST + 1]
    assert bob["category_ids"] == [UNKNOWN, PAD, FIRST]
    assert bob["location_ids"] == [UNKNOWN, PAD, FIRST]
    assert bob["amount_ids"] == [FIRST, FIRST + 2, FIRST]
    assert bob["hour_ids"] == [FIRST + 1, FIRST + 3, FIRST + 3]
    assert bob["gap_seconds"] == [0.0, 5400.0, 0.0]
    assert bob["last_event_at"] == START + timedelta(hours=3)


def test_a_cut_history_keeps_its_newest_events_and_their_true_gaps():
    rows = [event("u", hours, str(hours)) for hours in (0, 1, 3, 6)]
    (row,) = tokenize(events_frame(rows), VOCABULARY, CUTOFF, 2).to_pylist()
    assert row["gap_seconds"] == [7200.0, 10800.0]
    assert row["num_events"] == 4
    assert row["first_event_at"] == START
    assert row["occurred_at"] == [START + timedelta(hours=3), START + timedelta(hours=6)]


def test_the_hour_of_week_ends_on_sunday_at_23():
    rows = [event("u", hours, str(hours)) for hours in (0, 23.99, 24, 167.5, 168)]
    (row,) = tokenize(events_frame(rows), VOCABULARY, CUTOFF, 10).to_pylist()
    assert [token - FIRST for token in row["hour_ids"]] == [0, 23, 24, 167, 0]


def test_amounts_that_are_no_numbers_or_were_never_seen_are_unknown():
    rows = [event("u", k, str(k), amount=a) for k, a in enumerate([float("nan"), float("inf"), 2])]
    (row,) = tokenize(events_frame(rows), VOCABULARY, CUTOFF, 10).to_pylist()
    assert row["amount_ids"] == [UNKNOWN, UNKNOWN, FIRST + 3]
    without = Vocabulary(VOCABULARY.values, VOCABULARY.counts, None, (), CUTOFF)
    rows = [event("u", 0, "1", amount=2), event("u", 1, "2")]
    (row,) = tokenize(events_frame(rows), without, CUTOFF, 10).to_pylist()
    assert row["amount_ids"] == [UNKNOWN, PAD]


def test_no_events_make_an_empty_table():
    table = tokenize(events_frame([]), VOCABULARY, CUTOFF, 10)
    assert table.num_rows == 0
    assert table.schema.equals(SEQUENCES.schema)


@given(event_lists(max_hours=500), st.integers(1, 6))
def test_tokens_equal_a_plain_reference(rows: list[EventRow], max_events: int):
    table = tokenize(events_frame(rows), VOCABULARY, CUTOFF, max_events)
    assert table.to_pylist() == reference(rows, VOCABULARY, max_events)


@given(event_lists(), st.randoms(use_true_random=False))
def test_the_order_of_rows_changes_nothing(rows: list[EventRow], rng: random.Random):
    shuffled = rng.sample(rows, len(rows))
    expected = tokenize(events_frame(rows), VOCABULARY, CUTOFF, 5)
    assert tokenize(events_frame(shuffled), VOCABULARY, CUTOFF, 5).equals(expected)


@given(event_lists(), st.data())
def test_a_user_alone_has_the_same_tokens_as_among_others(
    rows: list[EventRow], data: st.DataObject
):
    together = tokenize(events_frame(rows), VOCABULARY, CUTOFF, 5).to_pylist()
    if together:
        row = data.draw(st.sampled_from(together))
        alone = [event for event in rows if event["user_id"] == row["user_id"]]
        assert tokenize(events_frame(alone), VOCABULARY, CUTOFF, 5).to_pylist() == [row]
