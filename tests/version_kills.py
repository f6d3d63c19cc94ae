"""One process changes what is published, for ever; another reads it, for ever.

Both are started in processes of their own by the test of kills, so all is at the module's top.
"""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from feast import FeatureStore
from feature_store_builders import (
    vectors,
    write_embeddings,
    write_predictions,
    write_segments,
    write_similar_users,
)

from behavior_pipeline.encoder.live import LIVE, point_to
from behavior_pipeline.feature_store.promotion import enlist, promote, record_gates, rollback
from behavior_pipeline.feature_store.publish import publish_view
from behavior_pipeline.feature_store.published import PublishedView, read_published
from behavior_pipeline.feature_store.repository import open_store
from behavior_pipeline.feature_store.versions import VERSIONED, read_versions
from behavior_pipeline.storage import Storage
from behavior_pipeline.windows import parse_cutoff

USERS = [f"user-{number:03d}" for number in range(300)]
START = datetime(2026, 1, 1, tzinfo=UTC)
NOW = datetime(2026, 5, 1, tzinfo=UTC)
A, B = "checkpoint-a", "checkpoint-b"
GATES = ("sound",)
PASSED = {"sound": {"passed": True, "note": "fine", "figures": {}}}


def make(storage: Storage, cutoff: datetime, checkpoint: str, version: int) -> None:
    """Publish a night; the first two numbers of a vector tell its checkpoint and its night."""
    values = vectors(len(USERS), seed=0)
    values[:, 0] = 1 if checkpoint == A else 2
    values[:, 1] = (cutoff - START).days
    write_embeddings(storage, cutoff, USERS, values, (checkpoint,))
    write_predictions(storage, cutoff, USERS, checkpoint)
    write_segments(storage, cutoff, USERS, checkpoint)
    write_similar_users(storage, cutoff, USERS, checkpoint)
    for view in VERSIONED:
        publish_view(storage, view, cutoff, version=version)


def begin(home: Path) -> None:
    """Publish the first night with checkpoint A."""
    storage = Storage(home)
    point_to(storage.checkpoints, LIVE, A)
    make(storage, START, A, 1)


def newest(storage: Storage, version: int) -> datetime:
    """The newest night that a version has."""
    view = read_published(storage, version).get("user_embedding", PublishedView())
    return parse_cutoff(view.online_cutoff) if view.online_cutoff else START


def advance(storage: Storage) -> str:
    """Take the next of: a night, a candidate, a promotion, a rollback; return which it was."""
    versions = read_versions(storage)
    live = versions.live_version
    assert live.checkpoint_id is not None
    if versions.earlier:
        rollback(storage)
        return "rollback"
    if versions.candidate is None:
        night = newest(storage, versions.live) + timedelta(days=1)
        make(storage, night, live.checkpoint_id, versions.live)
        enlist(storage, B, None, NOW)
        return "night"
    version = versions.candidate_version
    make(storage.of_candidate(B), newest(storage, versions.live), B, version.number)
    record_gates(storage, PASSED)
    promote(storage, GATES, NOW)
    return "promote"


def work(home: Path) -> None:
    """Change what is published until killed; note each change that was completed."""
    storage = Storage(home)
    (home / "working").touch()
    with (home / "changes.log").open("a") as log:
        while True:
            log.write(advance(storage) + "\n")
            log.flush()


def read(home: Path) -> None:
    """Read users until killed; note what must never be seen, and how often was read."""
    client = FeatureStore(config=open_store(Storage(home)).config)
    (home / "reading").touch()
    number = 0
    while not (home / "stop").exists():
        user = USERS[number * 7 % len(USERS)]
        number += 1
        if fault := fault_of(client, user) or fault_of_vector(client, user):
            (home / "faults.log").write_text(fault)
            return
    (home / "reads.json").write_text(json.dumps({"reads": number}))


def fault_of(client: FeatureStore, user: str) -> str:
    """Read a user as an untouched Feast client does; say what is wrong."""
    version = client.get_feature_view("user_embedding").current_version_number
    response = client.get_online_features(
        features=client.get_feature_service(f"user_profile_v{version}"),
        entity_rows=[{"user_id": user}],
        full_feature_names=True,
    ).to_dict()
    found: dict[str, Any] = {
        f"{name.partition('@')[0]}__{name.partition('__')[2]}": value[0]
        for name, value in response.items()
    }
    checkpoints = {value for name, value in found.items() if name.endswith("__checkpoint_id")}
    if len(checkpoints) != 1 or None in checkpoints:
        return f"{user} has values of {checkpoints}"
    vector = found["user_embedding__embedding"]
    if vector[0] != (1 if checkpoints == {A} else 2):
        return f"{user} has a vector of another checkpoint than {checkpoints}"
    if vector[1] != (found["user_embedding__cutoff_at"] - START).days:
        return f"{user} has a vector of another night than {found['user_embedding__cutoff_at']}"
    return ""


def fault_of_vector(client: FeatureStore, user: str) -> str:
    """Read a user's vector without a service, of whichever version is live."""
    names = ["user_embedding:embedding", "user_embedding:checkpoint_id"]
    response = client.get_online_features(features=names, entity_rows=[{"user_id": user}]).to_dict()
    checkpoint, vector = response["checkpoint_id"][0], response["embedding"][0]
    if vector is None or vector[0] != (1 if checkpoint == A else 2):
        return f"{user} has a vector of another checkpoint than {checkpoint}"
    return ""


def wait_for(path: Path, seconds: float = 60) -> None:
    """Wait until a file is there."""
    end = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.05)
