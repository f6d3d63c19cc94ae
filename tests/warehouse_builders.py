"""Small event sets and the ways to run the SQL on them that several tests here share."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from behavior_pipeline.contracts import CANONICAL_EVENTS
from behavior_pipeline.ingest.presets import Preset
from behavior_pipeline.settings import Settings
from behavior_pipeline.sql import quote_text
from behavior_pipeline.storage import Storage
from behavior_pipeline.windows import EvaluationWindows

TRAIN_CUTOFF = datetime(2024, 3, 1, tzinfo=UTC)
TEST_CUTOFF = datetime(2024, 3, 11, tzinfo=UTC)
LIVE_CUTOFF = datetime(2024, 3, 21, tzinfo=UTC)
INGESTED_AT = datetime(2024, 6, 1, tzinfo=UTC)


class Built(NamedTuple):
    """A warehouse that dbt built, exported at the windows' cutoffs."""

    storage: Storage
    settings: Settings
    windows: EvaluationWindows
    rows: dict[str, int]
    progress: list[tuple[int, int, str]]
    manifest: dict[str, Any]


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


def write_events(events: Sequence[dict[str, Any]], folder: Path, arrival: str = "first") -> None:
    """Write canonical Parquet the way ingest does."""
    target = folder / f"arrival={arrival}"
    target.mkdir(parents=True, exist_ok=True)
    rows = [{name: row.get(name) for name in CANONICAL_EVENTS.schema.names} for row in events]
    table = pa.Table.from_pylist(rows, schema=CANONICAL_EVENTS.schema)
    pq.write_table(table, target / "part.parquet")


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
    """The models' SQL as dbt compiled it once, run in DuckDB in milliseconds.

    Attributes:
        folder: where the compiled staging model reads events from.
        models: name and SQL of each model, in the order of their dependencies.
    """

    folder: Path
    models: tuple[tuple[str, str], ...]

    @classmethod
    def read(cls, built: Built, folder: Path) -> CompiledModels:
        nodes = {
            key: node
            for key, node in built.manifest["nodes"].items()
            if node["resource_type"] == "model"
        }
        given, own = (quote_text(str(path))[1:-1] for path in (built.storage.events, folder))
        given = given.replace("[", "[[]")  # as a glob
        done: dict[str, tuple[str, str]] = {}
        while len(done) < len(nodes):
            for key, node in nodes.items():
                needed = [name for name in node["depends_on"]["nodes"] if name in nodes]
                if key not in done and all(name in done for name in needed):
                    done[key] = (node["name"], node["compiled_code"].replace(given, own))
        return cls(folder, tuple(done.values()))

    def run(self, events: Sequence[dict[str, Any]]) -> duckdb.DuckDBPyConnection:
        """Build every model from the events, in memory."""
        write_events(events, self.folder)
        connection = duckdb.connect()
        connection.execute("SET TimeZone = 'UTC'")
        connection.execute("SET threads = 1")
        for name, sql in self.models:
            connection.execute(f"CREATE TABLE {name} AS {sql}")
        return connection


def rows(connection: duckdb.DuckDBPyConnection, query: str) -> list[tuple[Any, ...]]:
    return connection.execute(query).fetchall()
