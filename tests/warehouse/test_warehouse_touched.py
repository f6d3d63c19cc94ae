"""A night rebuilds the users touched, in place, and gives what a build from nothing gives."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest
from night_builders import (
    Row,
    bring,
    differences,
    night_preset,
    rows_at_once,
    rows_of,
    tombstone,
)
from warehouse_builders import (
    INGESTED_AT,
    LIVE_CUTOFF,
    TEST_CUTOFF,
    Built,
    event,
    make_windows,
    shop_events,
)

from behavior_pipeline.errors import PipelineError
from behavior_pipeline.ingest.arrivals import Arrival
from behavior_pipeline.layers import EVENTS_FILE, USERS_FILE, Layers, read_layers
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage
from behavior_pipeline.warehouse import build as build_module
from behavior_pipeline.warehouse.build import WarehouseSummary, build_warehouse
from behavior_pipeline.warehouse.state import State, read_state, why_rebuild
from behavior_pipeline.warehouse.workbench import Workbench

EVENTS = shop_events()
NIGHT = "2024-03-20"
LATER = INGESTED_AT + timedelta(days=1)
WINDOWS = make_windows(LIVE_CUTOFF)
EARLIER = make_windows(TEST_CUTOFF)
FIRST, SECOND = EVENTS[0], next(row for row in EVENTS if row["user_id"] == "user 07")


class Home:
    """A home with a history, and what it takes to build it."""

    def __init__(self, storage: Storage, settings: Settings, built: Built) -> None:
        self.storage, self.settings, self.plan = storage, settings, built.plan
        storage.home.mkdir(parents=True)
        plan = built.storage.home / "warehouse_plan.json"  # compiled once for all tests
        shutil.copyfile(plan, storage.home / plan.name)
        bring(EVENTS, storage, settings)

    def bring(self, *rows: Row, arrival: str = NIGHT) -> None:
        bring(rows, self.storage, self.settings, arrival, LATER)

    def build(self, windows: object = WINDOWS, *, from_nothing: bool = False) -> WarehouseSummary:
        return build_warehouse(
            self.storage,
            self.settings,
            night_preset(),
            windows,  # type: ignore[arg-type]
            from_nothing=from_nothing,
        )

    @property
    def layers(self) -> Layers:
        return read_layers(self.storage.events_sessionized)

    @property
    def folders(self) -> set[str]:
        return {path.name for path in self.storage.events_sessionized.glob("*=*")}

    def faults(self, windows: object = WINDOWS) -> list[str]:
        """Name the models that are not what a build of everything at once gives."""
        expected = rows_at_once(self.storage, self.plan, windows)  # type: ignore[arg-type]
        return differences(rows_of(self.storage.warehouse, self.plan), expected)


@pytest.fixture
def home(storage: Storage, settings: Settings, built: Built) -> Home:
    return Home(storage, settings, built)


def late(number: int, user_id: str = "user 07", at: str = "2024-02-20 12:00") -> Row:
    return event(f"late {number}", user_id, "purchase", at, item_id="i", category="c", amount=5.0)


CHANGES: dict[str, tuple[list[Row], set[str]]] = {
    "late events": ([late(1), late(2, "someone new")], {"user 07", "someone new"}),
    "a repeat": ([SECOND], set()),
    "a correction": ([SECOND | {"amount": 99.0, "event_type": "purchase"}], {"user 07"}),
    "a deletion": ([tombstone(SECOND["event_id"])], {"user 07"}),
    "another user": ([SECOND | {"user_id": "user 09"}], {"user 07", "user 09"}),
    "a user's last event": ([tombstone(EVENTS[-1]["event_id"])], {"user last"}),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_night_builds_whom_it_touches_and_equals_a_build_at_once(home: Home, case: str) -> None:
    rows, touched = CHANGES[case]
    home.build()
    home.bring(*rows)
    done = home.build()
    assert (done.rebuilt, done.num_users_touched) == ("", len(touched))
    assert home.faults() == []
    layers = home.layers.layers
    assert len(layers) == bool(touched)
    if layers:
        users = pq.read_table(home.layers.layer_folder(layers[0]) / USERS_FILE)["user_id"]
        assert set(users.to_pylist()) == touched
        events = pq.read_table(home.layers.layer_folder(layers[0]) / EVENTS_FILE)["user_id"]
        assert set(events.to_pylist()) == touched - (
            {"user last"} if case == "a user's last event" else set()
        )


def test_rows_of_others_are_not_touched(home: Home) -> None:
    """What stands in a table of somebody else stays, even if it is wrong."""
    home.build()
    with duckdb.connect(str(home.storage.warehouse)) as connection:
        connection.execute("UPDATE user_days SET num_night_events = -1")
    base = {path: path.stat().st_mtime_ns for path in home.layers.base_files()}
    home.bring(late(1))
    home.build()
    with duckdb.connect(str(home.storage.warehouse), read_only=True) as connection:
        others = connection.execute(
            "SELECT user_id <> 'user 07' AS is_other, max(num_night_events), min(num_night_events) "
            "FROM user_days GROUP BY is_other ORDER BY is_other"
        ).fetchall()
    assert others[1] == (True, -1, -1)
    assert others[0][2] >= 0
    assert {path: path.stat().st_mtime_ns for path in home.layers.base_files()} == base


def test_another_night_builds_the_users_between_the_cutoffs(home: Home) -> None:
    few = [row for row in EVENTS if not TEST_CUTOFF <= row["occurred_at"] < LIVE_CUTOFF]
    some = [row for row in EVENTS if row not in few and row["user_id"] < "user 05"]
    other = Storage(home.storage.home.parent / "few")
    other.home.mkdir()
    shutil.copyfile(home.storage.home / "warehouse_plan.json", other.home / "warehouse_plan.json")
    bring([*few, *some], other, home.settings)
    home.storage = other
    home.build(EARLIER)
    for windows in (WINDOWS, EARLIER):
        done = home.build(windows)
        assert done.rebuilt == ""
        assert done.num_users_touched == len({row["user_id"] for row in some})
        assert home.faults(windows) == []


def test_a_night_of_nothing_new_changes_no_row_and_adds_no_layer(home: Home) -> None:
    home.build()
    before = rows_of(home.storage.warehouse, home.plan)
    done = home.build()
    assert (done.rebuilt, done.num_users_touched) == ("", 0)
    assert rows_of(home.storage.warehouse, home.plan) == before
    assert home.layers.layers == ()


def test_tests_of_the_touched_fail_a_night_and_the_next_does_its_work_again(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.build()
    home.bring(late(1))
    state = read_state(home.storage.warehouse)
    before = rows_of(home.storage.warehouse, home.plan)
    with monkeypatch.context() as patch:
        patch.setattr(Workbench, "check", lambda _self, test: int(test.model == "user_days"))
        with pytest.raises(PipelineError, match=r"user_days_\w+ \(1 rows\)"):
            home.build()
    assert read_state(home.storage.warehouse) == state
    assert rows_of(home.storage.warehouse, home.plan) == before
    assert home.layers.layers == ()
    assert home.build().num_users_touched == 1
    assert home.faults() == []


def test_too_many_touched_users_rebuild_everybody(home: Home) -> None:
    home.build()
    users = sorted({row["user_id"] for row in EVENTS})[:14]
    home.bring(*[late(number, user) for number, user in enumerate(users)])
    done = home.build()
    assert done.rebuilt == "14 of 61 users are touched"
    assert done.num_users_touched == done.num_users == 61
    assert home.faults() == []


def test_many_users_in_layers_rebuild_everybody(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_module, "MAX_LAYERED_SHARE", 0.02)  # more than one user of 61
    home.build()
    for number in range(2):
        home.bring(late(number), arrival=f"2024-03-1{number}")
        assert home.build().rebuilt == ""
    home.bring(late(2))
    assert home.build().rebuilt == "more than half of the users are in layers"
    assert home.layers.layers == ()
    assert home.faults() == []


def test_a_forced_build_equals_the_nights(home: Home) -> None:
    home.build()
    home.bring(late(1), SECOND | {"amount": 1.0}, tombstone(FIRST["event_id"]))
    home.build()
    nights = rows_of(home.storage.warehouse, home.plan)
    done = home.build(from_nothing=True)
    assert done.rebuilt == "asked for"
    assert rows_of(home.storage.warehouse, home.plan) == nights


def test_the_old_base_stays_for_one_build(home: Home) -> None:
    home.build()
    first = home.layers
    home.bring(late(1))
    home.build()
    assert len(home.folders) == 2
    home.build(from_nothing=True)
    assert f"base={first.base.id}" in home.folders  # somebody may be reading it
    assert len(home.folders) == 3
    home.build()
    assert home.folders == {f"base={home.layers.base.id}"}


STATE = State(
    "f", {"history": "a"}, "2024-03-21 00:00:00+00", 9, {"layers": [], "base": {}, "num_buckets": 1}
)
LOADED = Arrival("history", "a", "a", "a", Path(), is_bucketed=False, changes_everything=True)
BULK = replace(LOADED, load_id="b")
NEW = replace(LOADED, key=NIGHT, changes_everything=False)


@pytest.mark.parametrize(
    ("state", "fingerprint", "arrivals", "reason"),
    [
        (None, "f", [LOADED], "there is no warehouse yet"),
        (STATE, "g", [LOADED], "the SQL or its variables have changed"),
        (STATE, "f", [NEW], "an arrival is gone"),
        (STATE, "f", [BULK], "a bulk load came"),
        (replace(STATE, layers={"layers": [{}] * 30}), "f", [LOADED], "there are 30 layers"),
        (replace(STATE, layers={"layers": [{}] * 29}), "f", [LOADED, NEW], ""),
        (STATE, "f", [LOADED], ""),
    ],
)
def test_why_everybody_is_rebuilt(
    state: State | None, fingerprint: str, arrivals: list[Arrival], reason: str
) -> None:
    assert why_rebuild(state, fingerprint, arrivals) == reason


def killed(home: Home, step: str, model: str | None = None, time: int = 1) -> None:
    """Build in a process of its own, which kills itself when a step of the build is called."""
    about = {
        "home": str(home.storage.home),
        "settings": home.settings.model_dump_json(),
        "cutoff": LIVE_CUTOFF.isoformat(),
        "step": step,
        "model": model,
        "time": time,
        "share": build_module.MAX_TOUCHED_SHARE,
    }
    program = Path(__file__).with_name("dying_build.py")
    done = subprocess.run(
        [sys.executable, str(program), json.dumps(about)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.parametrize("step", ["_finish", "run_tests", "write_state", "point_to_layers"])
def test_a_kill_between_layer_and_state_heals(home: Home, step: str) -> None:
    home.build()
    before = home.layers
    home.bring(late(1), tombstone(FIRST["event_id"]))
    killed(home, step)
    assert home.layers == before  # readers see the version before
    assert len(home.folders) == 2
    done = home.build()
    assert done.rebuilt == ""
    assert home.faults() == []
    assert len(home.layers.layers) == 1
    newest = home.layers.layers[0].id
    assert home.folders == {f"base={before.base.id}", f"layer={newest}"}


@pytest.mark.parametrize(
    ("model", "time"),
    [("int_user_diversity", 1), ("user_days", 1), ("daily_activity", 3), ("user_rfm", 1)],
)
def test_a_kill_inside_a_model_leaves_the_night_before(home: Home, model: str, time: int) -> None:
    """It dies between what it takes away and what it puts there."""
    home.build()
    home.bring(late(1), tombstone(FIRST["event_id"]))
    before = rows_of(home.storage.warehouse, home.plan)
    killed(home, "_run", model, time)
    assert rows_of(home.storage.warehouse, home.plan) == before
    assert home.build().rebuilt == ""
    assert home.faults() == []


@pytest.mark.parametrize("model", ["int_user_diversity", "user_days", "user_rfm"])
def test_a_kill_inside_a_model_heals_also_when_only_the_cutoff_moved(
    home: Home, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whom the cutoff touches is read from a table that the build itself writes."""
    monkeypatch.setattr(build_module, "MAX_TOUCHED_SHARE", 1.0)
    home.build(EARLIER)
    killed(home, "_run", model)
    assert home.build().rebuilt == ""
    assert home.faults() == []


def test_another_night_after_a_killed_one_knows_nothing_of_it(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The killed night was a later one: its users have features of before their cutoff again."""
    monkeypatch.setattr(build_module, "MAX_TOUCHED_SHARE", 1.0)
    home.build(EARLIER)
    killed(home, "write_state")
    home.build(EARLIER)
    assert home.faults(EARLIER) == []


def test_a_load_taken_back_after_a_killed_night_leaves_nothing(home: Home) -> None:
    home.bring(late(1))
    home.build()
    home.bring(late(1) | {"amount": 1_000.0})
    killed(home, "write_state")
    home.bring(late(1))
    home.build()
    assert home.faults() == []


def test_a_lost_warehouse_starts_no_version_anew(home: Home) -> None:
    """Whoever made something of a version must see that a build came after it."""
    home.build()
    home.bring(late(1))
    home.build()
    version = home.layers.version
    home.storage.warehouse.unlink()
    assert home.build().rebuilt == "there is no warehouse yet"
    assert home.layers.version == version + 1
    assert home.layers.users_files(version) is None


def test_lost_events_are_built_anew(home: Home) -> None:
    home.build()
    shutil.rmtree(home.storage.events_sessionized)
    home.bring(late(1))
    assert home.build().rebuilt == "sessionized events are gone"
    assert home.faults() == []


def test_quarantine_that_changes_alone_leaves_one_version_of_a_repeat(home: Home) -> None:
    """The arrival keeps its files and their time, whoever looks at them and when."""
    home.bring(FIRST)
    home.bring(FIRST, {"event_id": "bad", "user_id": "user 07"})
    bring([*EVENTS, {"event_id": "bad"}], home.storage, home.settings, at=LATER)
    home.bring(FIRST, {"event_id": "bad"})
    home.build()
    assert home.faults() == []
