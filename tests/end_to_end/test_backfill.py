"""Four nights are backfilled from the page; the process of one of them is killed on its way."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import dagster as dg
import duckdb
import polars as pl
import pytest

from behavior_pipeline.defs.resources import night_of
from behavior_pipeline.defs.warehouse import ASSETS as MODELS
from behavior_pipeline.ingest.load import load_arrival
from behavior_pipeline.ingest.simulator import simulate
from behavior_pipeline.pipeline import open_pipeline
from behavior_pipeline.run_launcher import PID_TAG, is_alive
from behavior_pipeline.storage import Storage
from behavior_pipeline.warehouse.build import build_warehouse
from behavior_pipeline.windows import cutoff_of

from .conftest import Installation, new_installation, serving

pytestmark = [pytest.mark.slow]

NUM_DAYS = 60
FIRST = date(2026, 1, 1)
NIGHTS = [f"{FIRST + timedelta(days=NUM_DAYS - 4 + number)}" for number in range(4)]
KILLED = NIGHTS[1]
WINDOWS = {"horizon_days": 7, "lookback_days": 20}
ASSETS = ["arrived_events", *MODELS, "marts"]
WRITERS = {"arrived_events", "warehouse"}
SECONDS = 300
Found = TypeVar("Found")


LAUNCH = """
mutation Launch($parameters: LaunchBackfillParams!) {
  launchPartitionBackfill(backfillParams: $parameters) {
    __typename
    ... on LaunchBackfillSuccess { backfillId }
    ... on PythonError { message }
    ... on InvalidSubsetError { message }
  }
}
"""
STATE = """
query State($id: String!) {
  partitionBackfillOrError(backfillId: $id) {
    ... on PartitionBackfill {
      status
      assetBackfillData {
        assetBackfillStatuses {
          ... on AssetPartitionsStatusCounts {
            assetKey { path } numPartitionsTargeted numPartitionsMaterialized numPartitionsFailed
          }
        }
      }
    }
  }
}
"""


@dataclass(frozen=True)
class Step:
    """A step at work: in the process that finished it, or until its process was gone."""

    night: str
    name: str
    started: float
    ended: float


@dataclass(frozen=True)
class Backfill:
    """What a backfill left behind."""

    installation: Installation
    state: dict[str, Any]
    steps: list[Step]
    runs: list[dg.DagsterRun]
    lines: list[str]


def land(folder: Path) -> None:
    """Split a simulation by the day on which its events arrive: some late, twice or corrected."""
    chance = random.Random(5)  # noqa: S311 - no secret
    simulate(folder.parent / "simulation", 150, NUM_DAYS, 0, FIRST)
    events = pl.read_parquet(folder.parent / "simulation" / "*.parquet")
    days = events["event_time"].dt.date().cast(pl.String).fill_null(NIGHTS[0])
    nights = days.map_elements(lambda day: max(day, NIGHTS[0]), return_dtype=pl.String)
    arrivals = [
        chance.choice(NIGHTS[NIGHTS.index(night) :]) if chance.random() < 0.05 else night
        for night in nights
    ]
    events = events.with_columns(pl.Series("night", arrivals))
    is_rare = pl.col("user_id").str.ends_with("7")  # few users come later: they are built in place
    events = events.filter((pl.col("night") == NIGHTS[0]) | is_rare)
    again = events.filter((pl.col("night") < NIGHTS[2]) & is_rare).sample(80, seed=1)
    repeated = again.head(40).with_columns(night=pl.lit(NIGHTS[3]))
    corrected = again.tail(40).with_columns(night=pl.lit(NIGHTS[3]), category=pl.lit("corrected"))
    for (night,), rows in pl.concat([events, repeated, corrected]).group_by("night"):
        (folder / str(night)).mkdir(parents=True)
        rows.drop("night").write_parquet(folder / str(night) / "events.parquet")


@pytest.fixture(scope="module")
def landing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shop") / "landing"
    land(folder)
    return folder


@pytest.fixture(scope="module")
def backfill(landing: Path, tmp_path_factory: pytest.TempPathFactory) -> Backfill:
    """Backfill the nights from the page, in no order, and kill -9 one of them at the warehouse."""
    folder = tmp_path_factory.mktemp("backfill")
    installation = new_installation(folder / "data")
    settings = {"BEHAVIOR_PATH": f"{landing}/{{date}}/*.parquet"} | {
        f"BEHAVIOR_{name.upper()}": str(days) for name, days in WINDOWS.items()
    }
    with serving(installation, folder / "ui.log", settings) as address, records(installation) as of:
        parameters = {
            "partitionNames": [NIGHTS[number] for number in (2, 0, 3, 1)],
            "assetSelection": [{"path": [name]} for name in ASSETS],
        }
        launched = ask(address, LAUNCH, {"parameters": parameters})["launchPartitionBackfill"]
        assert "backfillId" in launched, launched
        run = wait_for(lambda: run_at_warehouse(of, KILLED))
        os.kill(int(run.tags[PID_TAG]), signal.SIGKILL)
        variables = {"id": launched["backfillId"]}

        def finished() -> dict[str, Any] | None:
            state = ask(address, STATE, variables)["partitionBackfillOrError"]
            return None if state["status"] in {"REQUESTED", "FAILING"} else state

        state = wait_for(finished)
        runs = of.get_runs()
        steps = sorted(steps_of(of, runs), key=lambda step: step.started)
        lines = [
            entry.user_message
            for run in runs
            for entry in of.all_logs(run.run_id)
            if entry.dagster_event is None
        ]
    return Backfill(installation, state, steps, runs, lines)


@contextmanager
def records(installation: Installation) -> Iterator[dg.DagsterInstance]:
    """Open Dagster's own records; in the end, kill what is at work: it would outlive the page."""
    with dg.DagsterInstance.from_config(str(installation.root / "dagster")) as instance:
        try:
            yield instance
        finally:
            for run in instance.get_runs():
                if is_alive(run.tags):
                    os.kill(int(run.tags[PID_TAG]), signal.SIGKILL)


def ask(address: str, query: str, variables: dict[str, Any]) -> dict[str, Any]:
    """Ask what the page asks."""
    body = json.dumps({"query": query, "variables": variables}).encode()
    request = Request(f"{address}/graphql", body, {"Content-Type": "application/json"})  # noqa: S310 - our own server
    try:
        with urlopen(request, timeout=60) as response:  # noqa: S310 - our own server
            answer = json.loads(response.read())
    except HTTPError as error:
        raise AssertionError(error.read().decode()) from error
    assert "errors" not in answer, answer
    data: dict[str, Any] = answer["data"]
    return data


def wait_for(look: Callable[[], Found | None]) -> Found:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        found = look()
        if found is not None:
            return found
        time.sleep(0.2)
    raise AssertionError("nothing came")


def run_at_warehouse(instance: dg.DagsterInstance, night: str) -> dg.DagsterRun | None:
    """Return the run of a night once it builds the warehouse."""
    assert not instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.FAILURE]))
    for run in (run for run in instance.get_runs() if night_of(run.tags) == night):
        started = instance.all_logs(run.run_id, of_type=dg.DagsterEventType.STEP_START)
        if any(entry.step_key == "warehouse" for entry in started):
            return run
    return None


def steps_of(instance: dg.DagsterInstance, runs: list[dg.DagsterRun]) -> Iterator[Step]:
    """Yield when each step was at work, also one whose process was killed."""
    for run in runs:
        night, open_steps = str(night_of(run.tags)), {}
        for entry in instance.all_logs(run.run_id):
            event = entry.dagster_event
            if event is None:
                continue
            kind, name = event.event_type, str(event.step_key)
            if kind == dg.DagsterEventType.STEP_START:
                open_steps[name] = entry.timestamp
            elif kind in {dg.DagsterEventType.STEP_SUCCESS, dg.DagsterEventType.STEP_FAILURE}:
                yield Step(night, name, open_steps.pop(name), entry.timestamp)
            elif entry.message.startswith("Detected run worker status"):
                for killed, started in open_steps.items():
                    yield Step(night, killed, started, entry.timestamp)
                open_steps = {}


def test_every_night_is_materialized_though_one_was_killed(backfill: Backfill) -> None:
    assert backfill.state["status"] == "COMPLETED_SUCCESS"
    counted = backfill.state["assetBackfillData"]["assetBackfillStatuses"]
    assert {asset["assetKey"]["path"][0] for asset in counted} == set(ASSETS)
    for asset in counted:
        assert asset["numPartitionsMaterialized"] == asset["numPartitionsTargeted"] == len(NIGHTS)
        assert asset["numPartitionsFailed"] == 0
    assert len(backfill.runs) == len(NIGHTS)
    num_tries = [step.night for step in backfill.steps if step.name == "warehouse"]
    assert num_tries.count(KILLED) == 2


def test_nights_follow_one_another_oldest_first(backfill: Backfill) -> None:
    assert [step.night for step in backfill.steps if step.name == "marts"] == NIGHTS
    assert all(first.night <= second.night for first, second in pairwise(backfill.steps))


def test_one_step_at_a_time_writes(backfill: Backfill) -> None:
    writers = [step for step in backfill.steps if step.name in WRITERS]
    assert len(writers) >= len(WRITERS) * len(NIGHTS)
    assert all(first.ended <= second.started for first, second in pairwise(writers))


def test_the_page_shows_where_a_night_is(backfill: Backfill) -> None:
    shown = [line for line in backfill.lines if line.startswith("building: ")]
    assert any("bucket 2 of 2: " in line for line in shown)
    assert any(re.search(r"\d+ users touched: ", line) for line in shown)


def test_nothing_is_left_of_the_killed_process(backfill: Backfill) -> None:
    assert not list(backfill.installation.storage.home.rglob("*.aside"))


def test_tables_equal_those_of_a_home_built_from_nothing(
    backfill: Backfill, landing: Path, tmp_path: Path
) -> None:
    opened = open_pipeline(
        data_root=tmp_path, source="simulated", path=str(landing), num_buckets=2, **WINDOWS
    )
    for night in reversed(NIGHTS):
        path = f"{landing}/{{date}}/*.parquet"
        day, now = date.fromisoformat(night), datetime.now(UTC)
        load_arrival(opened.preset, path, opened.storage, opened.settings, night, now, day=day)
    windows = opened.windows(cutoff_of(NIGHTS[-1]))
    settings = opened.settings.model_copy(update={"num_targets": 5})
    build_warehouse(opened.storage, settings, opened.preset, windows, from_nothing=True)

    backfilled, fresh = (
        tables(storage) for storage in (backfill.installation.storage, opened.storage)
    )
    assert {"events_sessionized", "sessions", "user_rfm", "labels"} <= set(fresh)
    assert set(backfilled) == set(fresh)
    assert [name for name in fresh if backfilled[name] != fresh[name]] == []


def tables(storage: Storage) -> dict[str, list[tuple[Any, ...]]]:
    """Read what a warehouse has for analysts, but when its rows were loaded."""
    with duckdb.connect(str(storage.warehouse), read_only=True) as connection:
        connection.execute("SET TimeZone = 'UTC'")
        names = connection.execute(
            "SELECT DISTINCT table_name FROM duckdb_columns() "
            "WHERE schema_name = 'main' AND NOT internal "
            "AND NOT regexp_matches(table_name, '^(stg|int)_')"
        ).fetchall()
        return {
            name: sorted(
                connection.execute(
                    f"SELECT columns(name -> name <> 'ingested_at') FROM {name}"
                ).fetchall(),
                key=repr,
            )
            for (name,) in names
        }
