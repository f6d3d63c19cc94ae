"""What counts, said again in plain Python: no SQL, no layers, no memory of what was done before."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import groupby
from typing import NamedTuple

from history_builders import COLUMNS, HISTORY, Row

SESSION_GAP = timedelta(seconds=1800)


class Event(NamedTuple):
    """What a row says; in the order in which the greatest of two rows is found."""

    user_id: str
    event_type: str
    occurred_at: datetime
    item_id: str | None
    category: str | None
    amount: float | None


class Counted(NamedTuple):
    """An event that counts, with the time at which it first came like that."""

    event_id: str
    event: Event
    ingested_at: datetime


class Sessionized(NamedTuple):
    """An event in its user's history."""

    counted: Counted
    event_number: int
    gap_seconds: float | None
    session_started_at: datetime


@dataclass(frozen=True)
class Content:
    """What an arrival says: events and deletions by id, what its files were like, when it came."""

    events: dict[str, Event]
    deletions: frozenset[str]
    num_rows: int
    num_quarantined: int
    event_types: frozenset[str]
    times: dict[str, datetime] = field(default_factory=dict, compare=False)


def read_content(parts: Sequence[Sequence[Row]], *, has_ids: bool) -> Content:
    """Read an arrival's files, in the order of their names."""
    rows = [
        (number, dict(zip(COLUMNS, row, strict=True)))
        for number, part in enumerate(parts)
        for row in part
    ]
    judged = [(number, row, _is_tombstone(row) and has_ids, _event(row)) for number, row in rows]
    good = [each for each in judged if (each[2] or each[3]) and (each[1]["id"] or not has_ids)]
    given = _by_given_id(good) if has_ids else _by_content(good)
    return Content(
        events={key: event for key, event in given.items() if event is not None},
        deletions=frozenset(key for key, event in given.items() if event is None),
        num_rows=len(rows),
        num_quarantined=len(rows) - len(good),
        event_types=frozenset(each[3].event_type for each in good if each[3] and not each[2]),
    )


_Judged = tuple[int, dict[str, str | None], bool, Event | None]


def _by_given_id(good: Sequence[_Judged]) -> dict[str, Event | None]:
    """Of each id the last file's row, a tombstone first, then the greatest."""
    found: dict[str, tuple[object, Event | None]] = {}
    for number, row, is_tombstone, event in good:
        said = None if is_tombstone else event
        key = (number, is_tombstone, _rank(said))
        name = str(row["id"])
        if name not in found or found[name][0] < key:  # type: ignore[operator]
            found[name] = (key, said)
    return {name: event for name, (_, event) in found.items()}


def _rank(event: Event | None) -> tuple[object, ...]:
    """Sort events by their columns, with nothing before everything."""
    return tuple(
        (value is not None, value) if value is not None else (False,) for value in event or ()
    )


def _by_content(good: Sequence[_Judged]) -> dict[str, Event | None]:
    """Identical rows are as many events; ids come from what the row holds and its number."""
    events: dict[str, Event | None] = {}
    counts: dict[str, int] = {}
    for _, row, _, event in good:
        texts = [(name, value) for name, value in sorted(row.items()) if value]
        content = ",".join(f"{name}:{len(value.encode())}:{value}" for name, value in texts)
        first = _md5(content)
        counts[first] = counts.get(first, 0) + 1
        events[first if counts[first] == 1 else _md5(f"{first}:{counts[first]}")] = event
    return events


def _md5(text: str) -> str:
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def _is_tombstone(row: Mapping[str, str | None]) -> bool:
    return row["gone"] == "x"


def _event(row: Mapping[str, str | None]) -> Event | None:
    """Read a row; None if it breaks the contract."""
    who, what, at, price = row["who"], row["what"], row["at"], row["price"]
    if not who or not what or not at:
        return None
    try:
        occurred_at = datetime.fromisoformat(at).replace(tzinfo=UTC)
    except ValueError:
        return None
    amount = float(price) if price else None
    return Event(who, what, occurred_at, row["sku"], row["kind"], amount)


def is_refused(arrival: str, content: Content, known: Content | None) -> bool:
    """Tell whether a load must be refused: nothing to read, nothing to learn, a history lost."""
    if not content.num_rows:
        return True
    if arrival != HISTORY:
        return False
    lost = known is not None and set(known.events) - set(content.events) - content.deletions
    return bool(lost) or len(content.event_types) == 1


def keep_times(content: Content, known: Content | None, now: datetime) -> Content:
    """Give each event its time: now, or that of the load before, if it held the event as it is."""
    held = known or Content({}, frozenset(), 0, 0, frozenset())
    times = {
        name: held.times[name] if held.events.get(name) == event else now
        for name, event in content.events.items()
    }
    return replace(content, times=times)


def count_events(loaded: Mapping[str, Content]) -> dict[str, Counted]:
    """Of each id the newest arrival's event, unless that deletes it."""
    counted: dict[str, Event] = {}
    for arrival in sorted(loaded, key=lambda key: "" if key == HISTORY else key):
        for name in loaded[arrival].deletions:
            counted.pop(name, None)
        counted |= loaded[arrival].events
    return {
        name: Counted(name, event, _first_time(name, event, loaded))
        for name, event in counted.items()
    }


def _first_time(name: str, event: Event, loaded: Mapping[str, Content]) -> datetime:
    """Return the earliest time of those arrivals that say the same of the id."""
    contents = loaded.values()
    return min(each.times[name] for each in contents if each.events.get(name) == event)


def users_changed(before: Mapping[str, Counted], after: Mapping[str, Counted]) -> set[str]:
    """Return the users of whom an event counts that did not, or the other way round."""
    return {each.event.user_id for each in set(before.values()) ^ set(after.values())}


def sessionize(counted: Mapping[str, Counted]) -> dict[str, Sessionized]:
    """Put each user's events in order, with gaps and sessions; by id."""
    ordered = sorted(
        counted.values(),
        key=lambda each: (each.event.user_id, each.event.occurred_at, each.event_id),
    )
    found = {}
    for _, history in groupby(ordered, key=lambda each: each.event.user_id):
        previous, started = None, None
        for number, each in enumerate(history, start=1):
            at = each.event.occurred_at
            gap = at - previous if previous else None
            if started is None or gap is None or gap > SESSION_GAP:
                started = at
            seconds = None if gap is None else gap / timedelta(seconds=1)
            found[each.event_id] = Sessionized(each, number, seconds, started)
            previous = at
    return found
