"""A small source with its preset, written in every kind of file, and ways to load and read it."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from behavior_pipeline.ingest.arrivals import LoadSummary, find_arrival, loaded_arrivals
from behavior_pipeline.ingest.load import load_arrival
from behavior_pipeline.ingest.presets import Preset, parse_preset
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage

NOW = datetime(2024, 6, 1, tzinfo=UTC)
LATER = datetime(2024, 6, 2, tzinfo=UTC)
COLUMNS = ("who", "what", "at", "sku", "price")

SHOP = """
name: shop
description: A shop of the tests.
columns:
  user_id: who
  event_type: what
  occurred_at: {column: at, earliest: 2020-01-01, latest: 2030-01-01}
  item_id: sku
  amount: price
tasks: {propensity_column: event_type, horizon_days: 3, lookback_days: 7}
"""

Row = tuple[str | None, ...]
ROWS: list[Row] = [
    ("1", "view", "2024-01-01 10:00:00", "a", "1.5"),
    ("1", "view", "2024-01-01 10:00:00", "a", "1.5"),
    ("1", "buy", "2024-01-01 10:05:00", "a", "2.0"),
    ("2", "view", "2024-01-02 00:00:00", 'b, "big"', None),
    ("3", "view", "2024-01-03 23:59:59.5", None, "-3.0"),
]


def shop(**changes: str) -> Preset:
    """The tests' preset with some of its texts replaced."""
    text = SHOP
    for old, new in changes.items():
        text = text.replace(f"{old}: ", f"{old}: {new} # ", 1)
    return parse_preset(text, "shop")


def csv_text(rows: Sequence[Row], columns: Sequence[str] = COLUMNS) -> str:
    """Rows as CSV with a header."""
    target = io.StringIO()
    csv.writer(target, lineterminator="\n").writerows([columns, *rows])
    return target.getvalue()


def jsonl_text(rows: Sequence[Row], columns: Sequence[str] = COLUMNS) -> str:
    """Rows as JSON lines; nulls are left out of every second line."""
    lines = [
        {name: value for name, value in zip(columns, row, strict=True) if value or number % 2}
        for number, row in enumerate(rows)
    ]
    return "".join(json.dumps(line) + "\n" for line in lines)


def write_rows(file: Path, rows: Sequence[Row], columns: Sequence[str] = COLUMNS) -> Path:
    """Write rows in the kind that the file's name says."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        lists = list(zip(*rows, strict=True)) if rows else [[] for _ in columns]
        arrays = [pa.array(values, pa.string()) for values in lists]
        pq.write_table(pa.table(arrays, list(columns)), file)
        return file
    text = csv_text(rows, columns) if ".csv" in file.name else jsonl_text(rows, columns)
    data = text.encode()
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)
    return file


def load(
    path: Path | str,
    storage: Storage,
    settings: Settings,
    *,
    preset: Preset | None = None,
    arrival: str = "history",
    at: datetime = NOW,
    day: date | None = None,
) -> LoadSummary:
    """Load with the tests' preset and check what holds for every load."""
    summary = load_arrival(preset or shop(), str(path), storage, settings, arrival, at, day)
    assert summary.num_accepted + summary.num_quarantined == summary.num_read
    assert (
        summary.num_inserted + summary.num_repeated + summary.num_deletions == summary.num_accepted
    )
    assert sum(summary.reasons.values()) == summary.num_quarantined
    assert len(quarantine(storage, arrival)) == summary.num_quarantined
    assert len(events(storage, arrival)) == summary.num_stored
    return summary


def events(storage: Storage, arrival: str | None = None) -> list[dict[str, Any]]:
    """Events of an arrival in the order of its files, or those that count in the contract's order.

    Of an id the newest arrival's row counts, with the time at which it first came like that.
    """
    if arrival:
        found = find_arrival(storage, arrival)
        assert found is not None
        return [row for file in found.event_files() for row in _rows(file)]
    versions: dict[str, list[dict[str, Any] | None]] = {}
    for each in loaded_arrivals(storage):
        for row in events(storage, each.key):
            versions.setdefault(row["event_id"], []).append(row)
        for row in _rows(each.folder / "deletions.parquet"):
            versions.setdefault(row["event_id"], []).append(None)
    rows = [_counting(rows) for rows in versions.values()]
    kept = [row for row in rows if row is not None]
    return sorted(kept, key=lambda row: (row["user_id"], row["occurred_at"], row["event_id"]))


def _counting(versions: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Return the newest version, with the earliest time of those that say the same."""
    newest = versions[-1]
    if newest is None:
        return None
    same = [row for row in versions if row is not None and said([row]) == said([newest])]
    return newest | {"ingested_at": min(row["ingested_at"] for row in same)}


def quarantine(storage: Storage, arrival: str = "history") -> list[dict[str, Any]]:
    """Quarantined rows of an arrival, in the order of its file."""
    found = find_arrival(storage, arrival)
    assert found is not None
    folder = storage.quarantine / f"arrival={arrival}" / f"load={found.load_id}"
    return _rows(folder / "quarantine.parquet")


def _rows(file: Path) -> list[dict[str, Any]]:
    return pq.ParquetFile(file).read().to_pylist()


def said(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Events without the time of their arrival."""
    return [{key: value for key, value in row.items() if key != "ingested_at"} for row in rows]


@contextmanager
def home() -> Iterator[tuple[Path, Storage]]:
    """An own folder for each example that hypothesis tries."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder), Storage(Path(folder) / "home")
