"""The one entity: a user."""

from __future__ import annotations

from feast import Entity, ValueType

user = Entity(
    name="user",
    join_keys=["user_id"],
    value_type=ValueType.STRING,
    description="Who acted; the same id as in the canonical events.",
    tags={"owner": "behavior-pipeline"},
    owner="behavior-pipeline",
)
