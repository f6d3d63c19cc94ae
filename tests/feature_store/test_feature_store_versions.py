from __future__ import annotations

import shutil
import sqlite3
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from feast import FeatureStore
from feature_store_builders import (
    NOVEMBER,
    OCTOBER,
    vectors,
    write_embeddings,
    write_predictions,
    write_rfm,
    write_segments,
    write_similar_users,
)

from behavior_pipeline.encoder.live import CANDIDATE, LIVE, UNTRAINED, point_to, pointed_to
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.feature_store import promotion
from behavior_pipeline.feature_store.historical import historical_features
from behavior_pipeline.feature_store.lookup import lookup
from behavior_pipeline.feature_store.promotion import (
    enlist,
    promote,
    record_gates,
    rollback,
    settle,
)
from behavior_pipeline.feature_store.publish import publish_view
from behavior_pipeline.feature_store.repository import open_store
from behavior_pipeline.feature_store.verify import verify_published
from behavior_pipeline.feature_store.versions import VERSIONED, read_versions
from behavior_pipeline.storage import Storage, read_json, write_json

USERS = [f"user-{number:02d}" for number in range(12)]
NOW = datetime(2026, 5, 1, tzinfo=UTC)
PASSED = {"sound": {"passed": True, "note": "fine", "figures": {}}}
A, B = "checkpoint-a", "checkpoint-b"


def publish(storage: Storage, cutoff: datetime, checkpoint: str, version: int | None) -> None:
    """Publish everything of a checkpoint; its vectors begin with a number of its own."""
    values = vectors(len(USERS), seed=0)
    values[:, 0] = 1 if checkpoint == A else 2
    write_embeddings(storage, cutoff, USERS, values, (checkpoint,))
    write_predictions(storage, cutoff, USERS, checkpoint)
    write_segments(storage, cutoff, USERS, checkpoint)
    write_similar_users(storage, cutoff, USERS, checkpoint)
    for view in VERSIONED:
        publish_view(storage, view, cutoff, version=version)


@pytest.fixture
def home(storage: Storage) -> Storage:
    """A home where checkpoint A is live since October, and B waits with the same night."""
    point_to(storage.checkpoints, LIVE, A)
    point_to(storage.checkpoints, UNTRAINED, "untrained-a")
    for cutoff in (OCTOBER, NOVEMBER):
        publish(storage, cutoff, A, None)
        write_rfm(storage, cutoff, USERS)
        publish_view(storage, "user_rfm", cutoff)
    point_to(storage.checkpoints, CANDIDATE, B)
    version = enlist(storage, B, "untrained-b", NOW)
    publish(storage.of_candidate(B), NOVEMBER, B, version.number)
    return storage


def served(storage: Storage, service: str = "user_profile") -> dict[str, Any]:
    """What an untouched Feast client reads of a user."""
    store = FeatureStore(config=open_store(storage).config)
    response = store.get_online_features(
        features=store.get_feature_service(service),
        entity_rows=[{"user_id": USERS[3]}],
        full_feature_names=True,
    ).to_dict()
    return {promotion_free(name): value[0] for name, value in response.items()}


def promotion_free(name: str) -> str:
    """A feature's name without its version."""
    view, _, feature = name.partition("__")
    return f"{view.partition('@')[0]}__{feature}"


def checkpoints_of(features: dict[str, Any]) -> set[str]:
    return {value for name, value in features.items() if name.endswith("__checkpoint_id")}


def test_a_candidate_is_published_beside_what_is_read(home: Storage):
    assert checkpoints_of(served(home)) == {A}
    assert checkpoints_of(served(home, "user_profile_v1")) == {A}
    assert checkpoints_of(served(home, "user_profile_v2")) == {B}
    assert verify_published(home, NOVEMBER).is_equal
    assert verify_published(home.of_candidate(B), NOVEMBER, version=2).is_equal


def test_promotion_and_rollback_change_every_view_at_once(home: Storage):
    record_gates(home, PASSED)
    promote(home, ("sound",), NOW)
    assert checkpoints_of(served(home)) == {B}
    assert lookup(home, USERS[3])["user_embedding__embedding"][0] == 2
    assert served(home)["user_rfm__frequency"] == 4
    assert pointed_to(home.checkpoints, LIVE) == B
    assert pointed_to(home.checkpoints, UNTRAINED) == "untrained-b"
    assert pointed_to(home.checkpoints, CANDIDATE) is None
    assert checkpoints_of(served(home, "user_profile_v1")) == {A}  # for whoever pins it

    rollback(home)
    assert checkpoints_of(served(home)) == {A}
    assert lookup(home, USERS[3])["user_embedding__embedding"][0] == 1
    assert pointed_to(home.checkpoints, LIVE) == A
    assert pointed_to(home.checkpoints, UNTRAINED) == "untrained-a"
    with pytest.raises(PipelineError, match="no earlier version"):
        rollback(home)


def test_a_client_that_is_open_follows_the_promotion(home: Storage):
    client = FeatureStore(config=open_store(home).config)

    def checkpoint() -> str:
        response = client.get_online_features(
            features=client.get_feature_service("churn_model"),
            entity_rows=[{"user_id": USERS[0]}],
        )
        return response.to_dict()["checkpoint_id"][0]

    assert checkpoint() == A
    record_gates(home, PASSED)
    promote(home, ("sound",), NOW)
    assert checkpoint() == B
    rollback(home)
    assert checkpoint() == A


def test_no_candidate_goes_live_past_a_gate(home: Storage):
    with pytest.raises(PipelineError, match="has not been through sound"):
        promote(home, ("sound",), NOW)
    failed = {"sound": {"passed": False, "note": "all vectors are equal", "figures": {}}}
    record_gates(home, failed)
    with pytest.raises(PipelineError, match=r"held back by sound .*all vectors are equal"):
        promote(home, ("sound",), NOW)
    assert read_versions(home).live == 1
    enlist(home, B, None, NOW)  # asks all gates anew
    assert read_versions(home).candidate_version.gates == {}


def test_a_candidate_that_lags_behind_does_not_go_live(home: Storage):
    later = NOVEMBER + timedelta(days=1)
    publish(home, later, A, None)
    record_gates(home, PASSED)
    with pytest.raises(PipelineError, match="of 2011-11-09; the live one has 2011-11-10"):
        promote(home, ("sound",), NOW)


def test_rows_of_another_checkpoint_never_join_a_version(home: Storage):
    with pytest.raises(PipelineError, match="would mix"):
        publish(home, NOVEMBER, B, None)
    assert checkpoints_of(served(home)) == {A}


def test_a_checkpoint_that_is_live_or_was_is_no_candidate(home: Storage):
    with pytest.raises(PipelineError, match="version 1 already, which is live"):
        enlist(home, A, None, NOW)
    record_gates(home, PASSED)
    promote(home, ("sound",), NOW)
    with pytest.raises(PipelineError, match="version 1 already, which is earlier"):
        enlist(home, A, None, NOW)


def test_history_keeps_what_was_served_then(home: Storage):
    record_gates(home, PASSED)
    promote(home, ("sound",), NOW)
    asked = pa.table(
        {
            "user_id": [USERS[0], USERS[0]],
            "event_timestamp": [OCTOBER + timedelta(days=3), NOVEMBER + timedelta(days=3)],
        }
    )
    names = ["user_embedding:embedding"]
    found = historical_features(home, asked, names)
    assert found["user_embedding__checkpoint_id"].to_pylist() == [A, B]
    assert [vector[0] for vector in found["user_embedding__embedding"].to_pylist()] == [1, 2]
    rollback(home)
    found = historical_features(home, asked, names)
    assert found["user_embedding__checkpoint_id"].to_pylist()[0] == A


class Killed(BaseException):
    """Stands for a kill: nothing in the package catches it."""


@pytest.mark.parametrize("step", ["write_versions", "apply_definitions", "_point"])
@pytest.mark.parametrize("change", ["promote", "rollback"])
def test_a_change_that_is_killed_is_whole_for_readers_and_completed_by_the_next(
    home: Storage, step: str, change: str, monkeypatch: pytest.MonkeyPatch
):
    record_gates(home, PASSED)
    if change == "rollback":
        promote(home, ("sound",), NOW)
    client = FeatureStore(config=open_store(home).config)

    def die(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(promotion, step, die)
        with pytest.raises(Killed):
            promote(home, ("sound",), NOW) if change == "promote" else rollback(home)
    response = client.get_online_features(
        features=client.get_feature_service("user_profile"),
        entity_rows=[{"user_id": USERS[5]}],
        full_feature_names=True,
    ).to_dict()
    seen = {value[0] for name, value in response.items() if name.endswith("__checkpoint_id")}
    assert len(seen) == 1
    settle(home)
    live = read_versions(home).live_version.checkpoint_id
    assert checkpoints_of(served(home)) == {live}
    assert pointed_to(home.checkpoints, LIVE) == live


def test_a_store_from_before_there_were_versions_is_taken_over(home: Storage):
    shutil.rmtree(home.feature_store)
    publish(home, NOVEMBER, A, None)
    before = lookup(home, USERS[2])
    make_old(home)
    settle(home)
    assert lookup(home, USERS[2]) == before
    assert read_versions(home).live_version.checkpoint_id == A
    assert verify_published(home, NOVEMBER).is_equal
    asked = pa.table({"user_id": [USERS[2]], "event_timestamp": [NOVEMBER]})
    found = historical_features(home, asked, ["user_embedding:embedding"])
    assert np.float32(found["user_embedding__embedding"][0].as_py()[0]) == 1


def make_old(storage: Storage) -> None:
    """Turn a store of version 1 into what it was before there were versions."""
    folder = storage.feature_store
    for name in ("versions.json", "applied.json", "registry.db"):
        (folder / name).unlink(missing_ok=True)
    with sqlite3.connect(folder / "online.db") as connection:
        for view in VERSIONED:
            table = f"behavior_pipeline_{view}"
            connection.execute(f"alter table {table}_v1 rename to {table}")
            for cutoff in (folder / "offline" / view / "v1").glob("cutoff=*"):
                cutoff.rename(folder / "offline" / view / cutoff.name)
    published = read_json(folder / "published.json")
    write_json(
        folder / "published.json",
        {name.removesuffix("@v1"): state for name, state in published.items()},
    )


def test_versions_that_nobody_returns_to_are_let_go(home: Storage):
    checkpoints = [B, *(f"checkpoint-{letter}" for letter in "cdef")]
    for checkpoint in checkpoints:
        version = enlist(home, checkpoint, None, NOW)
        publish(home.of_candidate(checkpoint), NOVEMBER, checkpoint, version.number)
        record_gates(home, PASSED)
        promote(home, ("sound",), NOW)
    assert read_versions(home).live == 6
    assert set(read_versions(home).known) == {3, 4, 5, 6}  # two to return to, and one that waits
    with sqlite3.connect(home.feature_store / "online.db") as connection:
        query = "select name from sqlite_master where type = 'table' and name like '%embedding%'"
        tables = sorted(name for (name,) in connection.execute(query))
    assert tables == [f"behavior_pipeline_user_embedding_v{number}" for number in (3, 4, 5, 6)]
    assert not (home.home / "candidates" / B).exists()
    asked = pa.table({"user_id": [USERS[0]], "event_timestamp": [OCTOBER + timedelta(days=3)]})
    found = historical_features(home, asked, ["user_embedding:embedding"])
    assert found["user_embedding__checkpoint_id"].to_pylist() == [A]
