"""Event types that an encoder's vocabulary does not know, in the arrivals up to a night.

A type that is a third of last night's arrivals is a thousandth of a year's tokens, so what raises
the alarm is its share of the night's arrivals.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from behavior_pipeline.ingest.schemas import KnownSchemas


@dataclass(frozen=True)
class UnseenType:
    """An event type without a token of its own.

    Attributes:
        event_type: its name.
        num_arrived: events of the night's arrival.
        num_so_far: events of all arrivals up to the night's.
        first_arrival: the oldest arrival that had it.
    """

    event_type: str
    num_arrived: int
    num_so_far: int
    first_arrival: str


@dataclass(frozen=True)
class UnseenTypes:
    """What of the night's arrival the vocabulary does not know.

    Attributes:
        arrived_share: share of unseen types among its events that become tokens; 0 without any
            such event, None if the arrival's event types are not recorded.
        types: unseen types of all arrivals up to the night's, most frequent in the night first.
    """

    arrived_share: float | None
    types: tuple[UnseenType, ...]


def find_unseen_types(
    known: KnownSchemas, arrival: str, seen: Collection[str], ignored: Collection[str]
) -> UnseenTypes:
    """Compare the event types of arrivals with a vocabulary.

    Args:
        known: what every arrival showed.
        arrival: the night's.
        seen: event types with a token.
        ignored: event types that become no tokens.
    """
    counts = {
        key: {
            name: count
            for name, count in (known.arrivals[key].event_types or {}).items()
            if name not in ignored
        }
        for key in known.up_to(arrival)
    }
    names = {name for found in counts.values() for name in found} - set(seen)
    types = [_unseen_type(name, arrival, counts) for name in names]
    types.sort(key=lambda unseen: (-unseen.num_arrived, -unseen.num_so_far, unseen.event_type))
    return UnseenTypes(_arrived_share(known, arrival, counts, names), tuple(types))


def _arrived_share(
    known: KnownSchemas, arrival: str, counts: dict[str, dict[str, int]], names: set[str]
) -> float | None:
    """Return the share of unseen types among an arrival's events, None if it is not recorded."""
    found = known.arrivals.get(arrival)
    if found is None or found.event_types is None:
        return None
    arrived = counts[arrival]
    unseen = sum(count for name, count in arrived.items() if name in names)
    return unseen / max(sum(arrived.values()), 1)


def _unseen_type(name: str, arrival: str, counts: dict[str, dict[str, int]]) -> UnseenType:
    """Count an event type; `counts` are in the order of arrivals."""
    having = [key for key, found in counts.items() if name in found]
    return UnseenType(
        name,
        counts.get(arrival, {}).get(name, 0),
        sum(counts[key][name] for key in having),
        having[0],
    )
