"""A home in which the whole job has run names nobody who was erased, and brings nobody back."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from forensics import places_with, rows_without

from behavior_pipeline.erasure.erase import erase
from behavior_pipeline.feature_store.lookup import lookup
from behavior_pipeline.ingest.arrivals import load_document
from behavior_pipeline.pipeline import Pipeline, open_pipeline
from behavior_pipeline.storage import Storage

pytestmark = pytest.mark.slow


@pytest.fixture
def pipeline(finished_home: Path, tmp_path: Path) -> Pipeline:
    """A copy of a home in which the whole job has run, with a candidate beside it."""
    shutil.copytree(finished_home, tmp_path / "data" / "simulated")
    return open_pipeline(data_root=str(tmp_path / "data"), source="simulated", threads=1)


def users_of(storage: Storage) -> list[str]:
    """Everybody who has an event, the most active first."""
    files = storage.events.rglob("events*.parquet")
    tables = [pq.read_table(path, columns=["user_id"]) for path in files]
    counts = pa.concat_tables(tables)["user_id"].value_counts().to_pylist()
    return [row["values"] for row in sorted(counts, key=lambda row: -row["counts"])]


def test_every_place_of_a_whole_job_is_reached(pipeline: Pipeline):
    storage = pipeline.storage
    everybody = users_of(storage)
    erased, other = everybody[:3], everybody[5]
    before, seen = rows_without(storage.home, frozenset(erased)), lookup(storage, other)
    receipt = erase(pipeline, erased)
    assert places_with(storage.home, erased) == []
    assert {
        "events", "embeddings", "sequences", "candidates", "predictions", "segments", "states",
        "controls", "feature_store/online", "analytics.duckdb", "warehouse.duckdb",
    } <= set(receipt["rows"])  # fmt: skip
    after = rows_without(storage.home, frozenset(erased))
    gone = {name for name in before if name not in after}
    assert all("similar_users" in name for name in gone)  # indexes, made anew by the next night
    assert lookup(storage, erased[0])["is_cold_start"] is True
    found = lookup(storage, other)
    neighbours = "similar_users__"
    assert {k: v for k, v in found.items() if not k.startswith(neighbours)} == {
        k: v for k, v in seen.items() if not k.startswith(neighbours)
    }


def test_loading_everything_again_brings_nobody_back(
    pipeline: Pipeline, finished_home: Path, small_environment: dict[str, str]
):
    storage = pipeline.storage
    erased = users_of(storage)[:3]
    erase(pipeline, erased)
    shutil.copytree(finished_home / "raw", storage.home / "raw", dirs_exist_ok=True)
    environment = small_environment | {"BEHAVIOR_DATA_ROOT": str(storage.home.parent)}
    done = subprocess.run(
        [sys.executable, "-m", "behavior_pipeline.cli", "run"],  # the nightly job is part of it
        env=environment | {"BEHAVIOR_MAX_TRAINING_STEPS": "10"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.rmtree(storage.home / "raw")  # it is the source, which still has them
    assert places_with(storage.home, erased) == []
    document = load_document(storage, "history")
    assert document is not None
    assert document["num_suppressed"] > 0
