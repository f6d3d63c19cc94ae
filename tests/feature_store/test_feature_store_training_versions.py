"""Training sets over a promotion: which of two versions' values a moment gets."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feature_store_builders import (
    NOVEMBER,
    OCTOBER,
    vectors,
    write_embeddings,
    write_predictions,
    write_segments,
    write_similar_users,
)

from behavior_pipeline.contracts import TIMESTAMP
from behavior_pipeline.encoder.live import CANDIDATE, LIVE, point_to
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.feature_store.historical import historical_features
from behavior_pipeline.feature_store.promotion import enlist, promote, record_gates
from behavior_pipeline.feature_store.publish import publish_view
from behavior_pipeline.feature_store.repository import offline_folder
from behavior_pipeline.feature_store.training_set import write_training_set
from behavior_pipeline.feature_store.versions import VERSIONED
from behavior_pipeline.storage import Storage

USERS = ["ada", "bob"]
NOW = datetime(2026, 5, 1, tzinfo=UTC)
LATER = timedelta(days=10)  # after its cutoff, the second version wrote November
FEATURES = ["user_embedding:embedding"]


def publish(storage: Storage, cutoff: datetime, checkpoint: str, version: int) -> None:
    """Publish everything of a checkpoint; its vectors begin with the version."""
    values = vectors(len(USERS), seed=0)
    values[:, 0] = version
    write_embeddings(storage, cutoff, USERS, values, (checkpoint,))
    for write in (write_predictions, write_segments, write_similar_users):
        write(storage, cutoff, USERS, checkpoint)
    for view in VERSIONED:
        publish_view(storage, view, cutoff, version=version)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """Version 1 wrote two nights; version 2 wrote the second again, later, and is live."""
    storage = Storage(tmp_path_factory.mktemp("promoted"))
    point_to(storage.checkpoints, LIVE, "checkpoint-a")
    for cutoff in (OCTOBER, NOVEMBER):
        publish(storage, cutoff, "checkpoint-a", 1)
    point_to(storage.checkpoints, CANDIDATE, "checkpoint-b")
    version = enlist(storage, "checkpoint-b", None, NOW).number
    publish(storage.of_candidate("checkpoint-b"), NOVEMBER, "checkpoint-b", version)
    for path in offline_folder(storage, "user_embedding", version).rglob("features.parquet"):
        table = pq.read_table(path)
        at = table.column_names.index("written_at")
        written = pa.repeat(pa.scalar(NOVEMBER + LATER, TIMESTAMP), len(table))
        pq.write_table(table.set_column(at, "written_at", written), path)
    record_gates(storage, {"sound": {"passed": True, "note": "", "figures": {}}})
    promote(storage, ("sound",), NOW)
    return storage


@pytest.mark.parametrize(
    ("moment", "as_published", "features", "version"),
    [
        (NOVEMBER, False, FEATURES, 2),  # the newer writing of the same cutoff
        (NOVEMBER + timedelta(hours=3), True, FEATURES, 1),
        (NOVEMBER + LATER, True, FEATURES, 2),
        (OCTOBER + timedelta(hours=3), False, FEATURES, 1),  # the history that version 2 took over
        (NOVEMBER, False, ["user_embedding@v1:embedding"], 1),
        (NOVEMBER, False, "personalization", 2),
        (NOVEMBER, False, "personalization_v1", 1),
    ],
)
def test_a_moment_gets_the_values_of_one_version(
    home: Storage, moment: datetime, as_published: bool, features: str | list[str], version: int
):
    asked = pa.table({"user_id": ["bob"], "event_timestamp": pa.array([moment], TIMESTAMP)})
    found = historical_features(home, asked, features, as_published=as_published)
    assert found["user_embedding__embedding"].to_pylist()[0][0] == version
    checkpoint = {1: "checkpoint-a", 2: "checkpoint-b"}[version]
    assert found["user_embedding__checkpoint_id"].to_pylist() == [checkpoint]


def test_vectors_of_both_are_flagged_and_a_pinned_version_is_not(home: Storage, tmp_path: Path):
    labels = tmp_path / "labels.csv"
    labels.write_text("user_id,event_timestamp\nada,2011-10-11\nada,2011-11-10\n")
    summary = write_training_set(home, labels, tmp_path / "both.parquet", FEATURES)
    assert summary.views["user_embedding"].checkpoints == {"checkpoint-a": 1, "checkpoint-b": 1}
    pinned = [f"user_embedding@v1:{name}" for name in ("embedding", "num_events")]
    out = tmp_path / "one.parquet"
    summary = write_training_set(home, labels, out, pinned, one_checkpoint=True)
    assert summary.views["user_embedding"].checkpoints == {"checkpoint-a": 2}
    assert "user_embedding__num_events" in pq.read_schema(out).names


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (["user_embedding@v7:embedding"], "no version 7 of user_embedding"),
        (["user_embedding@v1:embedding", "user_embedding:num_events"], "Two versions"),
    ],
)
def test_mistakes_about_versions_are_named(home: Storage, features: list[str], message: str):
    asked = pa.table({"user_id": ["bob"], "event_timestamp": pa.array([NOVEMBER], TIMESTAMP)})
    with pytest.raises(PipelineError, match=message):
        historical_features(home, asked, features)
