"""The five views of a user, all keyed by user and valid from their observation cutoff.

Views whose values depend on a checkpoint exist once per version: `user_embedding@v2` is never mixed
with `user_embedding@v1`, and `user_embedding` alone is the live one.

Columns are called as in the pipeline's contracts. Feast keeps timestamps to the second, online: the
published history is cut to the second as well, so that both stores say the same.
"""

from __future__ import annotations

from datetime import timedelta

from entities import user
from feast import FeatureView, Field, FileSource
from feast.types import (
    Array,
    Bool,
    FeastType,
    Float32,
    Float64,
    Int32,
    Int64,
    String,
    UnixTimestamp,
)
from sources import (
    embedding_files,
    prediction_files,
    rfm_files,
    segment_files,
    similar_users_files,
    version,
)

POINT_IN_TIME_TTL = timedelta(days=35)
"""Point-in-time joins: how long a value stands in for a missing newer one; a month and a bit."""

STALE_AFTER_DAYS = 7
"""Look-ups: a value so many days behind the newest published cutoff is flagged as stale."""

KEPT_DAYS = 28
"""Look-ups: a night looks at every embedding, and publishes those that changed; a row that still
holds keeps its cutoff for so many days. The view as a whole is stale after STALE_AFTER_DAYS."""


def _field(name: str, dtype: FeastType, description: str) -> Field:
    """Return a feature with its meaning."""
    return Field(name=name, dtype=dtype, description=description)


def _view(
    name: str,
    source: FileSource,
    description: str,
    *features: Field,
    is_versioned: bool = True,
    stale_after_days: int = STALE_AFTER_DAYS,
) -> FeatureView:
    """Return a view whose rows also say which cutoff they speak of."""
    return FeatureView(
        name=name,
        entities=[user],
        ttl=POINT_IN_TIME_TTL,
        schema=[
            _field("user_id", String, "the entity's key"),
            _field("cutoff_at", UnixTimestamp, "the values use events before this"),
            *features,
        ],
        source=source,
        version=f"v{version}" if is_versioned else "latest",
        online=True,
        description=description,
        tags={
            "stale_after_days": str(stale_after_days),
            "late_after_days": str(STALE_AFTER_DAYS),
        },
        owner="behavior-pipeline",
    )


user_embedding = _view(
    "user_embedding",
    embedding_files,
    "One reusable vector per user; the row of `__cold_start__` is the prior of unknown users.",
    _field("embedding", Array(Float32), "the user's vector; comparable within one checkpoint"),
    _field("checkpoint_id", String, "content hash of the encoder that wrote the vector"),
    _field("num_events", Int64, "length of the user's whole history before the cutoff"),
    _field("last_event_at", UnixTimestamp, "the newest event, to the second; null without one"),
    _field("is_cold_start", Bool, "no usable event before the cutoff: the vector is the prior"),
    stale_after_days=KEPT_DAYS,
)

user_rfm = _view(
    "user_rfm",
    rfm_files,
    "Recency, frequency and monetary value of every user with a qualifying event.",
    _field("recency_days", Float64, "whole hours since the last qualifying event, over 24"),
    _field("frequency", Int64, "distinct UTC days with a qualifying event"),
    _field("monetary", Float64, "sum of amounts of qualifying events, in the source's unit"),
    _field("is_in_population", Bool, "has a qualifying event inside the lookback"),
    is_versioned=False,
)

user_predictions = _view(
    "user_predictions",
    prediction_files,
    "Calibrated scores of every user of the population.",
    _field("churn_probability", Float32, "probability of no qualifying event in the horizon"),
    _field("top_target", String, "most likely propensity target"),
    _field("top_target_probability", Float32, "its probability"),
    _field("next_event_type", String, "most likely type of the next event"),
    _field("next_event_probability", Float32, "its probability"),
    _field("checkpoint_id", String, "encoder behind the scores"),
)

user_segment = _view(
    "user_segment",
    segment_files,
    "The segment of every user with an embedding.",
    _field("segment", Int32, "number of the segment; 0 is the largest"),
    _field("segment_name", String, "what sets the segment apart, in words"),
    _field("distance", Float32, "distance to the segment's centre"),
    _field("checkpoint_id", String, "encoder behind the embedding"),
)

similar_users = _view(
    "similar_users",
    similar_users_files,
    "The users most like each user, by the cosine of their embeddings.",
    _field("similar_user_ids", Array(String), "the nearest first, ties by id; empty if cold"),
    _field("similarities", Array(Float32), "the cosine of each, -1 to 1"),
    _field("checkpoint_id", String, "encoder behind the embeddings"),
)
