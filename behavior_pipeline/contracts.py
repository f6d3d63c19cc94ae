"""One Arrow schema per hop, with the sort order and the meaning of each column.

Stages hand each other Parquet files under these schemas and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import pyarrow as pa

TIMESTAMP: Final = pa.timestamp("us", tz="UTC")

PAD_ID: Final = 0  # padding, and a field that the event does not have
UNKNOWN_ID: Final = 1  # a value outside the vocabulary
MASK_ID: Final = 2  # a value hidden from the encoder
SUMMARY_ID: Final = 3  # CLS: reserved for a token that summarises the sequence
NUM_SPECIAL_IDS: Final = 4

TOKEN_FIELDS: Final = ("action", "item", "category", "location", "amount", "hour")
"""Categorical fields of a token, in order: event type, item, category, location, amount bucket,
hour of week (0 = Monday 00:00 UTC)."""


@dataclass(frozen=True)
class Contract:
    """A hop's schema, its total sort order and what each column means."""

    name: str
    schema: pa.Schema
    sort_order: tuple[str, ...]


def _contract(
    name: str, sort_order: tuple[str, ...], *columns: tuple[str, pa.DataType, str]
) -> Contract:
    """Build a contract whose fields carry their meaning as metadata."""
    fields = [
        pa.field(column, type_, metadata={"meaning": meaning}) for column, type_, meaning in columns
    ]
    return Contract(name, pa.schema(fields), sort_order)


CANONICAL_EVENTS: Final = _contract(
    "canonical_events",
    ("user_id", "occurred_at", "event_id"),  # of a night; a bulk load's files keep no order
    ("event_id", pa.string(), "given, or a hash of the source row and its repeat number"),
    ("user_id", pa.string(), "who acted; never null or empty"),
    ("event_type", pa.string(), "what was done; never null or empty"),
    ("occurred_at", TIMESTAMP, "when it happened"),
    ("ingested_at", TIMESTAMP, "when it arrived here"),
    ("item_id", pa.string(), "what it was done to"),
    ("category", pa.string(), "group of the item"),
    ("location", pa.string(), "where it was done"),
    ("context", pa.string(), "anything else worth a token, such as a device"),
    ("amount", pa.float64(), "quantity or money, in the source's unit"),
    ("codes", pa.list_(pa.int16()), "a quantised text or image"),
    ("user_bucket", pa.int32(), "stable hash of the user, 0 to number of buckets - 1"),
)

QUARANTINE: Final = _contract(
    "quarantine",
    ("source_file", "row_number"),
    ("source_file", pa.string(), "file that held the row"),
    ("row_number", pa.int64(), "place in the file, 1 for the first data row"),
    ("reason", pa.string(), "why it was rejected, in words"),
    ("column_name", pa.string(), "source column at fault"),
    ("raw_row", pa.string(), "the whole row as JSON, so that nothing is lost"),
    ("quarantined_at", TIMESTAMP, "when it was rejected"),
)

EVENTS_SESSIONIZED: Final = _contract(
    "events_sessionized",
    ("event_number",),  # each user's events stand together and in order; users in no order
    *[
        (field.name, field.type, field.metadata[b"meaning"].decode())
        for field in CANONICAL_EVENTS.schema
    ],
    ("event_number", pa.int64(), "place in the user's history, from 1"),
    ("gap_seconds", pa.float64(), "seconds since the user's previous event, null for the first"),
    ("session_started_at", TIMESTAMP, "start of the session; with user_id the session's key"),
)

VERSIONS: Final = _contract(
    "versions",
    ("event_id", "arrival"),
    ("event_id", pa.string(), "an id that more than one arrival holds, or that one deletes"),
    ("arrival", pa.string(), "an arrival that holds or deletes it"),
    ("load_id", pa.string(), "the load of the arrival that was looked at"),
    ("state", pa.uint64(), "hash of what the row says, 0 for a deletion"),
    ("ingested_at", TIMESTAMP, "when the row arrived here"),
)

CHANGES: Final = _contract(
    "changes",
    ("user_id", "activity_date"),
    ("user_id", pa.string(), "a user whose history the arrival changed"),
    ("activity_date", pa.date32(), "a UTC day on which it changed"),
)

USER_RFM: Final = _contract(
    "user_rfm",
    ("observation_cutoff", "user_id"),
    ("observation_cutoff", TIMESTAMP, "features use occurred_at < this"),
    ("user_id", pa.string(), "every user with a qualifying event before the cutoff"),
    ("recency_days", pa.float64(), "whole hours since the last qualifying event, over 24"),
    ("frequency", pa.int64(), "distinct UTC days with a qualifying event"),
    ("monetary", pa.float64(), "sum of amounts of qualifying events"),
    ("last_qualifying_at", TIMESTAMP, "time of the last qualifying event"),
    ("is_in_population", pa.bool_(), "has a qualifying event inside the lookback"),
)

LABELS: Final = _contract(
    "labels",
    ("observation_cutoff", "user_id"),
    ("observation_cutoff", TIMESTAMP, "start of the label window"),
    ("user_id", pa.string(), "every user of the population at the cutoff"),
    ("is_churned", pa.bool_(), "no qualifying event in the label window"),
    ("num_qualifying_events", pa.int64(), "qualifying events in the label window"),
    ("amount", pa.float64(), "sum of their amounts"),
    ("next_event_type", pa.string(), "type of the first event in the window, null if none"),
)

PROPENSITY_TARGETS: Final = _contract(
    "propensity_targets",
    ("target_rank",),
    ("target_rank", pa.int32(), "1 for the most frequent"),
    ("target", pa.string(), "value of the preset's propensity column"),
    ("num_events", pa.int64(), "qualifying events in the lookback before the train cutoff"),
)

PROPENSITY_LABELS: Final = _contract(
    "propensity_labels",
    ("observation_cutoff", "target", "user_id"),
    ("observation_cutoff", TIMESTAMP, "start of the label window"),
    ("target", pa.string(), "one of propensity_targets"),
    (
        "user_id",
        pa.string(),
        "user of the population with the target in the window: positives only",
    ),
)

SEQUENCES: Final = _contract(
    "sequences",
    ("user_id",),
    ("user_id", pa.string(), "one row per user with any event before the cutoff"),
    ("observation_cutoff", TIMESTAMP, "all events are before this"),
    ("vocabulary_id", pa.string(), "content hash of the vocabulary"),
    ("num_events", pa.int64(), "length of the whole history, also where the lists are cut"),
    ("first_event_at", TIMESTAMP, "start of the whole history, null without an event"),
    ("last_event_at", TIMESTAMP, "end of the history, null without an event"),
    *[
        (f"{field}_ids", pa.list_(pa.int32()), f"{field} token ids, newest last")
        for field in TOKEN_FIELDS
    ],
    ("gap_seconds", pa.list_(pa.float32()), "seconds since the event before; 0 for the very first"),
    ("occurred_at", pa.list_(TIMESTAMP), "time of each event"),
)


FINGERPRINT_BYTES: Final = 16


def state_schema(width: int) -> pa.Schema:
    """Return the schema of states of a width; one row per user, sorted by user_id.

    `fingerprint` is a hash of all that the state was computed from.
    """
    return pa.schema(
        [
            pa.field("user_id", pa.string()),
            pa.field("state", pa.list_(pa.float32(), width)),
            pa.field("num_events", pa.int64()),
            pa.field("last_event_at", TIMESTAMP),
            pa.field("fingerprint", pa.binary(FINGERPRINT_BYTES)),
            pa.field("checkpoint_id", pa.string()),
        ]
    )


def embedding_schema(width: int) -> pa.Schema:
    """Return the schema of embeddings of a width; one row per user and cutoff, sorted by user_id.

    A cold-start user (no usable event before the cutoff) carries the prior and the flag.
    """
    return pa.schema(
        [
            pa.field("user_id", pa.string()),
            pa.field("observation_cutoff", TIMESTAMP),
            pa.field("embedding", pa.list_(pa.float32(), width)),
            pa.field("checkpoint_id", pa.string()),
            pa.field("num_events", pa.int64()),
            pa.field("last_event_at", TIMESTAMP),
            pa.field("is_cold_start", pa.bool_()),
            pa.field("written_at", TIMESTAMP),
        ]
    )


PREDICTIONS: Final = _contract(
    "predictions",
    ("user_id",),
    ("user_id", pa.string(), "every user of the population at the cutoff"),
    ("observation_cutoff", TIMESTAMP, "scored as of this"),
    (
        "churn_probability",
        pa.float32(),
        "calibrated probability of no qualifying event in the horizon",
    ),
    ("top_target", pa.string(), "most likely propensity target"),
    ("top_target_probability", pa.float32(), "its probability"),
    ("next_event_type", pa.string(), "most likely type of the next event"),
    ("next_event_probability", pa.float32(), "its probability"),
    ("checkpoint_id", pa.string(), "encoder behind the scores"),
    ("written_at", TIMESTAMP, "when the row was written"),
)

SEGMENTS: Final = _contract(
    "segments",
    ("user_id",),
    ("user_id", pa.string(), "every user with an embedding at the cutoff"),
    ("observation_cutoff", TIMESTAMP, "as of this"),
    ("segment", pa.int32(), "0 is the largest segment"),
    ("segment_name", pa.string(), "what sets the segment apart, in words"),
    ("distance", pa.float32(), "distance to the segment's centre"),
    ("checkpoint_id", pa.string(), "encoder behind the embedding"),
    ("written_at", TIMESTAMP, "when the row was written"),
)

SIMILAR_USERS: Final = _contract(
    "similar_users",
    ("user_id",),
    ("user_id", pa.string(), "every user with an embedding at the cutoff"),
    ("observation_cutoff", TIMESTAMP, "as of this"),
    (
        "similar_user_ids",
        pa.list_(pa.string()),
        "the most similar users, the nearest first, ties by id; none for a cold-start user",
    ),
    (
        "similarities",
        pa.list_(pa.float32()),
        "cosine of the two embeddings, -1 to 1, of each of them",
    ),
    ("checkpoint_id", pa.string(), "encoder behind the embeddings"),
    ("written_at", TIMESTAMP, "when the row was written"),
)

COLD_START_USER: Final = "__cold_start__"
"""Reserved user id: its row carries the prior that a lookup of an unknown user returns."""
