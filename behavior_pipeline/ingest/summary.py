"""What a load did, counted from its relations and recorded beside its files."""

from __future__ import annotations

from dataclasses import fields
from datetime import datetime
from typing import Any, Final

import duckdb

from behavior_pipeline.ingest.arrivals import HISTORY, LoadSummary, load_document
from behavior_pipeline.ingest.versions import count_known
from behavior_pipeline.sql import fetch_one, quote_text, utc_date
from behavior_pipeline.storage import Storage

_AGES: Final = (
    ("from the future", "age < 0"),
    ("same day", "age = 0"),
    ("1 day", "age = 1"),
    ("2 to 7 days", "age BETWEEN 2 AND 7"),
    ("8 to 30 days", "age BETWEEN 8 AND 30"),
    ("more than 30 days", "age > 30"),
)
"""How old an event is when it arrives: days from the day it occurred to the day it arrived."""


def summarize(
    connection: duckdb.DuckDBPyConnection, num_read: int, arrival: str, *, is_everything: bool
) -> LoadSummary:
    """Count what was accepted, stored, repeated, corrected, deleted, quarantined and touched.

    Needs the relations of `staging` and `versions`.
    """
    num_stored, num_users, first, last = fetch_one(
        connection,
        "SELECT count(*), count(DISTINCT user_id), min(occurred_at), max(occurred_at) FROM stored",
    )
    num_deletions, num_touched = (
        int(fetch_one(connection, f"SELECT count({what}) FROM {relation}")[0])
        for what, relation in (("DISTINCT event_id", "deletions"), ("DISTINCT user_id", "changes"))
    )
    reasons = connection.execute(
        "SELECT reason, count(*) FROM quarantined GROUP BY reason ORDER BY reason"
    ).fetchall()
    num_quarantined = sum(count for _, count in reasons)
    num_known, num_corrected = (0, 0) if is_everything else count_known(connection)
    return LoadSummary(
        num_read=num_read,
        num_accepted=num_read - num_quarantined,
        num_stored=num_stored,
        num_duplicates=num_read - num_quarantined - num_stored - num_deletions,
        num_known=num_known,
        num_corrected=num_corrected,
        num_deletions=num_deletions,
        num_quarantined=num_quarantined,
        num_users=num_users,
        num_users_touched=num_users if is_everything else num_touched,
        first_event_at=first,
        last_event_at=last,
        reasons=dict(reasons),
        late={} if arrival == HISTORY else _late(connection, arrival),
    )


def read_summary(storage: Storage, arrival: str) -> LoadSummary:
    """Return what was recorded of the load of an arrival that counts."""
    document = {"num_suppressed": 0} | (load_document(storage, arrival) or {})
    values: dict[str, Any] = {field.name: document[field.name] for field in fields(LoadSummary)}
    for name in ("first_event_at", "last_event_at"):
        values[name] = datetime.fromisoformat(values[name]) if values[name] else None
    return LoadSummary(**values)


def _late(connection: duckdb.DuckDBPyConnection, arrival: str) -> dict[str, int]:
    """Count the events that only this arrival holds by their age."""
    counts = ", ".join(f"count(*) FILTER (WHERE {condition})" for _, condition in _AGES)
    row = fetch_one(
        connection,
        f"SELECT {counts} FROM (SELECT date_diff('day', {utc_date('occurred_at')}, "
        f"TRY_CAST({quote_text(arrival)} AS DATE)) AS age FROM stored "
        "ANTI JOIN others USING (event_id))",
    )
    return {name: count for (name, _), count in zip(_AGES, row, strict=True) if count}
