"""A source with many rows is staged on disk, by bucket of users, and says what a small one says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from ingest_builders import LATER, Row, events, load, quarantine, said, shop, write_rows
from warehouse_builders import bucket_of

from behavior_pipeline.contracts import CANONICAL_EVENTS
from behavior_pipeline.ingest import staging
from behavior_pipeline.ingest.arrivals import Arrival, LoadSummary, find_arrival
from behavior_pipeline.ingest.presets import Preset
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage

USERS = [f"user {number}" for number in range(12)]
ROWS: list[Row] = [
    (
        user,
        ("view", "buy")[place % 2],
        f"2024-01-{1 + place:02} 10:00:00",
        f"sku {place % 3}",
        "1.5",
    )
    for place in range(7)
    for user in USERS
]
BAD: Row = (None, "view", "2024-01-01", "a", "1")
IDS = shop(item_id="sku\n  event_id: sku\n  is_deleted: {column: price, values: [gone]}")
IDS_ROWS: list[Row] = [
    *[(user, "view", "2024-01-01", f"{user} {n}", "1") for user in USERS for n in range(4)],
    ("moved", "buy", "2024-01-02", "user 3 1", "2"),  # in another bucket, perhaps
    ("user 1", "view", "2024-01-02", "user 1 2", "3"),
    ("user 1", "view", "2024-01-02", "user 1 2", "3"),
    (None, None, None, "user 2 0", "gone"),
    (None, None, None, "never there", "gone"),
]


@pytest.fixture
def bulk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "BULK_ROWS", 10)


def both(
    rows: list[Row],
    folder: Path,
    settings: Settings,
    preset: Preset,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[tuple[Storage, LoadSummary], tuple[Storage, LoadSummary]]:
    """Load the same rows as a small and as a bulk load."""
    file = write_rows(folder / "rows.csv", rows)
    done = []
    for name, threshold in (("small", 1_000), ("bulk", 10)):
        monkeypatch.setattr(staging, "BULK_ROWS", threshold)
        storage = Storage(folder / name)
        done.append((storage, load(file, storage, settings, preset=preset)))
    return done[0], done[1]


def arrival_of(storage: Storage) -> Arrival:
    found = find_arrival(storage, "history")
    assert found is not None
    return found


def files_of(storage: Storage) -> dict[int, list[dict[str, Any]]]:
    """Rows by bucket, read from the files of each bucket alone."""
    arrival = arrival_of(storage)
    buckets = range(3)
    files = {bucket: arrival.event_files(bucket) for bucket in buckets}
    assert sorted(file for each in files.values() for file in each) == arrival.event_files()
    return {
        bucket: [row for file in files[bucket] for row in pq.ParquetFile(file).read().to_pylist()]
        for bucket in buckets
    }


@pytest.mark.usefixtures("bulk")
def test_a_bulk_load_is_files_by_bucket_under_the_contract(
    tmp_path: Path, storage: Storage, settings: Settings
) -> None:
    summary = load(write_rows(tmp_path / "a.csv", [*ROWS, BAD]), storage, settings)
    assert (summary.num_read, summary.num_stored, summary.num_quarantined) == (85, 84, 1)
    assert summary.num_users_touched == summary.num_users == len(USERS)
    arrival = arrival_of(storage)
    assert arrival.is_bucketed
    assert arrival.changes_everything
    assert pq.ParquetFile(arrival.folder / "changes.parquet").metadata.num_rows == 0
    for bucket, rows in files_of(storage).items():
        assert rows
        assert {bucket_of(row["user_id"], 3) for row in rows} == {bucket}
        assert {row["user_bucket"] for row in rows} == {bucket}
    for file in arrival.event_files():
        schema = pq.ParquetFile(file).schema_arrow
        assert schema.equals(CANONICAL_EVENTS.schema, check_metadata=False)
        assert oct(file.stat().st_mode)[-3:] == "600"
    assert [row["row_number"] for row in quarantine(storage)] == [85]
    assert list(storage.scratch.glob(".*")) == []


@pytest.mark.parametrize(
    ("rows", "preset"),
    [
        ([*ROWS, BAD], shop()),
        ([*ROWS, *ROWS[:9], ROWS[0]], shop()),  # identical rows are events of their own
        (IDS_ROWS, IDS),  # repeated ids, in one bucket and across buckets, and tombstones
    ],
    ids=["plain", "identical rows", "repeated ids"],
)
def test_a_bulk_load_says_what_a_small_one_says(
    rows: list[Row],
    preset: Preset,
    tmp_path: Path,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (small, expected), (bulk, found) = both(rows, tmp_path, settings, preset, monkeypatch)
    assert not arrival_of(small).is_bucketed
    assert arrival_of(bulk).is_bucketed
    assert events(bulk) == events(small)
    assert found == expected
    assert arrival_of(bulk).load_id == arrival_of(small).load_id
    assert sum(map(len, files_of(bulk).values())) == found.num_stored
    for bucket, stored in files_of(bulk).items():
        assert {bucket_of(row["user_id"], 3) for row in stored} <= {bucket}


@pytest.mark.usefixtures("bulk")
def test_repeated_ids_across_buckets_are_settled(
    tmp_path: Path, storage: Storage, settings: Settings
) -> None:
    assert bucket_of("moved", 3) != bucket_of("user 3", 3)
    summary = load(write_rows(tmp_path / "a.csv", IDS_ROWS), storage, settings, preset=IDS)
    found = {row["event_id"]: (row["user_id"], row["amount"]) for row in events(storage)}
    assert len(found) == 4 * len(USERS) - 1
    assert found["user 1 2"] == ("user 1", 3.0)
    assert found["user 3 1"] == ("user 3", 1.0)  # the greater by its columns
    assert "user 2 0" not in found
    assert (summary.num_duplicates, summary.num_deletions) == (4, 2)


def test_loading_again_in_another_way_changes_nothing(
    tmp_path: Path, storage: Storage, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_rows(tmp_path / "a.csv", ROWS)
    load(file, storage, settings)
    before = arrival_of(storage), events(storage)
    monkeypatch.setattr(staging, "BULK_ROWS", 10)
    again = load(file, storage, settings, at=LATER)
    assert (arrival_of(storage), events(storage)) == before
    assert not arrival_of(storage).is_bucketed
    assert again.num_read == len(ROWS)


def test_a_bulk_load_that_others_know_lists_whom_it_touches(
    tmp_path: Path, storage: Storage, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(write_rows(tmp_path / "a.csv", ROWS), storage, settings)
    monkeypatch.setattr(staging, "BULK_ROWS", 10)
    more = ("user 3", "buy", "2024-01-20", "z", "1")
    file = write_rows(tmp_path / "b.csv", [*ROWS, more])
    summary = load(file, storage, settings, arrival="2024-01-20", at=LATER)
    night = find_arrival(storage, "2024-01-20")
    assert night is not None
    assert night.is_bucketed
    assert not night.changes_everything
    assert (summary.num_inserted, summary.num_users_touched) == (1, 1)
    changes = pq.ParquetFile(night.folder / "changes.parquet").read()["user_id"].to_pylist()
    assert changes == ["user 3"]
    assert len(said(events(storage))) == len(ROWS) + 1
