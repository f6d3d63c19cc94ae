"""Whatever arrives in whatever order, however often it is run: the tables are those of one build.

`make test` tries 120 histories, `make test-long` 5,000 of them: BEHAVIOR_HISTORIES says how many,
BEHAVIOR_HISTORY_SHARDS how many tests share them, and BEHAVIOR_HISTORY_SEED begins with others.
BEHAVIOR_PLAN may name a compiled plan, for machines without dbt.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pytest
from history_builders import SHOP_WITH_IDS, WINDOWS, History, Limits, Step, histories, write_parts
from history_oracle import (
    Content,
    Counted,
    count_events,
    is_refused,
    keep_times,
    read_content,
    sessionize,
    users_changed,
)
from hypothesis import event, given, seed
from hypothesis import settings as hypothesis_settings
from warehouse_builders import bucket_of, run_at_once

from behavior_pipeline.errors import PipelineError
from behavior_pipeline.ingest import staging
from behavior_pipeline.ingest.arrivals import LoadSummary, find_arrival, loaded_arrivals
from behavior_pipeline.ingest.load import load_arrival
from behavior_pipeline.layers import read_layers
from behavior_pipeline.sequences import affected, files
from behavior_pipeline.sequences.files import write_sequences
from behavior_pipeline.sequences.reading import count_users, read_bucket, touched_files
from behavior_pipeline.sequences.vocabulary import Vocabulary
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage
from behavior_pipeline.warehouse import build, state
from behavior_pipeline.warehouse.build import WarehouseSummary, build_warehouse
from behavior_pipeline.warehouse.plan import Plan, load_plan
from behavior_pipeline.warehouse.workbench import EVENTS, Workbench

NUM_HISTORIES = int(os.environ.get("BEHAVIOR_HISTORIES", "120"))
NUM_SHARDS = int(os.environ.get("BEHAVIOR_HISTORY_SHARDS", "4"))
FIRST_SEED = int(os.environ.get("BEHAVIOR_HISTORY_SEED", "0"))
PLAN = os.environ.get("BEHAVIOR_PLAN")
IN_MEMORY = Path("/dev/shm")  # noqa: S108 - a folder of random name is made in it

MIDNIGHT = datetime(2024, 6, 1, tzinfo=UTC)
VOCABULARY = Vocabulary(
    values={
        "action": ("view", "buy"),
        "item": ("a1", "a2", "b1"),
        "category": ("a", "ü"),
        "location": (),
    },
    counts={"action": (2, 1), "item": (3, 2, 1), "category": (2, 1), "location": ()},
    amount_edges=(0.0, 1.5),
    ignored_event_types=("ping",),
    trained_through=WINDOWS[0].train_cutoff,
)


def _settings(num_buckets: int) -> Settings:
    return Settings(
        memory_limit="1GB",
        threads=1,
        num_buckets=num_buckets,
        num_targets=3,
        max_sequence_events=4,
        max_quarantined_share=1.0,
    )


def _in_utc(connection: duckdb.DuckDBPyConnection) -> duckdb.DuckDBPyConnection:
    connection.execute("SET TimeZone = 'UTC'; SET threads = 1")
    return connection


READER = _in_utc(duckdb.connect())


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the plan once; it is the same for every history."""
    storage = Storage(tmp_path_factory.mktemp("plan"))
    file = storage.home / "warehouse_plan.json"
    if PLAN and Path(PLAN).is_file():
        shutil.copy(PLAN, file)
    load_plan(storage, _settings(1), SHOP_WITH_IDS, WINDOWS[0])
    return file


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("shard", range(NUM_SHARDS))
def test_nights_in_any_order_with_re_runs_and_backfills_equal_a_build_from_nothing(
    shard: int, plan_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths: Counter[str] = Counter()
    num_histories = NUM_HISTORIES // NUM_SHARDS + (shard < NUM_HISTORIES % NUM_SHARDS)

    @seed(FIRST_SEED + shard)
    @hypothesis_settings(max_examples=num_histories, database=None)
    @given(histories())
    def check(history: History) -> None:
        taken = _check(history, plan_file)
        for path in taken:
            event(path)
        paths.update({"histories", *taken})

    check()
    with capsys.disabled():
        taken = ", ".join(f"{num} {path}" for path, num in sorted(paths.items()))
        print(f"\nshard {shard}: {taken}")  # noqa: T201 - how much was tried
    _refuse_idle(paths, num_histories)


def _refuse_idle(paths: Counter[str], num_histories: int) -> None:
    """A shard whose histories never take the paths in question has shown nothing."""
    wanted = {
        "build: users touched": 0.3,
        "build: everybody": 0.3,
        "build: two layers": 0.05,
        "sequences: linked": 0.04,
        "in parallel": 0.2,
    }
    found = {path: paths[path] / num_histories for path in wanted}
    too_few = {path: share for path, share in found.items() if share < wanted[path]}
    assert num_histories < 40 or not too_few


@dataclass
class _Home:
    """A home with what was done in it.

    Attributes:
        loaded: what each arrival says, read apart.
        versions: which of its files were loaded last.
        night: the windows of the last build; None before the first.
        paths: what happened.
        num_steps: loads so far.
    """

    history: History
    storage: Storage
    raw: Path
    settings: Settings
    loaded: dict[str, Content] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)
    night: int | None = None
    paths: set[str] = field(default_factory=set)

    num_steps: int = 0

    def counted(self) -> dict[str, Counted]:
        return count_events(self.loaded)

    def time_of(self, arrival: str) -> datetime:
        """Return the time at which an arrival is loaded by the step that is next."""
        self.num_steps += 1
        if self.history.has_own_times:
            return MIDNIGHT + timedelta(minutes=self.num_steps)
        return MIDNIGHT + timedelta(days=self.history.order.index(arrival))


def _check(history: History, plan_file: Path) -> set[str]:
    """Live through a history, and compare what it leaves with a build from nothing."""
    place = IN_MEMORY if IN_MEMORY.is_dir() else None
    with (
        tempfile.TemporaryDirectory(dir=place) as name,
        _small(history.limits) as paths,
    ):
        folder = Path(name)
        home = _new_home(history, folder, "nights", plan_file)
        home.paths = paths
        for group in history.steps:
            _run(home, group)
        if not home.loaded:  # every load was refused
            return {"nothing loaded"}
        _run(home, (Step("build", night=history.night),))
        _run(home, (Step("write", night=history.night),))
        _compare(home, _from_nothing(home, folder, plan_file))
        return home.paths


def _new_home(history: History, folder: Path, name: str, plan_file: Path) -> _Home:
    storage = Storage(folder / name)
    storage.home.mkdir()
    shutil.copy(plan_file, storage.home / "warehouse_plan.json")
    return _Home(history, storage, folder / "raw", _settings(history.limits.num_buckets))


@contextmanager
def _small(limits: Limits) -> Iterator[set[str]]:
    """Let few users reach every path; yield what is noticed of them."""
    noticed: set[str] = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staging, "BULK_ROWS", limits.bulk_rows)
        patch.setattr(build, "MAX_TOUCHED_SHARE", limits.max_touched_share)
        patch.setattr(build, "MAX_LAYERED_SHARE", limits.max_layered_share)
        patch.setattr(state, "MAX_LAYERS", limits.max_layers)
        patch.setattr(affected, "MAX_AFFECTED_SHARE", limits.max_affected_share)
        patch.setattr(files, "MAX_TOUCHED_FILES", limits.max_touched_files)
        patch.setattr(files, "ROW_GROUP_USERS", limits.row_group_users)
        patch.setattr(files, "_compact", _noticing(files._compact, noticed))
        patch.setattr(Workbench, "_describe", lambda *_, **__: None)  # comments take half the time
        yield noticed


def _noticing(compact: Any, noticed: set[str]) -> Any:
    """Notice that files were compacted."""

    def compacting(folder: Path) -> None:
        before = len(list(folder.rglob("*.parquet")))
        compact(folder)
        if len(list(folder.rglob("*.parquet"))) < before:
            noticed.add("sequences: compacted")

    return compacting


def _run(home: _Home, group: tuple[Step, ...]) -> None:
    """Do one thing, or two at once."""
    if len(group) == 1:
        _do(home, group[0])
    else:
        home.paths.add("in parallel")
        with ThreadPoolExecutor(len(group)) as pool:
            done = [pool.submit(_do, home, step, is_alone=False) for step in group]
        for each in done:
            each.result()


def _do(home: _Home, step: Step, *, is_alone: bool = True) -> None:
    if step.action == "load":
        _load(home, step, is_alone=is_alone)
    elif step.action == "build":
        _build(home, step.night, is_alone=is_alone)
    elif step.action == "write":
        _write(home, step.night)
    else:  # a warehouse that is lost is built again
        home.storage.warehouse.unlink(missing_ok=True)
        home.paths.add("warehouse lost")


def _load(home: _Home, step: Step, *, is_alone: bool) -> None:
    """Load an arrival from its files as they are now; it counts what the oracle counts."""
    history, arrival = home.history, step.arrival
    parts = history.parts(arrival, step.version)
    content = read_content(parts, has_ids=history.has_ids)
    path, now = write_parts(home.raw / arrival, parts), home.time_of(arrival)
    before, known = home.counted() if is_alone else {}, find_arrival(home.storage, arrival)
    try:
        summary = load_arrival(
            history.preset,
            str(path),
            home.storage,
            home.settings,
            arrival,
            now,
        )
    except PipelineError:
        assert is_refused(arrival, content, home.loaded.get(arrival))
        home.paths.add("load: refused")
        return
    assert not is_refused(arrival, content, home.loaded.get(arrival))
    home.loaded[arrival] = keep_times(content, home.loaded.get(arrival), now)
    home.versions[arrival] = step.version
    if known is not None:
        home.paths.add("load: again")
    if known == find_arrival(home.storage, arrival):  # what was recorded then still holds
        return
    _compare_summary(summary, content)
    if is_alone:
        assert summary.num_users_touched == len(users_changed(before, home.counted()))


def _compare_summary(summary: LoadSummary, content: Content) -> None:
    assert summary.num_read == content.num_rows
    assert summary.num_stored == len(content.events)
    assert summary.num_deletions == len(content.deletions)
    assert summary.num_quarantined == content.num_quarantined


def _build(home: _Home, night: int, *, is_alone: bool) -> None:
    if not loaded_arrivals(home.storage):
        return
    summary = build_warehouse(home.storage, home.settings, home.history.preset, WINDOWS[night])
    home.night = night
    home.paths.add(_path_of(summary))
    if len(read_layers(home.storage.events_sessionized).layers) > 1:
        home.paths.add("build: two layers")
    if is_alone:
        _compare_with_oracle(home)


def _path_of(summary: WarehouseSummary) -> str:
    if summary.rebuilt:
        return "build: everybody"
    return "build: users touched" if summary.num_users_touched else "build: night alone"


def _write(home: _Home, night: int) -> None:
    """Write sequences on top of all that were written before."""
    if home.night is None:
        return
    earlier = sorted((home.storage.home / "sequences").glob("cutoff=*"))
    cutoff = WINDOWS[night].cutoff
    folder = home.storage.sequences(cutoff)
    try:
        write_sequences(home.storage, home.settings, VOCABULARY, cutoff, folder, earlier=earlier)
    except PipelineError as error:
        assert "no event before" in str(error)  # noqa: PT017 - most writes are not refused
        shutil.rmtree(folder, ignore_errors=True)  # it holds a night back, so nobody reads the old
        return
    if any(touched_files(file) for file in folder.glob("bucket=*.parquet")):
        home.paths.add("sequences: linked")


def _compare_with_oracle(home: _Home) -> None:
    """Compare all sessionized events, read through their layers, with plain Python."""
    columns = (
        "event_id, user_id, event_type, occurred_at, item_id, category, amount, ingested_at, "
        "event_number, gap_seconds, session_started_at, user_bucket"
    )
    wanted = sorted(
        (name, *row.counted.event, row.counted.ingested_at, *row[1:],
         bucket_of(row.counted.event.user_id, home.history.limits.num_buckets))
        for name, row in sessionize(home.counted()).items()
    )  # fmt: skip
    assert _sessionized(home, columns) == wanted


def _sessionized(home: _Home, columns: str) -> list[tuple[Any, ...]]:
    relation = read_layers(home.storage.events_sessionized).relation()
    with READER.cursor() as connection:
        return sorted(connection.execute(f"SELECT {columns} FROM ({relation})").fetchall())


def _from_nothing(home: _Home, folder: Path, plan_file: Path) -> _Home:
    """Load the last files of every arrival into a fresh home, and build it in one go."""
    history = home.history
    fresh = _new_home(history, folder, "at_once", plan_file)
    for arrival in history.order:
        if arrival in home.versions:
            _load(fresh, Step("load", arrival, home.versions[arrival]), is_alone=True)
    windows = WINDOWS[history.night]
    build_warehouse(fresh.storage, fresh.settings, history.preset, windows, from_nothing=True)
    fresh.night = history.night
    _write(fresh, history.night)
    return fresh


def _compare(home: _Home, fresh: _Home) -> None:
    """Compare every table, view and sequence."""
    assert home.loaded == fresh.loaded
    windows = WINDOWS[home.history.night]
    plan = load_plan(home.storage, home.settings, home.history.preset, windows)
    _compare_with_oracle(home)
    names = [model.name for model in plan.models]
    kept, built = _tables(home, plan), _tables(fresh, plan)
    with run_at_once(plan, home.storage, windows) as connection:
        together = _rows_of(connection, plan)
    for name in names:
        assert kept[name] == together[name], name
        if not (home.history.has_own_times and name in _TIMED):
            assert kept[name] == built[name], name
    assert _sequences(home) == _sequences(fresh)


def _tables(home: _Home, plan: Plan) -> dict[str, list[str]]:
    with _in_utc(duckdb.connect(str(home.storage.warehouse), read_only=True)) as connection:
        return _rows_of(connection, plan)


_TIMED = {EVENTS, "int_event_versions"}
"""Hold the times of loads, which a fresh home has not seen: the oracle says what is right."""

_SOURCES = {"stg_events", "int_event_gaps", "int_session_starts"}
"""Views over what is at work: empty names once a build is over."""


def _rows_of(connection: duckdb.DuckDBPyConnection, plan: Plan) -> dict[str, list[str]]:
    """Return every model's rows, in one order."""
    found = {}
    for model in plan.models:
        if model.name in _SOURCES:
            found[model.name] = []
            continue
        columns = ", ".join(f'"{each.name}"::{each.type}' for each in model.columns)
        rows = connection.execute(f"SELECT {columns} FROM {model.name}").fetchall()
        found[model.name] = sorted(map(repr, rows))
    assert found[EVENTS] is not None
    return found


def _sequences(home: _Home) -> list[dict[str, Any]]:
    """Return every user's sequence at the last night's cutoff, read in small chunks."""
    folder = home.storage.sequences(WINDOWS[home.history.night].cutoff)
    found = [
        row
        for file in sorted(folder.glob("bucket=*.parquet"))
        for chunk in read_bucket(file, 2)
        for row in chunk.to_pylist()
    ]
    users = [row["user_id"] for row in found]
    assert len(users) == len(set(users)) == (count_users(folder) if folder.is_dir() else 0)
    return sorted(found, key=lambda row: str(row["user_id"]))
