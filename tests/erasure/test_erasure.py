"""Erased users are nowhere below the home, stay away, and nobody else notices."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
from feature_store_builders import vectors, write_embeddings, write_rfm
from forensics import places_with, rows_without
from night_builders import Row, bring, differences, night_preset, rows_at_once, rows_of
from warehouse_builders import INGESTED_AT, LIVE_CUTOFF, make_windows, shop_events

from behavior_pipeline.defs.checks import _is_whole
from behavior_pipeline.erasure import erase as erase_module
from behavior_pipeline.erasure.erase import complete_erasure, erase
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.feature_store.lookup import lookup
from behavior_pipeline.feature_store.publish import publish_view
from behavior_pipeline.ingest.arrivals import load_document
from behavior_pipeline.pipeline import Pipeline
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage
from behavior_pipeline.warehouse.analytics import publish_analytics
from behavior_pipeline.warehouse.build import build_warehouse
from behavior_pipeline.warehouse.plan import kept_plan

EVENTS = shop_events()
USERS = sorted({row["user_id"] for row in EVENTS})
ERASED = ("user 05", "user 07", "user 31")
NIGHT = "2024-03-20"
LATER = INGESTED_AT + timedelta(days=1)
WINDOWS = make_windows(LIVE_CUTOFF)
NUM_KILLS = int(os.environ.get("BEHAVIOR_KILLS", "3"))


def named(rows: list[Row]) -> list[Row]:
    """Give rows ids that name their users, as some sources do."""
    return [row | {"event_id": f"{row['user_id']}/{row['event_id']}"} for row in rows]


HISTORY = named(EVENTS)
OF_THE_NIGHT = [
    *HISTORY[:3],  # known already
    *[row | {"amount": 1.0} for row in HISTORY if row["user_id"] in {"user 07", "user 09"}][:9],
    HISTORY[0] | {"event_id": "broken 1", "user_id": "user 07", "event_type": None},
    HISTORY[0] | {"event_id": "broken 2", "user_id": "user 08", "event_type": None},
]


@pytest.fixture
def pipeline(storage: Storage, settings: Settings) -> Pipeline:
    """A home with a history, a night, a warehouse, embeddings and what is served of them."""
    storage.home.mkdir(parents=True)
    preset = night_preset()
    relaxed = settings.model_copy(update={"max_quarantined_share": 0.5})
    bring(HISTORY, storage, relaxed)
    build_warehouse(storage, relaxed, preset, WINDOWS)
    bring(OF_THE_NIGHT, storage, relaxed, NIGHT, LATER)
    build_warehouse(storage, relaxed, preset, WINDOWS)
    publish_analytics(storage, relaxed, LIVE_CUTOFF)
    write_embeddings(storage, LIVE_CUTOFF, USERS, vectors(len(USERS), 1))
    write_rfm(storage, LIVE_CUTOFF, USERS)
    for view in ("user_embedding", "user_rfm"):
        publish_view(storage, view, LIVE_CUTOFF)
    return Pipeline(relaxed, preset, storage)


def test_nothing_is_found_of_erased_users_and_others_keep_every_row(pipeline: Pipeline) -> None:
    home = pipeline.storage.home
    assert places_with(home, ERASED)
    before = rows_without(home, frozenset(ERASED))

    receipt = erase(pipeline, ERASED)

    assert places_with(home, ERASED) == []
    assert rows_without(home, frozenset(ERASED)) == before
    assert receipt["num_users"] == len(ERASED)
    assert receipt["rows"]["feature_store/online"] == 2 * len(ERASED)
    assert receipt["rows"]["embeddings"] == len(ERASED)
    assert receipt["rows"]["quarantine"] == 1
    assert lookup(pipeline.storage, "user 07")["is_cold_start"] is True
    assert lookup(pipeline.storage, "user 08")["is_cold_start"] is False


def test_the_warehouse_goes_on_as_if_they_had_never_been(pipeline: Pipeline) -> None:
    storage, settings = pipeline.storage, pipeline.settings
    erase(pipeline, ERASED)
    plan = kept_plan(storage)
    assert plan is not None

    again = build_warehouse(storage, settings, pipeline.preset, WINDOWS)

    assert again.rebuilt == ""
    assert differences(rows_of(storage.warehouse, plan), rows_at_once(storage, plan, WINDOWS)) == []
    assert places_with(storage.home, ERASED) == []


def test_loading_the_same_files_again_keeps_them_out_and_changes_nothing(
    pipeline: Pipeline,
) -> None:
    storage, settings = pipeline.storage, pipeline.settings
    erase(pipeline, ERASED)
    loads = {key: load_document(storage, key) for key in ("history", NIGHT)}

    bring(HISTORY, storage, settings)
    bring(OF_THE_NIGHT, storage, settings, NIGHT, LATER)

    assert places_with(storage.home, ERASED) == []
    assert {key: load_document(storage, key) for key in loads} == loads
    for key in loads:
        assert _is_whole(storage, key).passed


def test_a_new_load_counts_whom_it_passes_over(pipeline: Pipeline) -> None:
    storage, settings = pipeline.storage, pipeline.settings
    erase(pipeline, ERASED)
    rows = [row | {"event_id": f"new {n}"} for n, row in enumerate(HISTORY[::7])]
    num_erased = sum(row["user_id"] in ERASED for row in rows)

    summary = bring(rows, storage, settings, "2024-03-21", LATER)

    assert num_erased > 0
    assert summary.num_suppressed == num_erased
    assert summary.num_stored + summary.num_suppressed == summary.num_read
    assert _is_whole(storage, "2024-03-21").passed
    assert places_with(storage.home, ERASED) == []


def test_a_file_is_written_once_however_many_users_go(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    rewrite = erase_module.rewrite

    def counted(affected, without) -> None:  # type: ignore[no-untyped-def]
        written.extend(affected.paths)
        rewrite(affected, without)

    monkeypatch.setattr(erase_module, "rewrite", counted)
    unknown = [f"nobody {number}" for number in range(10_000)]
    receipt = erase(pipeline, [*ERASED, *unknown])

    assert len(written) == len(set(written))
    assert receipt["num_files"] == len(written)
    assert receipt["num_users"] == len(ERASED) + len(unknown)


def test_the_list_and_the_receipt_hold_no_id_and_are_private(pipeline: Pipeline) -> None:
    receipt = erase(pipeline, ERASED)
    folder = pipeline.storage.home / "erasures"
    files = [path for path in folder.iterdir() if path.is_file()]
    assert {path.name for path in files} == {"key", "suppressed.json", f"{receipt['id']}.json"}
    assert all(path.stat().st_mode & 0o077 == 0 for path in files)


def test_erasing_again_finds_nothing(pipeline: Pipeline) -> None:
    erase(pipeline, ERASED)
    again = erase(pipeline, ERASED)
    assert set(again["rows"].values()) <= {0}


def test_the_reserved_user_and_nobody_are_mistakes(pipeline: Pipeline) -> None:
    with pytest.raises(PipelineError, match="nobody"):
        erase(pipeline, ["__cold_start__"])
    with pytest.raises(PipelineError, match="No user"):
        erase(pipeline, [" "])


@pytest.mark.parametrize("step", [0, 1, 4, 12])
def test_what_was_begun_is_completed_by_whoever_comes_next(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """The erasure dies after some steps, with the last one done; the next run completes it."""
    at_work = erase_module._Work._finished
    done = 0

    def dying(self, name) -> None:  # type: ignore[no-untyped-def]
        nonlocal done
        done += 1
        if done > step:
            raise KeyboardInterrupt
        at_work(self, name)

    monkeypatch.setattr(erase_module._Work, "_finished", dying)
    with pytest.raises(KeyboardInterrupt):
        erase(pipeline, ERASED)
    monkeypatch.undo()
    receipt = complete_erasure(pipeline)

    assert receipt is not None
    assert receipt["rows"]["embeddings"] == len(ERASED)
    assert places_with(pipeline.storage.home, ERASED) == []
    plan = kept_plan(pipeline.storage)
    assert plan is not None
    # What ranks over everybody, such as the targets, is renewed every night.
    again = build_warehouse(pipeline.storage, pipeline.settings, pipeline.preset, WINDOWS)
    assert again.rebuilt == ""
    built = rows_of(pipeline.storage.warehouse, plan)
    assert differences(built, rows_at_once(pipeline.storage, plan, WINDOWS)) == []
    for key in ("history", NIGHT):
        assert _is_whole(pipeline.storage, key).passed


ERASING = """
import sys
from pathlib import Path
from behavior_pipeline.erasure.erase import erase
from behavior_pipeline.pipeline import Pipeline
from behavior_pipeline.settings import load_settings
from behavior_pipeline.storage import Storage
from night_builders import night_preset
home, *users = sys.argv[1:]
print("begun", flush=True)
erase(Pipeline(load_settings(threads=1), night_preset(), Storage(Path(home))), users)
"""

READING = """
import sys
from pathlib import Path
from behavior_pipeline.feature_store.lookup import lookup
from behavior_pipeline.storage import Storage
import duckdb
storage = Storage(Path(sys.argv[1]))
def events_of(user):
    with duckdb.connect(str(storage.analytics), read_only=True) as connection:
        query = "SELECT count(*) FROM events_sessionized WHERE user_id = ?"
        return connection.execute(query, [user]).fetchall()[0][0]
print("begun", flush=True)
while True:
    assert lookup(storage, "user 08")["is_cold_start"] is False
    try:
        assert events_of("user 08") > 0
    except duckdb.Error:  # DuckDB opens a file more than once, and it was replaced in between
        assert events_of("user 08") > 0
    print("read", flush=True)
"""


def start(program: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a program in a process of its own and wait until it is at work."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", program, *arguments],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_at_any_moment_it_completes_and_readers_never_fail(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = str(pipeline.storage.home)
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    chance = random.Random(8)  # noqa: S311 - moments, not secrets
    reader = start(READING, home)
    for _ in range(NUM_KILLS):
        process = start(ERASING, home, *ERASED)
        time.sleep(chance.uniform(0.0, 3.0))
        process.kill()
        process.wait()
    last = start(ERASING, home, *ERASED)
    assert last.wait() == 0
    assert reader.poll() is None, "the reader never fails"
    reader.send_signal(signal.SIGKILL)
    reader.wait()

    assert places_with(pipeline.storage.home, ERASED) == []
    assert not list(pipeline.storage.home.rglob("*.aside"))
    for key in ("history", NIGHT):
        assert _is_whole(pipeline.storage, key).passed
