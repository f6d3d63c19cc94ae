"""Arrivals on disk: one folder of events and one of quarantined rows each, always consistent.

A load stages its rows in DuckDB tables; here they become Parquet. Both folders carry the same
`load.json`, with a digest of each side: where they disagree, a kill came between the two renames,
and the next load of the arrival writes both again.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import duckdb

from behavior_pipeline.contracts import CANONICAL_EVENTS, QUARANTINE
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.settings import Settings
from behavior_pipeline.sql import open_engine, quote_identifier, quote_text
from behavior_pipeline.storage import Storage, read_json, write_json, writing_folder

HISTORY: Final = "history"
"""The arrival of a bulk load; it comes before all days."""

EVENTS_FILE: Final = "events.parquet"
QUARANTINE_FILE: Final = "quarantine.parquet"
LOAD_FILE: Final = "load.json"

EVENT_COLUMNS: Final = tuple(
    name for name in CANONICAL_EVENTS.schema.names if name != "ingested_at"
)
"""What a row itself says; `ingested_at` says only when it came."""
_QUARANTINE_COLUMNS: Final = tuple(
    name for name in QUARANTINE.schema.names if name != "quarantined_at"
)


@dataclass(frozen=True)
class LoadSummary:
    """What a load did; accepted + quarantined = read, inserted + repeated = accepted.

    Attributes:
        num_read: data rows read, malformed lines included.
        num_accepted: rows that keep the contract.
        num_inserted: accepted rows that are events of this arrival.
        num_repeated: accepted rows that another arrival, or this one, already has.
        num_quarantined: rows that break the contract.
        num_users: distinct users of accepted rows.
        first_event_at, last_event_at: span of accepted rows, None without any.
        reasons: quarantined rows by reason.
        drift: one line for each thing that is not as it was in the arrivals before.
    """

    num_read: int
    num_accepted: int
    num_inserted: int
    num_repeated: int
    num_quarantined: int
    num_users: int
    first_event_at: datetime | None
    last_event_at: datetime | None
    reasons: dict[str, int]
    drift: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class EventsSpan:
    """How many events there are, and from when to when."""

    num_events: int
    first_event_at: datetime
    last_event_at: datetime


def arrival_rank(key: str) -> str:
    """Return a text that sorts arrivals from old to new."""
    return "" if key == HISTORY else key


def arrival_folder(parent: Path, arrival: str) -> Path:
    """Return the folder of an arrival."""
    return parent / f"arrival={arrival}"


def own_events(storage: Storage, arrival: str) -> Path | None:
    """Return the event file of an arrival, if it was loaded before."""
    file = arrival_folder(storage.events, arrival) / EVENTS_FILE
    return file if file.is_file() else None


def other_arrivals(storage: Storage, arrival: str) -> list[str]:
    """Return the event files of all other arrivals, sorted."""
    own = arrival_folder(storage.events, arrival)
    files = storage.events.glob(f"arrival=*/{EVENTS_FILE}")
    return sorted(str(file) for file in files if file.parent != own)


def write_arrival(
    connection: duckdb.DuckDBPyConnection,
    storage: Storage,
    arrival: str,
    summary: LoadSummary,
    ingested_at: datetime,
) -> None:
    """Write the relations `inserted` and `quarantined` as an arrival, if they say anything new.

    Events that are there already keep their folder, and so their `ingested_at`. Quarantine goes
    first: `events/…/load.json` is the last thing to appear.
    """
    events_folder = arrival_folder(storage.events, arrival)
    quarantine_folder = arrival_folder(storage.quarantine, arrival)
    document = asdict(summary) | {
        "arrival": arrival,
        "events_digest": _digest(connection, "inserted", EVENT_COLUMNS),
        "quarantine_digest": _digest(connection, "quarantined", _QUARANTINE_COLUMNS),
    }
    has_events = _says(events_folder, EVENTS_FILE, document, ["events_digest"])
    has_quarantine = _says(
        quarantine_folder, QUARANTINE_FILE, document, ["events_digest", "quarantine_digest"]
    )
    kept = read_json(events_folder / LOAD_FILE) if has_events else {}
    document["ingested_at"] = kept.get("ingested_at", ingested_at)
    with ExitStack() as swaps:  # leaves in reverse: quarantine is swapped in first
        if not has_events:
            folder = swaps.enter_context(writing_folder(events_folder))
            _write_events(connection, folder / EVENTS_FILE, ingested_at)
            write_json(folder / LOAD_FILE, document)
        if not has_quarantine:
            folder = swaps.enter_context(writing_folder(quarantine_folder))
            _write_quarantine(connection, folder / QUARANTINE_FILE, ingested_at)
            write_json(folder / LOAD_FILE, document)
    if has_events and not _says(
        events_folder, EVENTS_FILE, document, [*asdict(summary), "quarantine_digest"]
    ):
        write_json(events_folder / LOAD_FILE, document)


def events_span(storage: Storage, settings: Settings) -> EventsSpan:
    """Return the number and the span of all events, from their Parquet files.

    Raises:
        PipelineError: if no events were loaded.
    """
    files = sorted(str(file) for file in storage.events.glob("arrival=*/*.parquet"))
    row: tuple[Any, ...] | None = None
    if files:
        with open_engine(settings.memory_limit, settings.threads, storage.scratch) as connection:
            row = connection.execute(
                "SELECT count(*), min(occurred_at), max(occurred_at) FROM read_parquet(?)", [files]
            ).fetchone()
    if row is None or row[0] == 0:
        raise PipelineError(
            f"No events are loaded in '{storage.home}'.",
            "Load some first: behavior-pipeline run --source … --path …",
        )
    return EventsSpan(int(row[0]), row[1], row[2])


def _says(folder: Path, file: str, document: dict[str, Any], keys: list[str]) -> bool:
    """Tell whether a complete folder's load.json agrees with a document on some keys."""
    if not ((folder / file).is_file() and (folder / LOAD_FILE).is_file()):
        return False
    kept = read_json(folder / LOAD_FILE)
    return all(str(kept.get(key)) == str(document[key]) for key in keys)


def _digest(connection: duckdb.DuckDBPyConnection, relation: str, columns: tuple[str, ...]) -> str:
    """Return a digest of a relation's rows that does not depend on their order."""
    parts = ", ".join(_digest_part(name) for name in columns)
    rows, digest = connection.execute(
        f"SELECT count(*), bit_xor(md5_number(concat_ws(chr(31), {parts}))) FROM {relation}"
    ).fetchall()[0]
    return f"{rows}-{digest or 0:032x}"


def _digest_part(column: str) -> str:
    """Return SQL for a column's share of a digest; null differs from an empty text."""
    name = quote_identifier(column)
    value = f"epoch_us({name})" if column == "occurred_at" else name
    return f"coalesce({value}::VARCHAR, chr(30))"


def _write_events(connection: duckdb.DuckDBPyConnection, file: Path, ingested_at: datetime) -> None:
    """Write the relation `inserted` in the contract's columns and order."""
    given = {"ingested_at": _time_constant(ingested_at)}
    _copy(
        connection,
        "inserted",
        CANONICAL_EVENTS.schema.names,
        given,
        CANONICAL_EVENTS.sort_order,
        file,
    )


def _write_quarantine(
    connection: duckdb.DuckDBPyConnection, file: Path, quarantined_at: datetime
) -> None:
    """Write the relation `quarantined` in the contract's columns and order."""
    given = {"quarantined_at": _time_constant(quarantined_at)}
    _copy(connection, "quarantined", QUARANTINE.schema.names, given, QUARANTINE.sort_order, file)


def _copy(
    connection: duckdb.DuckDBPyConnection,
    relation: str,
    columns: list[str],
    given: dict[str, str],
    order: tuple[str, ...],
    file: Path,
) -> None:
    """Write a relation to a Parquet file, in total order."""
    selected = ", ".join(
        f"{given[name]} AS {name}" if name in given else quote_identifier(name) for name in columns
    )
    connection.execute(
        f"COPY (SELECT {selected} FROM {relation} ORDER BY {', '.join(order)}) "
        f"TO {quote_text(str(file))} (FORMAT parquet, COMPRESSION zstd)"
    )
    file.chmod(0o600)


def _time_constant(time: datetime) -> str:
    """Return a time as SQL."""
    return f"TIMESTAMPTZ {quote_text(time.isoformat())}"
