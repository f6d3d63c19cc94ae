from __future__ import annotations

from datetime import timedelta
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sequence_builders import CUTOFF, EventRow, event_lists, events_frame

from behavior_pipeline.embeddings.states import (
    KnownStates,
    fingerprints,
    from_vectors,
    silence_days,
    to_vectors,
)
from behavior_pipeline.encoder.sequence_files import read_table
from behavior_pipeline.sequences.tokenization import tokenize
from behavior_pipeline.sequences.vocabulary import Vocabulary

VOCABULARY = Vocabulary(
    values={"action": ("view", "buy"), "item": ("i1",), "category": ("c1",), "location": ()},
    counts={"action": (9, 8), "item": (5,), "category": (3,), "location": ()},
    amount_edges=(0.0,),
    ignored_event_types=("adjust",),
    trained_through=CUTOFF,
)
LISTS = ("action_ids", "item_ids", "category_ids", "location_ids", "amount_ids", "hour_ids")


def by_user(sequences: pa.Table) -> dict[str, bytes]:
    hashes = fingerprints(read_table(sequences, "test")).to_pylist()
    return dict(zip(sequences["user_id"].to_pylist(), hashes, strict=True))


def what_is_read(row: dict[str, Any]) -> tuple[Any, ...]:
    names = (*LISTS, "occurred_at", "gap_seconds", "num_events", "first_event_at")
    return tuple(str(row[name]) for name in names)


@hypothesis_settings(max_examples=40)
@given(event_lists(), event_lists(), st.integers(1, 4))
def test_fingerprints_are_equal_exactly_if_the_encoder_reads_the_same(
    one: list[EventRow], two: list[EventRow], max_events: int
):
    tables = [tokenize(events_frame(rows), VOCABULARY, CUTOFF, max_events) for rows in (one, two)]
    rows = [row for table in tables for row in table.to_pylist()]
    hashes = [value for table in tables for value in by_user(table).values()]
    contents = {what_is_read(row) for row in rows}
    assert len(set(hashes)) == len(contents)
    assert len(set(zip(map(what_is_read, rows), hashes, strict=True))) == len(contents)


@given(event_lists())
def test_a_later_cutoff_alone_changes_no_fingerprint(rows: list[EventRow]):
    later = CUTOFF + timedelta(days=9)
    tables = [tokenize(events_frame(rows), VOCABULARY, cutoff, 5) for cutoff in (CUTOFF, later)]
    assert by_user(tables[0]) == by_user(tables[1])


def test_states_are_found_by_user_and_fingerprint():
    prints = pa.array([b"a" * 16, b"b" * 16, b"c" * 16], pa.binary(16))
    states = np.arange(6, dtype=np.float32).reshape(3, 2)
    known = KnownStates(pa.array(["ann", "bob", "eve"]), prints, states)
    wanted = pa.array([b"c" * 16, b"x" * 16, b"a" * 16, b"b" * 16], pa.binary(16))
    users = pa.array(["eve", "bob", "new", "bob"])
    assert known.find(users, wanted).tolist() == [2, -1, -1, 1]
    assert KnownStates.none(2).find(users, wanted).tolist() == [-1] * 4


def test_vectors_go_through_arrow_unchanged():
    vectors = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    column = pa.chunked_array([from_vectors(vectors[:2]), from_vectors(vectors[2:])])
    assert to_vectors(column, 3).tobytes() == vectors.tobytes()
    assert to_vectors(column.slice(1, 3), 3).tobytes() == vectors[1:4].tobytes()


def test_silence_is_counted_in_days_up_to_the_cutoff():
    times = pa.chunked_array([pa.array([CUTOFF - timedelta(hours=36), None, CUTOFF])])
    assert silence_days(times, CUTOFF).tolist() == [1.5, 0.0, 0.0]
