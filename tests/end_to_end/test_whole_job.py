"""What a finished run leaves for each of its users."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from behavior_pipeline.contracts import COLD_START_USER
from behavior_pipeline.feature_store.historical import historical_features
from behavior_pipeline.feature_store.publish import publish_view
from behavior_pipeline.feature_store.repository import open_store
from behavior_pipeline.storage import read_json

from .conftest import FinishedRun

REPRESENTATIONS = {
    "random", "untrained", "rfm", "aggregates", "embedding", "rfm+embedding",
    "aggregates+embedding",
}  # fmt: skip
PROBES = {"logistic_regression", "gradient_boosting"}
RESULT_KEYS = {
    "task", "target", "representation", "probe", "metric", "value", "ci_low", "ci_high",
    "num_train", "num_test", "positive_rate",
}  # fmt: skip


def test_the_comparison_holds_every_task_representation_and_probe(finished: FinishedRun) -> None:
    comparison = finished.comparison
    assert comparison["source"] == "simulated"
    assert comparison["is_simulated"] is True
    assert (comparison["train_cutoff"], comparison["test_cutoff"]) == ("2026-03-01", "2026-03-31")
    assert comparison["horizon_days"] == 30
    assert all(set(row) == RESULT_KEYS for row in comparison["results"])
    found = {(row["task"], row["representation"], row["probe"]) for row in comparison["results"]}
    wanted = {
        (task, representation, probe)
        for task in ("churn", "propensity", "next_action", "segments")
        for representation in REPRESENTATIONS
        for probe in PROBES
        if (task, representation) != ("segments", "rfm+embedding")
    }
    assert wanted <= found
    assert all(row["ci_low"] <= row["value"] <= row["ci_high"] for row in comparison["results"])


def test_random_vectors_are_worth_nothing_and_rfm_is_worth_something(
    finished: FinishedRun,
) -> None:
    churn = {
        row["representation"]: row["value"]
        for row in finished.comparison["results"]
        if row["task"] == "churn"
        and row["metric"] == "auroc"
        and row["probe"] == "logistic_regression"
    }
    assert abs(churn["random"] - 0.5) < 0.12
    assert churn["rfm"] > 0.6
    assert churn["embedding"] > 0.6


def test_the_terminal_shows_the_steps_the_verdict_and_the_page(finished: FinishedRun) -> None:
    for step in ("historical_events", "warehouse", "checkpoint", "published_embeddings", "report"):
        assert re.search(rf"✓ {step}\s+[0-9.]+ s", finished.output)
    assert "simulated" in finished.output
    assert str(finished.report_folder / "report.html") in finished.output.replace("\n", "")


def test_the_page_is_whole_and_needs_no_network(finished: FinishedRun) -> None:
    page = (finished.report_folder / "report.html").read_text()
    assert "</html>" in page
    assert "simulated" in page.lower()
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", page)


def test_the_run_shows_in_dagster(finished: FinishedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(finished.installation.root / "dagster"))
    with dg.DagsterInstance.get() as instance:
        runs = {run.job_name: run for run in instance.get_runs()}
        assert {"history", "pretraining_and_nightly"} <= set(runs)
        first = min(instance.get_runs(), key=lambda run: run.run_id != runs["history"].run_id)
        assert first.status == dg.DagsterRunStatus.SUCCESS
        event = instance.get_latest_materialization_event(dg.AssetKey("user_embeddings"))
    assert event is not None
    materialization = event.asset_materialization
    assert materialization is not None
    assert materialization.partition == "2026-03-30"
    assert materialization.metadata["dagster/partition_row_count"].value > 300


def test_published_vectors_equal_the_files_bit_for_bit(finished: FinishedRun) -> None:
    table = ds.dataset(finished.storage.embeddings(finished.cutoff)).to_table(
        columns=["user_id", "embedding"]
    )
    users = table["user_id"].to_pylist()
    store = open_store(finished.storage)
    served = store.get_online_features(
        features=["user_embedding:embedding"],
        entity_rows=[{"user_id": user} for user in users],
    ).to_dict()
    served_vectors = dict(zip(served["user_id"], served["embedding"], strict=True))
    assert COLD_START_USER in users
    for user, vector in zip(users, table["embedding"].to_pylist(), strict=True):
        expected = np.asarray(vector, np.float32)
        assert np.asarray(served_vectors[user], np.float32).tobytes() == expected.tobytes()


def test_history_gives_what_was_known_at_the_asked_time(finished: FinishedRun) -> None:
    train_cutoff = finished.cutoff - timedelta(days=30)
    publish_view(finished.storage, "user_embedding", train_cutoff)
    users = pq.read_table(finished.storage.marts(finished.cutoff) / "user_rfm.parquet")["user_id"]
    asked = [train_cutoff + timedelta(hours=1), finished.cutoff + timedelta(hours=1)]
    entities = pa.table(
        {
            "user_id": users.to_pylist() * 2,
            "event_timestamp": pa.array(
                [time for time in asked for _ in users], pa.timestamp("us", tz="UTC")
            ),
        }
    )
    found = historical_features(finished.storage, entities, ["user_embedding:num_events"])
    assert found.num_rows == entities.num_rows
    assert found["user_id"].to_pylist() == entities["user_id"].to_pylist()
    cutoffs = found["user_embedding__cutoff_at"]
    assert pc.all(
        pc.less_equal(cutoffs.cast(pa.timestamp("us", tz="UTC")), found["event_timestamp"])
    ).as_py()
    known_then = cutoffs.to_pylist()[: len(users)]
    assert {time for time in known_then if time is not None} == {train_cutoff}
    assert set(cutoffs.to_pylist()[len(users) :]) == {finished.cutoff}


def test_lookup_shows_a_user_and_what_is_assumed_of_a_stranger(finished: FinishedRun) -> None:
    user = pq.read_table(finished.storage.marts(finished.cutoff) / "user_rfm.parquet")["user_id"][0]
    known = finished.installation.run("lookup", str(user))
    stranger = finished.installation.run("lookup", "nobody-knows-me")
    assert known.returncode == stranger.returncode == 0, known.stderr + stranger.stderr
    assert re.search(r"is_cold_start\W+False", known.stdout)
    assert re.search(r"is_cold_start\W+True", stranger.stdout)


def test_analysts_find_documented_tables(finished: FinishedRun) -> None:
    with duckdb.connect(str(finished.storage.analytics), read_only=True) as connection:
        segments = connection.sql("select count(*) from user_segments").fetchall()[0][0]
        predictions = connection.sql("select count(*) from user_predictions").fetchall()[0][0]
        undocumented = connection.sql(
            "select table_name from duckdb_tables() where comment is null or comment = ''"
        ).fetchall()
    assert segments > 300
    assert predictions > 200
    assert undocumented == []


def test_nothing_on_disk_is_readable_by_others(finished: FinishedRun) -> None:
    home = finished.storage.home
    assert home.stat().st_mode & 0o077 == 0
    assert list(home.rglob("*.aside")) == []


def loaded_history(finished: FinishedRun) -> tuple[dict[str, Any], list[Path]]:
    """Return what is recorded of the history, and the files of events under it."""
    folder = finished.storage.events / "arrival=history"
    recorded = read_json(folder / "load.json")
    files = sorted(folder.rglob("events*.parquet"))
    assert [file.parent.name for file in files] == [f"load={recorded['load_id']}"]
    return recorded, files


def test_every_row_read_is_an_event_or_in_quarantine(finished: FinishedRun) -> None:
    recorded, (events_file,) = loaded_history(finished)
    raw = ds.dataset(finished.storage.raw / "simulated", exclude_invalid_files=True).count_rows()
    events = ds.dataset(events_file).count_rows()
    load = f"load={recorded['load_id']}"
    quarantine = finished.storage.quarantine / "arrival=history" / load / "quarantine.parquet"
    broken = ds.dataset(quarantine).count_rows()
    assert recorded["num_read"] == raw == events + broken
    assert broken > 0


def test_a_second_run_finds_its_work_done_and_says_the_same(finished: FinishedRun) -> None:
    before = (finished.report_folder / "comparison.json").read_bytes()
    recorded, (events_file,) = loaded_history(finished)
    events = events_file.read_bytes()
    again = finished.installation.run("run")
    assert again.returncode == 0, again.stdout + again.stderr
    assert (finished.report_folder / "comparison.json").read_bytes() == before
    assert loaded_history(finished) == (recorded, [events_file])
    assert events_file.read_bytes() == events
