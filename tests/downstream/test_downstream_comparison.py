from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from downstream_builders import (
    CHECKPOINT,
    LIVE_WINDOWS,
    TARGETS,
    TEST,
    TRAIN,
    WINDOWS,
    preset,
    write_home,
    write_propensity,
    write_vectors,
)
from rich.console import Console
from sequence_builders import events_frame, write_events_sessionized

from behavior_pipeline.contracts import COLD_START_USER, LABELS
from behavior_pipeline.downstream.blocks import random_vectors
from behavior_pipeline.downstream.comparison import compare, headline
from behavior_pipeline.downstream.console import comparison_table
from behavior_pipeline.downstream.population import load_population
from behavior_pipeline.downstream.probes import PROBES
from behavior_pipeline.downstream.representations import REPRESENTATIONS, build_representations
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    storage = Storage(tmp_path_factory.mktemp("downstream") / "home")
    write_home(storage, num_users=240)
    return storage


@pytest.fixture(scope="module")
def comparison(home: Storage) -> dict:
    return compare(home, small_settings(), preset(is_simulated=True), WINDOWS)


def small_settings(**changes: object) -> Settings:
    return Settings(threads=2, bootstrap_samples=20, num_segments=3, **changes)


def rows(comparison: dict, **wanted: object) -> list[dict]:
    return [
        row
        for row in comparison["results"]
        if all(row[name] == value for name, value in wanted.items())
    ]


def relabel(storage: Storage, change: object) -> None:
    """Replace the labels at the test cutoff."""
    path = storage.marts(TEST) / "labels.parquet"
    table = pq.read_table(path)
    columns = {name: table[name].to_numpy(zero_copy_only=False) for name in table.schema.names}
    change(columns)
    fields = LABELS.schema
    changed = pa.table(
        {f.name: pa.array(columns[f.name], f.type, from_pandas=True) for f in fields}
    )
    pq.write_table(changed, path)


def test_every_representation_is_judged_on_every_task(comparison: dict) -> None:
    for task, target, metric in [
        ("churn", "is_churned", "auroc"),
        ("churn", "is_churned", "average_precision"),
        ("propensity", "books", "auroc"),
        ("propensity", "macro", "average_precision"),
        ("propensity", "macro", "auroc"),
        ("next_action", "next_event_type", "accuracy"),
        ("next_action", "next_event_type", "macro_recall"),
        ("segments", "is_churned", "auroc"),
    ]:
        found = rows(comparison, task=task, target=target, metric=metric)
        pairs = {(row["representation"], row["probe"]) for row in found}
        assert pairs == {(name, probe) for name in REPRESENTATIONS for probe in PROBES}
        for row in found:
            assert row["ci_low"] <= row["value"] <= row["ci_high"]
            assert row["num_train"] > 0
            assert row["num_test"] > 0


def test_header_says_what_was_compared(comparison: dict) -> None:
    assert comparison["source"] == "handmade"
    assert comparison["is_simulated"] is True
    assert comparison["checkpoint_id"] == CHECKPOINT
    assert (comparison["train_cutoff"], comparison["test_cutoff"]) == ("2024-03-01", "2024-03-31")
    assert comparison["horizon_days"] == 30
    assert comparison["population"]["test"]["num_users"] == 240


def test_what_decides_the_labels_wins_and_chance_stays_chance(comparison: dict) -> None:
    def churn(name: str) -> float:
        logistic = rows(comparison, task="churn", representation=name, probe="logistic_regression")
        return logistic[0]["value"]

    assert churn("embedding") > 0.8
    assert churn("rfm") > 0.7
    assert 0.38 < churn("random") < 0.62
    assert 0.38 < churn("untrained") < 0.62


def test_macro_is_the_mean_of_the_measured_targets(comparison: dict) -> None:
    wanted = {
        "task": "propensity",
        "representation": "rfm",
        "probe": "gradient_boosting",
        "metric": "auroc",
    }
    each = [
        row["value"] for target in TARGETS[:2] for row in rows(comparison, target=target, **wanted)
    ]
    macro = rows(comparison, target="macro", **wanted)[0]
    assert macro["value"] == pytest.approx(np.mean(each), abs=1e-6)


def test_lift_is_the_difference_to_a_baseline_under_the_same_probe(comparison: dict) -> None:
    for name in ("rfm", "aggregates"):
        lifts = [row for row in comparison["lifts"] if row["baseline"] == name]
        assert {row["representation"] for row in lifts} == set(REPRESENTATIONS) - {name}
    for lift in comparison["lifts"]:
        same = {name: lift[name] for name in ("task", "target", "probe", "metric")}
        ours = rows(comparison, representation=lift["representation"], **same)[0]
        baseline = rows(comparison, representation=lift["baseline"], **same)[0]
        assert lift["value"] == pytest.approx(ours["value"] - baseline["value"], abs=2e-6)
        assert lift["ci_low"] <= lift["ci_high"]
        is_above, is_below = lift["ci_low"] > 0, lift["ci_high"] < 0
        assert lift["verdict"] == ("win" if is_above else "loss" if is_below else "tie")


def test_a_target_that_nobody_takes_is_left_out_with_the_reason(comparison: dict) -> None:
    assert comparison["left_out"] == [
        {
            "task": "propensity",
            "target": "never taken",
            "reason": "only 0 positive of 240 train users; at least 5 are needed",
        }
    ]
    assert not rows(comparison, target="never taken")


def test_most_frequent_type_is_a_naive_predictor(comparison: dict) -> None:
    accuracy = [row for row in comparison["naive"] if row["metric"] == "accuracy"]
    assert [row["predictor"] for row in accuracy] == ["most_frequent"]
    assert 0.2 < accuracy[0]["value"] < 0.55


def test_same_inputs_give_the_same_bytes(home: Storage, comparison: dict) -> None:
    path = home.reports(TEST) / "comparison.json"
    before = path.read_bytes()
    assert json.loads(before) == comparison
    compare(home, small_settings(), preset(is_simulated=True), WINDOWS)
    assert path.read_bytes() == before


def test_probes_never_see_the_labels_they_are_judged_on(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "home")
    write_home(storage, num_users=80)
    scores = storage.reports(TEST) / "churn_scores.parquet"
    compare(storage, small_settings(), preset(), WINDOWS)
    before = pq.read_table(scores)

    def shuffle(columns: dict) -> None:
        rng = np.random.default_rng(0)
        columns["is_churned"] = rng.permutation(columns["is_churned"])
        columns["next_event_type"] = rng.permutation(columns["next_event_type"])

    relabel(storage, shuffle)
    compare(storage, small_settings(), preset(), WINDOWS)
    after = pq.read_table(scores)
    assert after["is_churned"] != before["is_churned"]
    assert after.drop_columns("is_churned") == before.drop_columns("is_churned")


def test_one_class_and_tiny_populations_still_make_a_report(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "home")
    write_home(storage, num_users=8)

    def everyone_leaves(columns: dict) -> None:
        columns["is_churned"][:] = True
        columns["next_event_type"][:] = None

    relabel(storage, everyone_leaves)
    comparison = compare(storage, small_settings(), preset(), WINDOWS)
    assert comparison["results"] == comparison["lifts"] == comparison["naive"] == []
    reasons = {row["task"]: row["reason"] for row in comparison["left_out"]}
    assert set(reasons) == {"churn", "propensity", "next_action", "segments"}
    assert "NaN" not in (storage.reports(TEST) / "comparison.json").read_text()
    assert "nothing could be measured" in text_of(comparison).lower()


def test_embeddings_of_two_checkpoints_are_refused(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "home")
    write_home(storage, num_users=20)
    ids = [f"user-{number:05d}" for number in range(20)]
    write_vectors(storage.embeddings(TEST), ids, np.ones((20, 6)), TEST, "checkpoint-b")
    with pytest.raises(PipelineError, match=r"checkpoint-a.*checkpoint-b"):
        compare(storage, small_settings(), preset(), WINDOWS)


def test_users_without_an_embedding_are_a_hole_that_is_named(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "home")
    write_home(storage, num_users=20)
    (storage.embeddings(TRAIN) / "bucket=1.parquet").unlink()
    with pytest.raises(PipelineError, match="7 of 20 users"):
        compare(storage, small_settings(), preset(), WINDOWS)


def test_a_mart_of_another_cutoff_is_refused(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "home")
    write_home(storage, num_users=20)
    write_propensity(storage.marts(TEST), TRAIN, ["user-00001"], {"books": np.array([True])})
    with pytest.raises(PipelineError, match="do not belong to the cutoff 2024-03-31"):
        compare(storage, small_settings(), preset(), WINDOWS)


def test_the_sample_of_users_is_stable_and_capped(home: Storage) -> None:
    many = load_population(home, small_settings(max_probe_users=100), TRAIN, TARGETS)
    few = load_population(home, small_settings(max_probe_users=30), TRAIN, TARGETS)
    assert (len(many), len(few), many.num_users) == (100, 30, 240)
    assert set(few.user_ids.to_pylist()) < set(many.user_ids.to_pylist())
    assert few.user_ids.to_pylist() == sorted(few.user_ids.to_pylist())


def test_vectors_belong_to_their_users_and_the_reserved_user_is_nobody(home: Storage) -> None:
    users = load_population(home, small_settings(), TRAIN, [])
    assert COLD_START_USER not in users.user_ids.to_pylist()
    features = np.zeros((len(users), 3))
    representations, checkpoint = build_representations(home, users, features, seed=0)
    assert checkpoint == CHECKPOINT
    table = pa.concat_tables(
        pq.read_table(path) for path in sorted(home.embeddings(TRAIN).glob("*.parquet"))
    )
    wanted = dict(zip(table["user_id"].to_pylist(), table["embedding"].to_pylist(), strict=True))
    found = representations["embedding"][0].values
    for user, vector in zip(users.user_ids.to_pylist(), found, strict=True):
        np.testing.assert_array_equal(vector, np.float32(wanted[user]))


def test_a_random_vector_depends_on_user_cutoff_and_seed_alone() -> None:
    alone = random_vectors(pa.array(["b"]), TRAIN, 500, seed=1)
    among = random_vectors(pa.array(["a", "b"]), TRAIN, 500, seed=1)
    np.testing.assert_array_equal(alone[0], among[1])
    for other in (
        random_vectors(pa.array(["b"]), TEST, 500, 1),
        random_vectors(pa.array(["b"]), TRAIN, 500, 2),
        among[:1],
    ):
        assert abs(np.corrcoef(alone[0], other[0])[0, 1]) < 0.2
    assert abs(alone.mean()) < 0.15
    assert alone.std() == pytest.approx(1, abs=0.1)


def test_most_recent_type_is_read_from_the_events_before_the_cutoff(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "home")
    write_home(storage, num_users=60)
    types = {("b", TRAIN): "cart", ("a", TRAIN): "view", ("c", TEST): "purchase"}
    events = [
        {"user_id": f"user-{number:05d}", "event_id": name, "event_type": type_, "occurred_at": at}
        for number in range(60)
        for (name, at), type_ in types.items()
    ]  # each one's last event before the cutoff is a cart: ties go to the last event id
    write_events_sessionized(storage, events_frame(events))
    naive = compare(storage, small_settings(), preset(), WINDOWS)["naive"]
    recent = {row["metric"]: row["value"] for row in naive if row["predictor"] == "most_recent"}
    labels = pq.read_table(storage.marts(TEST) / "labels.parquet").to_pylist()
    actual = [row["next_event_type"] for row in labels if row["next_event_type"]]
    assert recent["accuracy"] == pytest.approx(actual.count("cart") / len(actual), abs=1e-6)


def text_of(comparison: dict) -> str:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(comparison_table(comparison))
    return console.export_text()


def test_terminal_table_fits_eighty_columns_and_says_it_is_simulated(comparison: dict) -> None:
    text = text_of(comparison)
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "simulated" in text
    assert "…" not in text
    for row in rows(comparison, task="churn", metric="auroc"):
        assert f"{row['value']:.3f}".removeprefix("0") in text


def test_headline_holds_plain_numbers(comparison: dict) -> None:
    figures = headline(comparison)
    assert figures["checkpoint_id"] == CHECKPOINT
    assert figures["churn auroc, rfm"] == max(
        row["value"] for row in rows(comparison, task="churn", metric="auroc", representation="rfm")
    )


def test_a_live_night_compares_where_the_labels_are_known(home: Storage) -> None:
    compare(home, small_settings(), preset(), LIVE_WINDOWS)
    assert (home.reports(LIVE_WINDOWS.cutoff) / "comparison.json").is_file()
