"""What is recorded of files from which users were erased, counted anew from the files themselves.

Counting anew instead of subtracting: an erasure that was killed half-way ends with the same record.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq

from behavior_pipeline.feature_store.repository import offline_folder
from behavior_pipeline.feature_store.versions import VERSIONED
from behavior_pipeline.ingest.arrivals import (
    DELETIONS_FILE,
    LOAD_FILE,
    QUARANTINE_FILE,
    VERSIONS_FILE,
    Arrival,
    arrival_folder,
    load_document,
    loaded_arrivals,
)
from behavior_pipeline.ingest.load import content_ids
from behavior_pipeline.sequences.reading import MANIFEST, read_bucket, sequence_files
from behavior_pipeline.settings import Settings
from behavior_pipeline.sql import fetch_one, open_engine, parquet
from behavior_pipeline.storage import Storage, cutoff_folder, read_json, write_json
from behavior_pipeline.windows import parse_cutoff

_MANY_USERS = 1_000_000  # rows of two columns

_NO_EVENTS = (
    "SELECT NULL::VARCHAR AS event_id, NULL::VARCHAR AS user_id, "
    "NULL::TIMESTAMPTZ AS occurred_at LIMIT 0"
)


def recount_loads(storage: Storage, settings: Settings) -> None:
    """Let every arrival's record say what its files hold now; what is missing was suppressed.

    Its hashes too, so that loading the same files again still changes nothing. `load_id` stays: it
    names folders, and the warehouse has worked that load in.
    """
    for arrival in loaded_arrivals(storage):
        document = load_document(storage, arrival.key)
        if document is None or _num_rows(storage, arrival) == _recorded_rows(document):
            continue
        spill = storage.scratch / "spill"
        with open_engine(settings.memory_limit, settings.threads, spill) as connection:
            counted = document | _counts(connection, storage, arrival, document)
        write_json(arrival_folder(storage.events, arrival.key) / LOAD_FILE, counted)


def _quarantine_file(storage: Storage, arrival: Arrival) -> Path:
    """Return where an arrival's quarantined rows are."""
    folder = arrival_folder(storage.quarantine, arrival.key)
    return folder / f"load={arrival.load_id}" / QUARANTINE_FILE


def _num_rows(storage: Storage, arrival: Arrival) -> tuple[int, int, int]:
    """Count events, deletions and quarantined rows on disk, from the files' own footers."""
    return (
        sum(_rows(file) for file in arrival.event_files()),
        _rows(arrival.folder / DELETIONS_FILE),
        _rows(_quarantine_file(storage, arrival)),
    )


def _recorded_rows(document: dict[str, Any]) -> tuple[int, int, int]:
    """Return what is recorded of them."""
    return document["num_stored"], document["num_deletions"], document["num_quarantined"]


def _counts(
    connection: duckdb.DuckDBPyConnection,
    storage: Storage,
    arrival: Arrival,
    document: dict[str, Any],
) -> dict[str, Any]:
    """Count the files of an arrival, and hash them."""
    _show(connection, storage, arrival)
    num_stored, num_deletions, num_quarantined = _num_rows(storage, arrival)
    num_users, first, last = fetch_one(
        connection,
        "SELECT count(DISTINCT user_id), min(occurred_at), max(occurred_at) FROM stored",
    )
    reasons = connection.execute(
        "SELECT reason, count(*) FROM quarantined GROUP BY reason ORDER BY reason"
    ).fetchall()
    known, held = _known(connection, arrival)
    events_id, content_id = content_ids(connection)
    kept = num_stored + num_quarantined + num_deletions + document["num_duplicates"]
    num_suppressed = document["num_read"] - kept
    return {
        "num_accepted": document["num_read"] - num_quarantined - num_suppressed,
        "num_stored": num_stored,
        "num_users": num_users,
        "num_known": known,
        "num_corrected": held - known,
        "num_users_touched": min(document["num_users_touched"], num_users)
        if document["changes_everything"]
        else document["num_users_touched"],
        "num_deletions": num_deletions,
        "num_quarantined": num_quarantined,
        "reasons": dict(reasons),
        "num_suppressed": num_suppressed,
        "first_event_at": _text(first),
        "last_event_at": _text(last),
        "events_id": events_id,
        "content_id": content_id,
    }


def _show(connection: duckdb.DuckDBPyConnection, storage: Storage, arrival: Arrival) -> None:
    """Make the relations that a load had when it was hashed."""
    files = arrival.event_files()
    relations = {
        "stored": parquet(files) if files else f"({_NO_EVENTS})",
        "deletions": parquet([arrival.folder / DELETIONS_FILE]),
        "quarantined": parquet([_quarantine_file(storage, arrival)]),
        "versions": parquet([arrival.folder / VERSIONS_FILE]),
    }
    for name, rows in relations.items():
        connection.execute(f"CREATE TEMP VIEW {name} AS FROM {rows}")


def _known(connection: duckdb.DuckDBPyConnection, arrival: Arrival) -> tuple[int, int]:
    """Return how many events other arrivals held as they are, and how many they held at all."""
    known, held = fetch_one(
        connection,
        "SELECT count(*) FILTER (WHERE is_same), count(*) FROM ("
        "SELECT bool_or(others.state = own.state) AS is_same FROM versions AS own "
        "JOIN versions AS others ON own.event_id = others.event_id "
        "WHERE own.arrival = ? AND own.load_id = ? AND own.state <> 0 "
        "AND others.arrival <> ? AND others.state <> 0 GROUP BY own.event_id)",
        [arrival.key, arrival.load_id, arrival.key],
    )
    return int(known), int(held)


def _text(moment: datetime | None) -> str | None:
    """Write a time as records of loads do."""
    return None if moment is None else str(moment)


def _rows(path: Path) -> int:
    """Return the number of rows of a Parquet file; 0 if it is not there."""
    return int(pq.read_metadata(path).num_rows) if path.exists() else 0


def recount_sequences(storage: Storage) -> None:
    """Let every folder of sequences say how many users it has now."""
    for manifest in sorted(storage.home.rglob(f"sequences/*/{MANIFEST}")):
        columns = ("user_id", "num_events", "observation_cutoff")
        num_users = sum(
            len(chunk)
            for file in sequence_files(manifest.parent)
            for chunk in read_bucket(file, _MANY_USERS, columns)
        )
        document = read_json(manifest)
        if document["num_users"] != num_users:
            write_json(manifest, document | {"num_users": num_users})


def recount_published(storage: Storage) -> None:
    """Let the record of what is published say how many rows each cutoff has now.

    The caller holds `exclusive(storage)`.
    """
    path = storage.feature_store / "published.json"
    if not path.exists():
        return
    content = read_json(path)
    for name, state in content.items():
        view, _, version = name.partition("@v")
        number = int(version) if view in VERSIONED and version else None
        for date, cutoff in state["cutoffs"].items():
            folder = offline_folder(storage, view, number) / cutoff_folder(parse_cutoff(date))
            if (folder / "features.parquet").is_file():
                cutoff["num_rows"] = _rows(folder / "features.parquet")
    write_json(path, content)
