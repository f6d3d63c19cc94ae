"""Nothing at or after the cutoff reaches a vocabulary or a token."""

from __future__ import annotations

import tempfile
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from sequence_builders import (
    CUTOFF,
    EventRow,
    event,
    event_lists,
    events_frame,
    write_events_sessionized,
)

from behavior_pipeline.sequences.files import sequence_files, write_sequences
from behavior_pipeline.sequences.vocabulary import Vocabulary, build_vocabulary
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage

ANCHOR = event("ann", 0, "anchor", "view", item_id="i1", amount=3.0)


def outputs(rows: list[EventRow]) -> tuple[Vocabulary, pa.Table]:
    """Vocabulary and sequences of a fresh home that holds these events."""
    settings = Settings(min_token_count=2, threads=1, memory_limit="200MB")
    with tempfile.TemporaryDirectory() as folder:
        storage = Storage(Path(folder))
        write_events_sessionized(storage, events_frame(rows), num_buckets=2)
        vocabulary = build_vocabulary(storage, settings, ("adjust",), CUTOFF)
        write_sequences(storage, settings, vocabulary, CUTOFF, storage.sequences(CUTOFF))
        files = sequence_files(storage.sequences(CUTOFF))
        return vocabulary, pa.concat_tables([pq.read_table(path) for path in files])


@hypothesis_settings(max_examples=20)
@given(past=event_lists(), future=event_lists(min_hours=480, max_hours=600, prefix="f"))
def test_the_future_changes_no_vocabulary_and_no_token(
    past: list[EventRow], future: list[EventRow]
):
    at_cutoff = {**ANCHOR, "event_id": "at", "occurred_at": CUTOFF, "event_type": "new"}
    vocabulary, sequences = outputs([ANCHOR, *past])
    with_future, with_future_sequences = outputs([ANCHOR, *past, *future, at_cutoff])
    assert with_future == vocabulary
    assert with_future.vocabulary_id == vocabulary.vocabulary_id
    assert with_future_sequences.equals(sequences)


def test_an_event_just_before_the_cutoff_does_count():
    just_before = {**ANCHOR, "event_id": "b", "occurred_at": CUTOFF - timedelta(microseconds=1)}
    vocabulary, sequences = outputs([ANCHOR, just_before])
    assert vocabulary.counts["action"] == (2,)
    assert sequences["num_events"].to_pylist() == [2]
