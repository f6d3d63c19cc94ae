"""Arrivals on disk: what each load left behind, and which load of an arrival counts.

An arrival is named `history` (a bulk load) or after its day. Every load of it writes a folder of
its own, `events/arrival=<key>/load=<id>/`, named after its content; `load.json` beside it points to
the one that counts and is replaced in one rename, so an arrival is always whole. A load with the
content of the one before it changes nothing.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from behavior_pipeline.contracts import CANONICAL_EVENTS
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.storage import Storage, read_json, write_json
from behavior_pipeline.windows import midnight

HISTORY: Final = "history"
"""The arrival of a bulk load; it comes before all days."""

LOAD_FILE: Final = "load.json"
DELETIONS_FILE: Final = "deletions.parquet"
VERSIONS_FILE: Final = "versions.parquet"
CHANGES_FILE: Final = "changes.parquet"
QUARANTINE_FILE: Final = "quarantine.parquet"
_LAYOUT_FILE: Final = "layout.json"

EVENT_COLUMNS: Final = tuple(
    name for name in CANONICAL_EVENTS.schema.names if name not in {"ingested_at", "user_bucket"}
)
"""What a row itself says; the others say when it came and where it lies."""


@dataclass(frozen=True)
class LoadSummary:
    """What a load did; stored + duplicates + deletions + quarantined + suppressed = read.

    Attributes:
        num_read: data rows read, malformed lines included.
        num_accepted: rows that keep the contract, tombstones included.
        num_stored: events of this arrival on disk.
        num_duplicates: accepted rows that repeat another row of this load, and were kept once.
        num_known: stored events that another arrival holds with the same content.
        num_corrected: stored events that another arrival holds with other content.
        num_deletions: ids that this arrival deletes.
        num_quarantined: rows that break the contract.
        num_users: distinct users of stored events.
        num_users_touched: users whose history this load changed.
        first_event_at, last_event_at: span of stored events, None without any.
        reasons: quarantined rows by reason.
        late: of a day's new events, how many by age in days (`same day`, `1 day`, …).
        drift: what changed in the source's schema, gravest first.
        num_suppressed: rows of erased users, passed over or removed since.
    """

    num_read: int
    num_accepted: int
    num_stored: int
    num_duplicates: int
    num_known: int
    num_corrected: int
    num_deletions: int
    num_quarantined: int
    num_users: int
    num_users_touched: int
    first_event_at: datetime | None
    last_event_at: datetime | None
    reasons: dict[str, int]
    late: dict[str, int]
    drift: list[str] = field(default_factory=list)
    num_suppressed: int = 0

    @property
    def num_inserted(self) -> int:
        """Events that no other arrival holds as they are."""
        return self.num_stored - self.num_known

    @property
    def num_repeated(self) -> int:
        """Accepted rows that said nothing new."""
        return self.num_duplicates + self.num_known


@dataclass(frozen=True)
class Arrival:
    """The load of an arrival that counts.

    Attributes:
        key: `history`, or `YYYY-MM-DD`.
        load_id: hash of the content and of the load before it, so no two loads share it.
        content_id: hash of the content: events, deletions and quarantined rows.
        events_id: hash of its events and deletions alone.
        folder: holds the files of the load.
        is_bucketed: whether there is a file per bucket of users instead of one for all.
        changes_everything: whether the load counts as touching every user.
    """

    key: str
    load_id: str
    content_id: str
    events_id: str
    folder: Path
    is_bucketed: bool
    changes_everything: bool

    def event_files(self, bucket: int | None = None) -> list[Path]:
        """Return the files of events that may hold users of a bucket, or of any."""
        pattern = "events*.parquet"
        if self.is_bucketed and bucket is not None:
            pattern = f"events-{bucket:04d}-*.parquet"
        return sorted(self.folder.glob(pattern))

    @property
    def rank(self) -> str:
        """Sorts arrivals from old to new: the history, then the days."""
        return arrival_rank(self.key)


@dataclass(frozen=True)
class EventsSpan:
    """How many events there are, and from when to when.

    Attributes:
        num_events: events of all arrivals.
        first_event_at, last_event_at: over all of them.
        known_through: the midnight up to which arrivals are complete: the end of the newest
            arrival's day, or the last event if that is later.
    """

    num_events: int
    first_event_at: datetime
    last_event_at: datetime
    known_through: datetime


def arrival_rank(key: str) -> str:
    """Return a text that sorts arrivals from old to new."""
    return "" if key == HISTORY else key


def arrival_folder(parent: Path, arrival: str) -> Path:
    """Return the folder of an arrival."""
    return parent / f"arrival={arrival}"


def load_document(storage: Storage, arrival: str) -> dict[str, Any] | None:
    """Return what is recorded of the load of an arrival that counts, None if there is none."""
    file = arrival_folder(storage.events, arrival) / LOAD_FILE
    return read_json(file) if file.is_file() else None


def find_arrival(storage: Storage, arrival: str) -> Arrival | None:
    """Return the load of an arrival that counts, None if it was never loaded."""
    document = load_document(storage, arrival)
    if document is None:
        return None
    folder = arrival_folder(storage.events, arrival) / f"load={document['load_id']}"
    return Arrival(
        arrival,
        document["load_id"],
        document["content_id"],
        document["events_id"],
        folder,
        document["is_bucketed"],
        document["changes_everything"],
    )


def loaded_arrivals(storage: Storage) -> list[Arrival]:
    """Return all arrivals, from old to new."""
    keys = [path.parent.name.partition("=")[2] for path in storage.events.glob(f"*/{LOAD_FILE}")]
    found = [find_arrival(storage, key) for key in sorted(keys, key=arrival_rank)]
    return [arrival for arrival in found if arrival is not None]


def other_arrivals(storage: Storage, arrival: str) -> list[Arrival]:
    """Return all arrivals but one, from old to new."""
    return [other for other in loaded_arrivals(storage) if other.key != arrival]


def num_buckets(storage: Storage, wanted: int) -> int:
    """Return the number of buckets that a home's users are in: its first load settled it."""
    layout = storage.events / _LAYOUT_FILE
    return int(read_json(layout)["num_buckets"]) if layout.is_file() else wanted


def commit_load(
    storage: Storage, arrival: str, load_id: str, summary: LoadSummary, document: dict[str, Any]
) -> None:
    """Let a finished load count from now on, and remove the loads before it."""
    folder = arrival_folder(storage.events, arrival)
    if not (storage.events / _LAYOUT_FILE).is_file():
        write_json(storage.events / _LAYOUT_FILE, {"num_buckets": document["num_buckets"]})
    content = asdict(summary) | document | {"arrival": arrival, "load_id": load_id}
    write_json(folder / LOAD_FILE, content)
    for parent in (folder, arrival_folder(storage.quarantine, arrival)):
        for old in parent.glob("load=*"):
            if old.name != f"load={load_id}":
                shutil.rmtree(old, ignore_errors=True)


def events_span(storage: Storage) -> EventsSpan:
    """Return the number and the span of all events, as their loads recorded them.

    Raises:
        PipelineError: if no events were loaded.
    """
    documents = [
        document
        for arrival in loaded_arrivals(storage)
        if (document := load_document(storage, arrival.key))
    ]
    spans = [
        (_time(document["first_event_at"]), _time(document["last_event_at"]))
        for document in documents
        if document["num_stored"]
    ]
    if not spans:
        raise PipelineError(
            f"No events are loaded in '{storage.home}'.",
            "Load some first: behavior-pipeline run --source … --path …",
        )
    last = max(end for _, end in spans)
    days = [document["arrival"] for document in documents if document["arrival"] != HISTORY]
    ends = [midnight(date.fromisoformat(day)) + timedelta(days=1) for day in days if _is_day(day)]
    return EventsSpan(
        num_events=sum(document["num_stored"] - document["num_known"] for document in documents),
        first_event_at=min(begin for begin, _ in spans),
        last_event_at=last,
        known_through=max([last, *ends]),
    )


def _time(text: str) -> datetime:
    """Read a recorded time."""
    return datetime.fromisoformat(text).astimezone(UTC)


def _is_day(key: str) -> bool:
    """Tell an arrival of a day from one with another name."""
    try:
        date.fromisoformat(key)
    except ValueError:
        return False
    return True
