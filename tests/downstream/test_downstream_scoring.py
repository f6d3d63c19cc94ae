from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from downstream_builders import (
    CHECKPOINT,
    EVENT_TYPES,
    LIVE_WINDOWS,
    TEST,
    TRAIN,
    WINDOWS,
    WRITTEN_AT,
    preset,
    write_home,
    write_vectors,
)
from sklearn.metrics import roc_auc_score

from behavior_pipeline.contracts import COLD_START_USER, PREDICTIONS, SEGMENTS
from behavior_pipeline.downstream.scoring import _join, label_cutoff, score
from behavior_pipeline.downstream.segmentation import segment
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.settings import Settings
from behavior_pipeline.sql import open_engine
from behavior_pipeline.storage import Storage

SETTINGS = Settings(threads=2, num_segments=3, bootstrap_samples=10)


def predictions(storage: Storage) -> pa.Table:
    return pq.read_table(storage.predictions(TEST) / "predictions.parquet")


def segments(storage: Storage) -> pa.Table:
    return pq.read_table(storage.segments(TEST) / "segments.parquet")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    storage = Storage(tmp_path_factory.mktemp("downstream") / "home")
    write_home(storage, num_users=240)
    return storage


def test_everyone_in_the_population_is_scored_under_the_contract(home: Storage) -> None:
    summary = score(home, SETTINGS, preset(), WINDOWS, WRITTEN_AT)
    table = predictions(home)
    assert table.schema == PREDICTIONS.schema
    users = table["user_id"].to_pylist()
    assert users == sorted(users) == [f"user-{number:05d}" for number in range(240)]
    assert (summary.num_users, summary.label_cutoff) == (240, TRAIN)
    assert COLD_START_USER not in users
    labels = pq.read_table(home.marts(TEST) / "labels.parquet")
    churn = table["churn_probability"].to_numpy()
    assert roc_auc_score(labels["is_churned"].to_numpy(zero_copy_only=False), churn) > 0.8
    assert set(table["top_target"].to_pylist()) <= {"books", "tools"}
    assert set(table["next_event_type"].to_pylist()) <= set(EVENT_TYPES)
    for name in ("churn_probability", "top_target_probability", "next_event_probability"):
        assert ((table[name].to_numpy() >= 0) & (table[name].to_numpy() <= 1)).all()
    assert set(table["checkpoint_id"].to_pylist()) == {CHECKPOINT}


def test_scoring_twice_gives_the_same_bytes(home: Storage) -> None:
    path = home.predictions(TEST) / "predictions.parquet"
    score(home, SETTINGS, preset(), WINDOWS, WRITTEN_AT)
    before = path.read_bytes()
    score(home, SETTINGS, preset(), WINDOWS, WRITTEN_AT)
    assert path.read_bytes() == before


def test_labels_come_from_a_window_that_is_over() -> None:
    for windows, expected in ((WINDOWS, TRAIN), (LIVE_WINDOWS, TEST)):
        assert label_cutoff(windows) == expected
        assert label_cutoff(windows) + windows.horizon <= windows.cutoff


def test_users_outside_the_population_are_not_scored(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "home")
    write_home(storage, num_users=60)
    path = storage.marts(TEST) / "user_rfm.parquet"
    table = pq.read_table(path)
    inside = pa.array([number % 2 == 0 for number in range(60)])
    place = table.schema.get_field_index("is_in_population")
    pq.write_table(table.set_column(place, table.schema.field(place), inside), path)
    assert score(storage, SETTINGS, preset(), WINDOWS, WRITTEN_AT).num_users == 30
    assert all(int(user[-5:]) % 2 == 0 for user in predictions(storage)["user_id"].to_pylist())


def test_what_cannot_be_learned_is_null_and_churn_falls_back_to_its_rate(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "home")
    write_home(storage, num_users=6)
    summary = score(storage, SETTINGS, preset(), WINDOWS, WRITTEN_AT)
    table = predictions(storage)
    churned = pq.read_table(storage.marts(TRAIN) / "labels.parquet")["is_churned"].to_pylist()
    np.testing.assert_allclose(table["churn_probability"], np.mean(churned), rtol=1e-6)
    assert table["top_target"].null_count == table["next_event_type"].null_count == 6
    assert summary.probes == {}
    assert {left_out.task for left_out in summary.left_out} == {
        "churn",
        "propensity",
        "next_action",
    }


def test_a_user_without_an_embedding_stops_scoring_and_the_old_scores_stay(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "home")
    write_home(storage, num_users=30)
    score(storage, SETTINGS, preset(), WINDOWS, WRITTEN_AT)
    (storage.embeddings(TEST) / "bucket=2.parquet").unlink()
    with pytest.raises(PipelineError, match="10 of 30 users"):
        score(storage, SETTINGS, preset(), WINDOWS, WRITTEN_AT)
    assert predictions(storage).num_rows == 30


def test_mixed_checkpoints_are_refused(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "home")
    write_home(storage, num_users=20)
    users = [f"user-{number:05d}" for number in range(20)]
    write_vectors(storage.embeddings(TEST), users, np.ones((20, 6)), TEST, "checkpoint-b")
    with pytest.raises(PipelineError, match="cannot cross checkpoints") as caught:
        score(storage, SETTINGS, preset(), WINDOWS, WRITTEN_AT)
    assert "checkpoint-a" in str(caught.value)


def write_clumps(storage: Storage, sizes: tuple[int, ...]) -> None:
    """Users in far clumps of given sizes; user ids run through the clumps."""
    write_home(storage, num_users=sum(sizes))
    centers = np.eye(len(sizes)) * 100
    clumps = np.repeat(centers, sizes, axis=0)
    clumps += np.random.default_rng(0).normal(size=clumps.shape) / 100
    users = [f"user-{number:05d}" for number in range(sum(sizes))]
    write_vectors(storage.embeddings(TEST), users, clumps, TEST)


def test_segments_are_numbered_by_size_under_the_contract(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "home")
    write_clumps(storage, (10, 40, 25))
    summary = segment(storage, SETTINGS, WINDOWS, WRITTEN_AT)
    table = segments(storage)
    assert table.schema == SEGMENTS.schema
    assert table["segment"].to_pylist() == [2] * 10 + [0] * 40 + [1] * 25
    assert table["user_id"].to_pylist() == sorted(table["user_id"].to_pylist())
    assert (summary.num_users, summary.num_segments) == (75, 3)
    assert (table["distance"].to_numpy() < 0.1).all()
    profiles = json.loads((storage.segments(TEST) / "profiles.json").read_text())
    assert [profile["num_users"] for profile in profiles] == [40, 25, 10]
    assert sum(profile["share"] for profile in profiles) == pytest.approx(1, abs=1e-5)
    names = dict(zip(table["segment"].to_pylist(), table["segment_name"].to_pylist(), strict=True))
    assert names == {profile["segment"]: profile["name"] for profile in profiles}
    assert len(set(names.values())) == 3
    assert sorted(path.name for path in storage.segments(TEST).iterdir()) == [
        "map.json",
        "profiles.json",
        "segments.parquet",
    ]


def test_profiles_hold_medians_and_churn_worked_out_by_hand(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "home")
    write_clumps(storage, (30, 20))
    write_rfm_of_two_kinds(storage, 30, 20)
    first, second = segment(
        storage, SETTINGS.model_copy(update={"num_segments": 2}), WINDOWS, WRITTEN_AT
    ).profiles
    assert (first.name, first.recency_days, first.frequency, first.monetary) == (
        "recent frequent high-value",
        1.0,
        9.0,
        500.0,
    )
    assert (second.name, second.recency_days) == ("lapsed occasional low-value", 90.0)
    labels = pq.read_table(storage.marts(TEST) / "labels.parquet")["is_churned"].to_pylist()
    assert first.churn_rate == pytest.approx(np.mean(labels[:30]), abs=1e-6)
    assert first.num_labeled == 30


def test_churn_of_a_live_night_is_not_known(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "home")
    write_home(storage, num_users=30, cutoffs=(TRAIN, TEST, LIVE_WINDOWS.cutoff))
    profiles = segment(storage, SETTINGS, LIVE_WINDOWS, WRITTEN_AT).profiles
    assert {profile.churn_rate for profile in profiles} == {None}


def test_users_without_rfm_and_traits_are_described_too(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "home")
    write_clumps(storage, (30, 20))
    path = storage.marts(TEST) / "user_rfm.parquet"
    pq.write_table(pq.read_table(path).slice(0, 30), path)
    users = [f"user-{number:05d}" for number in range(50)]
    aggregates = pa.table(
        {
            "observation_cutoff": [TEST] * 50,
            "user_id": users,
            "num_returns_30d": [0] * 30 + [4] * 20,
            "num_returns_90d": [0] * 30 + [5] * 20,
            "last_seen": ["?"] * 50,
        }
    )
    pq.write_table(aggregates, storage.marts(TEST) / "user_aggregates.parquet")
    settings = SETTINGS.model_copy(update={"num_segments": 2})
    first, second = segment(storage, settings, WINDOWS, WRITTEN_AT).profiles
    assert second.name == "no qualifying events"
    assert (second.num_with_rfm, second.recency_days) == (0, None)
    assert [(trait.column, trait.median) for trait in second.traits] == [("num_returns_30d", 4.0)]
    assert first.traits[0].effect < 0 < second.traits[0].effect


def test_segmenting_twice_gives_the_same_bytes(home: Storage) -> None:
    segment(home, SETTINGS, WINDOWS, WRITTEN_AT)
    before = {path.name: path.read_bytes() for path in home.segments(TEST).iterdir()}
    segment(home, SETTINGS, WINDOWS, WRITTEN_AT)
    assert {path.name: path.read_bytes() for path in home.segments(TEST).iterdir()} == before


def write_rfm_of_two_kinds(storage: Storage, num_good: int, num_lost: int) -> None:
    path = storage.marts(TEST) / "user_rfm.parquet"
    table = pq.read_table(path)
    columns = {name: table[name].to_pylist() for name in table.schema.names}
    columns["recency_days"] = [1.0] * num_good + [90.0] * num_lost
    columns["frequency"] = [9] * num_good + [1] * num_lost
    columns["monetary"] = [500.0] * num_good + [5.0] * num_lost
    columns["last_qualifying_at"] = [TEST - timedelta(days=d) for d in columns["recency_days"]]
    pq.write_table(pa.table(columns).cast(table.schema), path)


def test_users_are_scored_in_order_whatever_the_threads(tmp_path: Path) -> None:
    """Beside other rows a matrix product may differ in its last bit."""
    users = [f"user-{number:06d}" for number in range(120_000)]
    vectors = pa.table({"user_id": users, "embedding": pa.array([[0.0, 1.0]] * len(users))})
    rfm = pa.table(
        {
            "user_id": users,
            "is_in_population": [True] * len(users),
            **dict.fromkeys(("recency_days", "frequency", "monetary"), [1.0] * len(users)),
        }
    )
    pq.write_table(vectors, tmp_path / "vectors.parquet", row_group_size=4096)
    pq.write_table(rfm, tmp_path / "rfm.parquet", row_group_size=4096)
    with open_engine("1GB", 4, tmp_path) as engine:
        reader = _join(engine, tmp_path / "vectors.parquet", tmp_path / "rfm.parquet")
        assert [user for batch in reader for user in batch["user_id"].to_pylist()] == users
