from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CUTOFF = datetime(2024, 6, 1, tzinfo=UTC)
PRESET = """
name: handmade
description: Events made for tests.
columns: {user_id: user, event_type: type, occurred_at: ts, category: category}
tasks: {propensity_column: category, horizon_days: 20, lookback_days: 60}
"""
PROGRAM = f"""
import sys
sys.path.insert(0, {str(BENCHMARKS)!r})
import objectives, robust_recall
common = ["--data", sys.argv[1], "--seeds", "0,1", "--preset", "tiny", "--steps", "4",
          "--threads", "1", "--device", "cpu"]
for turn in ("once", "again", "finished"):
    common += ["--finished"] * (turn == "finished")
    objectives.main([*common, "--only", sys.argv[3], "--max-users", "90",
                     "--weights", "mine:silence=1,masked_event=0.5", "--out", sys.argv[2] + "/o"])
    robust_recall.main([*common, "--shares", "0.5", "--out", sys.argv[2] + "/r"])
    print(turn, file=sys.stderr)
# What a bare GPU machine lacks.
found = {{"duckdb", "polars", "dagster", "feast", "pydantic", "transformers"}} & sys.modules.keys()
sys.exit(f"loaded {{found}}" if found else 0)
"""
RUN = f"""
import sys
sys.path.insert(0, {str(BENCHMARKS)!r})
import beat_run
beat_run.main(sys.argv[1:])
"""
ROWS = ["random", "rfm", "aggregates", "default", "mine"]


def write_events(path: Path, num_users: int = 120) -> None:
    """Users of whom each likes one category, some of whom fall silent."""
    random = np.random.default_rng(0)
    rows = []
    for user in range(num_users):
        last = 155 if random.random() < 0.5 else 125
        days = np.sort(random.uniform(60, last, random.integers(4, 12)))
        rows += [
            {
                "user": f"u{user:03d}",
                "type": str(random.choice(["view", "cart", "buy"], p=[0.7, 0.2, 0.1])),
                "ts": CUTOFF + timedelta(days=float(day) - 130),
                "category": f"c{user % 3 if random.random() < 0.8 else 3}",
            }
            for day in days
        ]
    pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    write_events(folder / "events.parquet")
    (folder / "preset.yaml").write_text(PRESET)
    command = [
        sys.executable, str(BENCHMARKS / "objectives_data.py"),
        "--source", str(folder / "preset.yaml"), "--path", str(folder / "events.parquet"),
        "--cutoff", "2024-06-01", "--threads", "1", "--out", str(folder / "data"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "data"


def aggregates(prepared: Path, role: str) -> dict[str, np.ndarray]:
    table = pq.read_table(prepared / f"{role}_aggregates.parquet")
    return {name: table[name].to_numpy() for name in table.column_names}


@pytest.mark.slow
def test_aggregates_are_those_of_each_cutoff(prepared):
    about = json.loads((prepared / "about.json").read_text())
    assert about["train_cutoff"] == "2024-05-12T00:00:00+00:00"
    assert about["test_cutoff"] == "2024-06-01T00:00:00+00:00"
    before, after = (aggregates(prepared, role) for role in ("train", "test"))
    assert list(before) == list(after)
    raw = pq.read_table(prepared.parent / "events.parquet").to_pylist()
    for role, found in (("train", before), ("test", after)):
        cutoff = datetime.fromisoformat(about[f"{role}_cutoff"])
        users = pq.read_table(prepared / f"{role}_users.parquet")["user_id"].to_pylist()
        known = [sum(e["user"] == user and e["ts"] < cutoff for e in raw) for user in users]
        assert found["num_events"].tolist() == known
        assert not any(np.isnan(values).any() for values in found.values())


@pytest.mark.slow
def test_both_commands_run_and_go_on_where_little_is_installed(prepared, tmp_path):
    command = [
        sys.executable, "-c", PROGRAM, str(prepared), str(tmp_path), ",".join(ROWS),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    once, later = done.stderr.split("once\n")
    assert "default, seed 1" in once
    assert later == "again\nfinished\n"  # nothing was measured a second time
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    third = len(lines) // 3
    assert lines[:third] == lines[third : 2 * third] == lines[2 * third :]
    objectives = {line["row"]: line for line in lines[:third] if line["figure"] == "objectives"}
    assert list(objectives) == [*ROWS, "aggregates+default"]
    for name, line in objectives.items():
        assert line["test_users"] <= 90
        assert line["seeds"] == (1 if name in {"rfm", "aggregates"} else 2)
        for column in ("churn_lr", "churn_gbm", "propensity_lr", "propensity_gbm"):
            mean, spread = line[column]
            assert 0 < mean < 1
            assert (spread is None) == (line["seeds"] == 1)
    assert objectives["mine"]["weights"]["silence"] == 1
    assert objectives["mine"]["weights"]["next_event"] == 0
    robust = {line["row"]: line for line in lines[:third] if line["figure"] == "robust_recall"}
    assert list(robust) == ["most frequent", "most recent", "cross-entropy", "robust_share 0.5"]
    plain, other = robust["cross-entropy"], robust["robust_share 0.5"]
    assert plain["weighted_recall_change"] == 0
    change = other["macro_recall"][0] / plain["macro_recall"][0] - 1
    assert other["macro_recall_change"] == pytest.approx(change, abs=1e-3)
    assert done.stdout.count("| --- |\n") == 6


@pytest.mark.slow
def test_the_published_run_is_repeated_told_and_drawn(prepared, tmp_path):
    folder = tmp_path / "run"
    common = [
        sys.executable, "-c", RUN, "--data", str(prepared), "--out", str(folder),
        "--preset", "tiny", "--steps", "6", "--batch-tokens", "512", "--device", "cpu",
    ]  # fmt: skip
    picture = tmp_path / "losses.png"
    told = []
    for more in ([], ["--finished", "--picture", str(picture)]):
        done = subprocess.run([*common, *more], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        told.append(json.loads(done.stdout))
    ours = ("value", "num_steps", "num_events_seen", "num_parameters", "train_total")
    assert {name: told[0][name] for name in ours} == {name: told[1][name] for name in ours}
    assert told[0]["num_steps"] == 6
    assert told[0]["train_total"][1] < told[0]["train_total"][0]
    assert not any("silence" in name for name in told[0])
    assert picture.read_bytes().startswith(b"\x89PNG")
