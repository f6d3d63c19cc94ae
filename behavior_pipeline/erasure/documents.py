"""Records of files from which users were erased, counted anew from the files themselves."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from behavior_pipeline.erasure.rewriting import Affected, rewrite
from behavior_pipeline.feature_store.versions import VERSIONED
from behavior_pipeline.ingest.arrivals import (
    DELETIONS_FILE,
    LOAD_FILE,
    QUARANTINE_FILE,
    Arrival,
    arrival_folder,
    load_document,
    loaded_arrivals,
)
from behavior_pipeline.sequences.reading import MANIFEST, read_bucket, sequence_files
from behavior_pipeline.sql import fetch_one, parquet
from behavior_pipeline.storage import Storage, read_json, write_json

_SEPARATORS: Final = re.compile(r"[\s,;|\"'{}\[\]():=]+")
_MANY_USERS: Final = 1_000_000


def recount_loads(storage: Storage) -> None:
    """Let every arrival's record say what its files hold now; what is missing was suppressed."""
    for arrival in loaded_arrivals(storage):
        document = load_document(storage, arrival.key)
        if document is None:
            continue
        counted = document | _counts(storage, arrival, document)
        if counted != document:
            write_json(arrival_folder(storage.events, arrival.key) / LOAD_FILE, counted)


def _counts(storage: Storage, arrival: Arrival, document: dict[str, Any]) -> dict[str, Any]:
    """Count the files of an arrival."""
    folder = arrival_folder(storage.quarantine, arrival.key) / f"load={arrival.load_id}"
    reasons = _reasons(folder / QUARANTINE_FILE)
    num_quarantined = sum(reasons.values())
    num_deletions = _rows(arrival.folder / DELETIONS_FILE)
    num_stored, num_users, first, last = _events(arrival)
    kept = num_stored + num_quarantined + num_deletions + document["num_duplicates"]
    return {
        "num_stored": num_stored,
        "num_users": num_users,
        "num_known": min(document["num_known"], num_stored),
        "num_corrected": min(document["num_corrected"], num_stored),
        "num_users_touched": min(document["num_users_touched"], num_users),
        "num_deletions": num_deletions,
        "num_quarantined": num_quarantined,
        "reasons": reasons,
        "num_suppressed": document["num_read"] - kept,
        "first_event_at": first,
        "last_event_at": last,
    }


def _events(arrival: Arrival) -> tuple[int, int, str | None, str | None]:
    """Return how many events and users an arrival has, and from when to when."""
    files = arrival.event_files()
    if not files:
        return 0, 0, None, None
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        num_events, num_users, first, last = fetch_one(
            connection,
            "SELECT count(*), count(DISTINCT user_id), min(occurred_at), max(occurred_at) "
            f"FROM {parquet(files)}",
        )
    return num_events, num_users, first and str(first), last and str(last)


def _reasons(path: Path) -> dict[str, int]:
    """Return the quarantined rows by reason."""
    if not path.exists():
        return {}
    counts = pq.read_table(path, columns=["reason"])["reason"].value_counts().to_pylist()
    return {row["values"]: row["counts"] for row in sorted(counts, key=lambda row: row["values"])}


def _rows(path: Path) -> int:
    """Return the number of rows of a Parquet file; 0 if it is not there."""
    return int(pq.read_metadata(path).num_rows) if path.exists() else 0


def erase_from_quarantine(storage: Storage, users: frozenset[str]) -> int:
    """Remove quarantined rows whose raw text names one of the users; return how many went.

    A raw row is split where fields are; an id with such a character in it is looked for as it is.
    """
    odd = [user for user in users if _SEPARATORS.search(user)]

    def is_named(raw: str | None) -> bool:
        text = raw or ""
        return not users.isdisjoint(_SEPARATORS.split(text)) or any(one in text for one in odd)

    def is_erased(table: pa.Table) -> pa.ChunkedArray:
        named = [is_named(raw) for raw in table["raw_row"].to_pylist()]
        return pa.chunked_array([pa.array(named, pa.bool_())])

    removed = 0
    for path in sorted(storage.quarantine.rglob(f"*{QUARANTINE_FILE}")):
        rows = pq.read_table(path, columns=["raw_row"])
        count = sum(is_erased(rows).to_pylist())
        if count:
            rewrite(Affected((path,), count), is_erased)
            removed += count
    return removed


def recount_sequences(storage: Storage) -> None:
    """Let every folder of sequences say how many users it has now."""
    for manifest in sorted(storage.home.rglob(f"sequences/*/{MANIFEST}")):
        columns = ("user_id", "num_events")
        num_users = sum(
            len(chunk)
            for file in sequence_files(manifest.parent)
            for chunk in read_bucket(file, _MANY_USERS, columns)
        )
        document = read_json(manifest)
        if document["num_users"] != num_users:
            write_json(manifest, document | {"num_users": num_users})


def recount_published(storage: Storage) -> None:
    """Let the record of what is published say how many rows each cutoff has now."""
    path = storage.feature_store / "published.json"
    if not path.exists():
        return
    content = read_json(path)
    for name, state in content.items():
        view, _, version = name.partition("@")
        folder = storage.feature_store / "offline" / view
        folder = folder / version if view in VERSIONED else folder
        for date, cutoff in state["cutoffs"].items():
            cutoff["num_rows"] = _rows(folder / f"cutoff={date}" / "features.parquet")
    write_json(path, content)
