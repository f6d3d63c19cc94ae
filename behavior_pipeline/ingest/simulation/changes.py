"""Changes that happen to the shop's records on a day, for studies of what notices them.

What users do stays the same: a change is of what is recorded of it from that day on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import date
from typing import Any

import numpy as np

from behavior_pipeline.ingest.simulation.lives import DAY_MS
from behavior_pipeline.ingest.simulation.rendering import EVENT_TYPES, Events


@dataclass(frozen=True)
class Change:
    """From a day on, a share of the events of a type is lost or is of another type.

    Attributes:
        since: first day.
        event_type: one of EVENT_TYPES.
        share: of its events, 0 to 1; each is drawn by itself.
        becomes: the type that they are recorded as; None if they are lost, as where tracking
            breaks.
    """

    since: date
    event_type: str
    share: float
    becomes: str | None = None

    def __post_init__(self) -> None:
        unknown = {self.event_type, self.becomes or self.event_type} - set(EVENT_TYPES)
        if unknown:
            raise ValueError(f"the shop has no event type {min(unknown)!r}")
        if not 0 <= self.share <= 1:
            raise ValueError(f"a share is between 0 and 1, not {self.share}")

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return vars(self) | {"since": self.since.isoformat()}


def apply_changes(
    rng: np.random.Generator, events: Events, changes: Sequence[Change], start: date
) -> Events:
    """Return a chunk's events with some changes, in order; events before them stay as they are.

    Args:
        rng: draws the events that change.
        events: by time.
        changes: applied one after the other.
        start: the simulation's first day.
    """
    for change in changes:
        events = _apply(rng, events, change, (change.since - start).days * DAY_MS)
    return events


def _apply(rng: np.random.Generator, events: Events, change: Change, since_ms: int) -> Events:
    """Apply one change."""
    is_drawn = rng.random(events.size) < change.share
    is_type = events.kind == EVENT_TYPES.index(change.event_type)
    hit = is_drawn & is_type & (events.time_ms >= since_ms)
    columns = {field.name: getattr(events, field.name) for field in fields(Events)}
    if change.becomes is None:
        return Events(**{name: column[~hit] for name, column in columns.items()})
    kind = np.where(hit, EVENT_TYPES.index(change.becomes), events.kind).astype(events.kind.dtype)
    return Events(**(columns | {"kind": kind}))
