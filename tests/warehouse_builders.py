"""Small event sets and the ways to run the SQL on them that several tests here share."""

from __future__ import annotations

import hashlib
import random
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from behavior_pipeline.contracts import CANONICAL_EVENTS, CHANGES, VERSIONS
from behavior_pipeline.ingest.arrivals import loaded_arrivals
from behavior_pipeline.ingest.presets import Preset
from behavior_pipeline.settings import Settings
from behavior_pipeline.sql import file_list
from behavior_pipeline.storage import Storage, write_json
from behavior_pipeline.warehouse.build import WarehouseSummary
from behavior_pipeline.warehouse.plan import Plan
from behavior_pipeline.windows import EvaluationWindows

TRAIN_CUTOFF = datetime(2024, 3, 1, tzinfo=UTC)
TEST_CUTOFF = datetime(2024, 3, 11, tzinfo=UTC)
LIVE_CUTOFF = datetime(2024, 3, 21, tzinfo=UTC)
INGESTED_AT = datetime(2024, 6, 1, tzinfo=UTC)


class Built(NamedTuple):
    """A warehouse that was built and exported at the windows' cutoffs."""

    storage: Storage
    settings: Settings
    windows: EvaluationWindows
    rows: dict[str, int]
    progress: list[tuple[int, int, str]]
    plan: Plan
    summary: WarehouseSummary


def make_preset(**tasks: object) -> Preset:
    """A shop: purchases count, categories are the targets."""
    defaults = {
        "qualifying_event_types": ["purchase", "collector's purchase"],
        "propensity_column": "category",
        "horizon_days": 10,
        "lookback_days": 30,
    }
    return Preset.model_validate(
        {
            "name": "shop",
            "description": "A shop.",
            "columns": {"user_id": "u", "event_type": "e", "occurred_at": {"column": "t"}},
            "tasks": defaults | tasks,
        }
    )


def make_windows(cutoff: datetime = TEST_CUTOFF) -> EvaluationWindows:
    return EvaluationWindows(
        cutoff, TRAIN_CUTOFF, TEST_CUTOFF, timedelta(days=10), timedelta(days=30)
    )


def event(event_id: str, user_id: str, event_type: str, at: str, **values: Any) -> dict[str, Any]:
    occurred_at = datetime.fromisoformat(at).replace(tzinfo=UTC)
    return {
        "event_id": event_id,
        "user_id": user_id,
        "event_type": event_type,
        "occurred_at": occurred_at,
        "ingested_at": INGESTED_AT,
        **values,
    }


def write_events(
    events: Sequence[dict[str, Any]],
    storage: Storage,
    arrival: str = "history",
    num_buckets: int = 3,
    versions: Sequence[dict[str, Any]] = (),
) -> None:
    """Write canonical events as one arrival, the way ingest does.

    Versions of ids that several arrivals hold are the caller's to give, under `VERSIONS`.
    """
    rows = [{name: row.get(name) for name in CANONICAL_EVENTS.schema.names} for row in events]
    for row in rows:
        row["user_bucket"] = bucket_of(row["user_id"], num_buckets)
    times = [row["occurred_at"] for row in rows]
    folder = new_load(storage, arrival, len(rows), times, num_buckets)
    pq.write_table(
        pa.Table.from_pylist(rows, schema=CANONICAL_EVENTS.schema), folder / "events.parquet"
    )
    pq.write_table(
        pa.Table.from_pylist(list(versions), schema=VERSIONS.schema), folder / "versions.parquet"
    )


def new_load(
    storage: Storage, arrival: str, num_stored: int, times: Sequence[datetime], num_buckets: int
) -> Path:
    """Make the folder of an arrival's load, with everything but its events; return it."""
    folder = storage.events / f"arrival={arrival}" / "load=given"
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(VERSIONS.schema.empty_table(), folder / "versions.parquet")
    pq.write_table(CHANGES.schema.empty_table(), folder / "changes.parquet")
    write_json(storage.events / "layout.json", {"num_buckets": num_buckets})
    write_json(
        folder.parent / "load.json",
        {"arrival": arrival, "load_id": "given", "content_id": "given", "events_id": "given",
         "is_bucketed": False, "changes_everything": True, "num_stored": num_stored, "num_known": 0,
         "first_event_at": min(times, default=None), "last_event_at": max(times, default=None)},
    )  # fmt: skip
    return folder


def bucket_of(user_id: str, num_buckets: int) -> int:
    """Return a user's bucket: the first 32 bits of the MD5 of the id, modulo the number."""
    digest = hashlib.md5(user_id.encode(), usedforsecurity=False).hexdigest()
    return int(digest[:8], 16) % num_buckets


def shop_events(num_users: int = 60, seed: int = 7) -> list[dict[str, Any]]:
    """Four months of a shop, up to the end of the test cutoff's label window and no further."""
    chance = random.Random(seed)  # noqa: S311 - no secret
    start, end = datetime(2023, 12, 1, tzinfo=UTC), LIVE_CUTOFF
    events = []
    for user in range(num_users):
        at = start + timedelta(hours=chance.randrange(24 * 60))
        while at < end:
            events.append(_shop_event(f"user {user:02}", len(events), at, chance))
            hours = chance.choice((0, 0.1, 0.3, 5, 40, 200))
            at += timedelta(hours=hours * chance.random(), milliseconds=chance.randrange(2))
    events.append(_shop_event("user last", len(events), end, chance))
    return events


def _shop_event(user_id: str, number: int, at: datetime, chance: random.Random) -> dict[str, Any]:
    event_type = chance.choice(("view", "view", "cart", "purchase", "collector's purchase"))
    category = chance.randrange(8)
    return {
        "event_id": f"event {number:05}",
        "user_id": user_id,
        "event_type": event_type,
        "occurred_at": at,
        "ingested_at": INGESTED_AT,
        "item_id": f"item {category}.{chance.randrange(4)}",
        "category": f"category {category}",
        "amount": chance.randrange(10_000) / 100 if "purchase" in event_type else None,
        "codes": [number % 100, 3],
    }


@dataclass(frozen=True)
class CompiledModels:
    """The models' SQL as dbt compiled it once, run on all events at once in milliseconds.

    No buckets, no layers and no users touched: what a build from nothing means.

    Attributes:
        folder: where events are written to be read.
        plan: the compiled models.
        windows: the night.
    """

    folder: Path
    plan: Plan
    windows: EvaluationWindows

    def run(
        self, events: Sequence[dict[str, Any]], *later: Sequence[dict[str, Any]]
    ) -> duckdb.DuckDBPyConnection:
        """Build every model, in memory, from a history and any number of nights after it.

        Every row's `state`, 1 if it has none, says whether an id has changed; 0 deletes it.
        """
        storage = Storage(self.folder)
        shutil.rmtree(storage.events, ignore_errors=True)
        arrivals = {"history": events} | {
            f"2024-06-{day:02}": rows for day, rows in enumerate(later, start=2)
        }
        versions = [
            {"event_id": row["event_id"], "arrival": key, "load_id": "given",
             "state": row.get("state", 1), "ingested_at": row["ingested_at"]}
            for key, rows in arrivals.items() for row in rows
        ]  # fmt: skip
        held = Counter(version["event_id"] for version in versions)
        contested = [row for row in versions if held[row["event_id"]] > 1]
        for key, rows in arrivals.items():
            stored = [row for row in rows if row.get("state", 1)]
            write_events(stored, storage, key, versions=contested)
        return run_at_once(self.plan, storage, self.windows)

    def at_night(self, cutoff: datetime) -> CompiledModels:
        """Return the same models for the one night whose own cutoff is the only one."""
        windows = replace(self.windows, cutoff=cutoff, train_cutoff=cutoff, test_cutoff=cutoff)
        return replace(self, windows=windows)


def run_at_once(
    plan: Plan, storage: Storage, windows: EvaluationWindows
) -> duckdb.DuckDBPyConnection:
    """Build every model of a plan from all arrivals of a home, in memory."""
    connection = duckdb.connect()
    connection.execute("SET TimeZone = 'UTC'; SET threads = 1; CREATE SCHEMA pipeline")
    loads = [arrival.folder for arrival in loaded_arrivals(storage)]
    for source, pattern in (("canonical_events", "events*"), ("event_versions", "versions")):
        files = [str(file) for load in loads for file in load.glob(f"{pattern}.parquet")]
        reader = (
            f"read_parquet({file_list(map(Path, files))}, hive_partitioning = {source[0] == 'c'}"
        )
        options = ", hive_types_autocast = false)" if source[0] == "c" else ")"
        connection.execute(f"CREATE TABLE pipeline.{source} AS FROM {reader}{options}")
    current = [(arrival.key, arrival.load_id) for arrival in loaded_arrivals(storage)]
    connection.execute("CREATE TABLE current (arrival VARCHAR, load_id VARCHAR)")
    connection.executemany("INSERT INTO current VALUES (?, ?)", current)
    connection.execute(
        "DELETE FROM pipeline.event_versions WHERE (arrival, load_id) NOT IN (FROM current)"
    )
    connection.execute(
        "CREATE TABLE pipeline.night_cutoffs "
        "(observation_cutoff TIMESTAMPTZ, is_train_cutoff BOOLEAN)"
    )
    cutoffs = [(cutoff, cutoff == windows.train_cutoff) for cutoff in windows.cutoffs]
    connection.executemany("INSERT INTO pipeline.night_cutoffs VALUES (?, ?)", cutoffs)
    for model in plan.models:
        connection.execute(f"CREATE TABLE {model.name} AS {model.sql}")
    return connection


def rows(connection: duckdb.DuckDBPyConnection, query: str) -> list[tuple[Any, ...]]:
    return connection.execute(query).fetchall()
