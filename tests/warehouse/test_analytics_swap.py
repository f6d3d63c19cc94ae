"""Analysts read `analytics.duckdb` from processes of their own while nights replace it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from warehouse_builders import (
    LIVE_CUTOFF,
    Built,
    event,
    make_preset,
    make_windows,
    shop_events,
    write_events,
)

from behavior_pipeline.contracts import CHANGES
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.layers import read_layers
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage, write_json
from behavior_pipeline.warehouse.analytics import publish_analytics, published_cutoff
from behavior_pipeline.warehouse.build import WarehouseSummary, build_warehouse

LATER = LIVE_CUTOFF + timedelta(days=1)
SPENT = (
    "SELECT user_id, count(*), sum(amount)::DECIMAL(18, 2) FROM events_sessionized "
    "GROUP BY user_id ORDER BY user_id"
)
SESSIONS = "SELECT count(*), sum(num_events) FROM sessions"
FUNNEL = "SELECT count(*), sum(user_id IS NOT NULL) FROM session_funnel"
OVERVIEW = "SELECT count(*), max(observation_cutoff)::VARCHAR FROM user_overview"
QUESTIONS = (SPENT, SESSIONS, FUNNEL, OVERVIEW)

ANALYST = """
import json, sys
import duckdb
connection = duckdb.connect(sys.argv[1], read_only=True)
connection.execute("SET TimeZone = 'UTC'; SET threads = 1")
stream = None
for line in sys.stdin:
    verb, query = json.loads(line)
    if verb == "begin":
        connection.execute("BEGIN TRANSACTION")
        rows = []
    elif verb == "stream":
        stream = connection.cursor().execute(query)
        rows = stream.fetchmany(3)
    elif verb == "rest":
        rows = stream.fetchall()
    else:
        rows = connection.execute(query).fetchall()
    print(json.dumps(rows, default=str), flush=True)
"""


class Analyst:
    """Another process that has a database open."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def do(self, verb: str, query: str = "") -> list[list[Any]]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([verb, query]) + "\n")
        self._process.stdin.flush()
        answer: list[list[Any]] = json.loads(self._process.stdout.readline())
        return answer

    def ask(self, queries: Sequence[str] = QUESTIONS) -> list[list[list[Any]]]:
        """Ask several questions one after another."""
        return [self.do("ask", query) for query in queries]


@contextmanager
def analyst(storage: Storage) -> Iterator[Analyst]:
    """Open what is published in another process, and close it."""
    command = [sys.executable, "-c", ANALYST, str(storage.analytics)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield Analyst(process)
        process.communicate()


class Shop(NamedTuple):
    """A home that nights come to."""

    storage: Storage
    settings: Settings

    def night(self, cutoff: datetime, *, from_nothing: bool = False) -> WarehouseSummary:
        """Build and publish."""
        windows = make_windows(cutoff)
        done = build_warehouse(
            self.storage, self.settings, make_preset(), windows, from_nothing=from_nothing
        )
        publish_analytics(self.storage, self.settings, cutoff)
        return done

    def arrive(self, name: str, user_id: str) -> None:
        """Let one user's late event come."""
        write_events(
            [event(f"late {name}", user_id, "purchase", "2024-01-05 10:00:00", amount=1.25)],
            self.storage,
            arrival=name,
        )
        folder = self.storage.events / f"arrival={name}"
        changed = {"user_id": user_id, "activity_date": date(2024, 1, 5)}
        pq.write_table(
            pa.Table.from_pylist([changed], schema=CHANGES.schema),
            folder / "load=given" / "changes.parquet",
        )
        document = json.loads((folder / "load.json").read_text())
        write_json(folder / "load.json", document | {"changes_everything": False})

    def folders(self) -> set[str]:
        """Name the folders of sessionized events on disk."""
        return {folder.name for folder in self.storage.events_sessionized.glob("*=*")}

    def needed(self) -> set[str]:
        """Name the folders that the newest version needs."""
        layers = read_layers(self.storage.events_sessionized)
        return {f"base={layers.base.id}"} | {f"layer={layer.id}" for layer in layers.layers}


@pytest.fixture
def shop(tmp_path: Path, small_settings: Settings, built: Built) -> Shop:
    shop = Shop(Storage(tmp_path / "shop's [home]"), small_settings)
    write_events(shop_events(), shop.storage)
    plan = built.storage.home / "warehouse_plan.json"  # dbt need not compile once more
    shutil.copy(plan, shop.storage.home / plan.name)
    shop.night(LIVE_CUTOFF)
    return shop


def test_a_reader_keeps_its_night_over_many_nights(shop: Shop):
    with analyst(shop.storage) as reader, analyst(shop.storage) as streaming:
        before = reader.ask()
        reader.do("begin")
        first = streaming.do("stream", "SELECT user_id, event_id FROM events_sessionized")
        shop.arrive("2024-03-21", "user 01")
        assert shop.night(LATER).num_users_touched < 10
        assert reader.ask() == before
        for _ in range(3):  # each makes every file anew
            shop.night(LATER, from_nothing=True)
            assert reader.ask() == before
        rows = [*first, *streaming.do("rest")]
        assert sorted(row[1] for row in rows) == sorted(row["event_id"] for row in shop_events())
        with analyst(shop.storage) as newcomer:
            after = newcomer.ask()
            assert after[0] != before[0]
            assert sum(row[1] for row in after[0]) == sum(row[1] for row in before[0]) + 1
            assert after[3][0][1] == "2024-03-22 00:00:00+00"


def test_readers_of_two_nights_each_keep_their_own(shop: Shop):
    with analyst(shop.storage) as first:
        before = first.ask()
        shop.arrive("2024-03-21", "user 01")
        shop.night(LATER, from_nothing=True)
        with analyst(shop.storage) as second:
            between = second.ask()
            for day in range(2, 4):
                shop.arrive(f"2024-03-2{day}", f"user 0{day}")
                shop.night(LATER, from_nothing=True)
            assert first.ask() == before
            assert second.ask() == between != before


def test_what_nobody_reads_is_gone_a_build_later(shop: Shop):
    with analyst(shop.storage) as reader:
        before = reader.ask()
        opened = shop.needed()
        for _ in range(3):
            shop.night(LATER, from_nothing=True)
        assert opened < shop.folders()
        assert len(shop.folders()) == 3  # the open one, the one before, the newest
        assert reader.ask() == before
    shop.night(LATER, from_nothing=True)
    assert not opened & shop.folders()
    assert len(shop.folders()) == 2
    assert list(shop.storage.replaced_analytics.glob("*")) == []


def test_a_reader_that_is_killed_holds_nothing(shop: Shop):
    with analyst(shop.storage) as reader:
        reader.ask()
        shop.night(LATER, from_nothing=True)
        assert len(list(shop.storage.replaced_analytics.glob("*"))) == 1
        reader._process.kill()
        reader._process.wait()
        shop.night(LATER, from_nothing=True)
        assert list(shop.storage.replaced_analytics.glob("*")) == []


def test_what_is_published_keeps_answering_while_later_nights_are_held_back(shop: Shop):
    for _ in range(3):
        build_warehouse(
            shop.storage, shop.settings, make_preset(), make_windows(LATER), from_nothing=True
        )
    with analyst(shop.storage) as reader:
        assert len(reader.ask()[0]) > 50


def test_no_view_points_to_something_that_is_gone(shop: Shop):
    shop.arrive("2024-03-21", "user 01")
    shop.night(LATER)
    with duckdb.connect(str(shop.storage.analytics), read_only=True) as connection:
        views = connection.execute("SELECT view_name FROM duckdb_views() WHERE NOT internal")
        names = [name for (name,) in views.fetchall()]
        assert {"events_sessionized", "session_funnel", "rfm_segments", "user_overview"} <= set(
            names
        )
        assert all(connection.execute(f"SELECT * FROM {name}").fetchone() for name in names)
        schemas = connection.execute(
            "SELECT DISTINCT schema_name FROM duckdb_tables() UNION "
            "SELECT schema_name FROM duckdb_views() WHERE NOT internal"
        ).fetchall()
        assert schemas == [("main",)]
        mute = connection.execute(
            "SELECT table_name, column_name FROM duckdb_columns()"
            " WHERE NOT internal AND comment IS NULL"
            " UNION ALL SELECT table_name, '' FROM duckdb_tables() WHERE comment IS NULL"
            " UNION ALL SELECT view_name, '' FROM duckdb_views()"
            " WHERE NOT internal AND comment IS NULL"
        ).fetchall()
        assert mute == []


def test_an_older_night_does_not_replace_a_newer_one(shop: Shop):
    shop.night(LATER)
    build_warehouse(shop.storage, shop.settings, make_preset(), make_windows(LIVE_CUTOFF))
    assert publish_analytics(shop.storage, shop.settings, LIVE_CUTOFF) is False
    assert published_cutoff(shop.storage) == LATER
    with pytest.raises(PipelineError, match="built for the cutoff 2024-03-21"):
        publish_analytics(shop.storage, shop.settings, LATER)
