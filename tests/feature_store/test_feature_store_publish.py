from __future__ import annotations

import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from feast import FeatureView
from feature_store_builders import (
    AWKWARD,
    NOVEMBER,
    OCTOBER,
    online_table,
    vectors,
    write_embeddings,
    write_predictions,
    write_rfm,
    write_segments,
)

from behavior_pipeline.contracts import COLD_START_USER
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.feature_store import online_sqlite, publish
from behavior_pipeline.feature_store.lookup import lookup
from behavior_pipeline.feature_store.publish import publish_view
from behavior_pipeline.feature_store.published import read_published
from behavior_pipeline.feature_store.repository import open_store
from behavior_pipeline.feature_store.serialization import online_features
from behavior_pipeline.feature_store.verify import verify_published
from behavior_pipeline.storage import Storage, remove_leftovers

USERS = [f"user-{number:04d}" for number in range(1_200)]


def files_of(storage: Storage) -> dict[str, bytes]:
    """Everything published, but for SQLite's and the lock's own files."""
    folder = storage.feature_store
    paths = [path for path in folder.rglob("*") if path.is_file() and ".db" not in path.name]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def online_rows(storage: Storage) -> list[tuple[Any, ...]]:
    """Every row that the online store holds of embeddings."""
    with sqlite3.connect(storage.feature_store / "online.db") as connection:
        table = online_table("user_embedding")
        query = f"select * from {table} order by entity_key, feature_name"
        return connection.execute(query).fetchall()


def test_a_thousand_users_read_back_bit_for_bit(storage: Storage):
    values = vectors(len(USERS), seed=0)
    write_embeddings(storage, NOVEMBER, USERS, values)
    summary = publish_view(storage, "user_embedding", NOVEMBER)
    assert (summary.num_rows, summary.is_served) == (len(USERS) + 1, True)

    response = open_store(storage).get_online_features(
        features=["user_embedding:embedding"], entity_rows=[{"user_id": user} for user in USERS]
    )
    served = np.array(response.to_dict()["embedding"], np.float32)
    assert (served.view(np.uint32) == values.view(np.uint32)).all()
    assert (served[0, : len(AWKWARD)].view(np.uint32) == AWKWARD.view(np.uint32)).all()

    verification = verify_published(storage, NOVEMBER, num_users=1_000)
    assert (verification.num_users, verification.num_equal) == (1_000, 1_000)
    assert verification.is_equal


def test_verification_names_a_user_whose_vector_differs_in_one_bit(storage: Storage):
    values = vectors(20, seed=0)
    write_embeddings(storage, NOVEMBER, USERS[:20], values)
    publish_view(storage, "user_embedding", NOVEMBER)
    values.view(np.uint32)[7, 3] ^= 1
    write_embeddings(storage, NOVEMBER, USERS[:20], values)
    verification = verify_published(storage, NOVEMBER)
    assert (verification.num_users, verification.num_equal) == (21, 20)
    assert verification.mismatches == (USERS[7],)


def test_verification_needs_the_cutoff_that_is_served(storage: Storage):
    for cutoff in (OCTOBER, NOVEMBER):
        write_embeddings(storage, cutoff, USERS[:5], vectors(5, seed=0))
        publish_view(storage, "user_embedding", cutoff)
    with pytest.raises(PipelineError, match="serves embeddings of 2011-11-09"):
        verify_published(storage, OCTOBER)


def test_every_view_is_published_with_its_values(storage: Storage):
    users = USERS[:4]
    write_embeddings(storage, NOVEMBER, users, vectors(4, seed=0))
    write_rfm(storage, NOVEMBER, users)
    write_predictions(storage, NOVEMBER, users)
    write_segments(storage, NOVEMBER, users)
    for view in ("user_embedding", "user_rfm", "user_predictions", "user_segment"):
        publish_view(storage, view, NOVEMBER)
    found = lookup(storage, users[2])
    assert found["user_rfm__frequency"] == 3
    assert found["user_rfm__recency_days"] == 0.5
    assert str(found["user_rfm__monetary"]) == "-0.0"
    assert found["user_rfm__is_in_population"] is True
    assert found["user_predictions__churn_probability"] == 0.0
    assert found["user_predictions__top_target"] is None
    assert np.float32(found["user_predictions__next_event_probability"]) == np.float32(0.1)
    assert (found["user_segment__segment"], found["user_segment__distance"]) == (0, 0.0)
    assert found["user_segment__segment_name"] == "buys often"
    assert found["user_embedding__checkpoint_id"] == "checkpoint-a"


def test_publishing_again_changes_nothing(storage: Storage):
    write_embeddings(storage, NOVEMBER, USERS[:50], vectors(50, seed=0))
    write_rfm(storage, NOVEMBER, USERS[:50])
    for view in ("user_embedding", "user_rfm"):
        publish_view(storage, view, NOVEMBER)
    files, rows = files_of(storage), online_rows(storage)
    for view in ("user_embedding", "user_rfm"):
        publish_view(storage, view, NOVEMBER)
    assert files_of(storage) == files
    assert online_rows(storage) == rows


def test_an_older_cutoff_joins_the_history_and_is_not_served(storage: Storage):
    for cutoff, seed in ((OCTOBER, 1), (NOVEMBER, 2)):
        write_embeddings(storage, cutoff, USERS[:50], vectors(50, seed))
    publish_view(storage, "user_embedding", NOVEMBER)
    rows = online_rows(storage)
    summary = publish_view(storage, "user_embedding", OCTOBER)
    assert not summary.is_served
    assert online_rows(storage) == rows
    assert verify_published(storage, NOVEMBER).is_equal
    history = sorted(path.parent.name for path in storage.feature_store.glob("offline/*/*/*/*"))
    assert history == ["cutoff=2011-10-10", "cutoff=2011-11-09"]


def test_a_newer_cutoff_replaces_what_is_served(storage: Storage):
    for cutoff, seed in ((OCTOBER, 1), (NOVEMBER, 2)):
        write_embeddings(storage, cutoff, USERS[:50], vectors(50, seed))
        assert publish_view(storage, "user_embedding", cutoff).is_served
    assert verify_published(storage, NOVEMBER).is_equal


class Killed(BaseException):
    """Stands for a kill: nothing in the package catches it."""


def killing(after: int, sizes: list[int]) -> Callable[..., Any]:
    """What makes the rows of a batch; notes its size and dies when `after` batches have arrived."""

    def make_then_die(batch: pa.RecordBatch, view: FeatureView) -> Any:
        if len(sizes) == after:
            raise Killed
        sizes.append(batch.num_rows)
        return online_features(batch, view)

    return make_then_die


def test_a_killed_publication_is_completed_by_the_next(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
):
    for cutoff, seed in ((OCTOBER, 1), (NOVEMBER, 2)):
        write_embeddings(storage, cutoff, USERS, vectors(len(USERS), seed))
    with monkeypatch.context() as patch:
        patch.setattr(publish, "ONLINE_BATCH_ROWS", 1_000)
        patch.setattr(online_sqlite, "online_features", killing(1, []))
        with pytest.raises(Killed):
            publish_view(storage, "user_embedding", NOVEMBER)
    with pytest.raises(PipelineError, match="did not finish"):
        verify_published(storage, NOVEMBER)
    # A cutoff filled in meanwhile must not overwrite the half that has arrived.
    half = online_rows(storage)
    assert not publish_view(storage, "user_embedding", OCTOBER).is_served
    assert online_rows(storage) == half
    publish_view(storage, "user_embedding", NOVEMBER)
    verification = verify_published(storage, NOVEMBER, 2_000)
    assert (verification.num_users, verification.is_equal) == (len(USERS) + 1, True)


def test_users_are_handed_to_the_store_in_bounded_batches(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
):
    users = [f"user-{number:05d}" for number in range(2_500)]
    write_embeddings(storage, NOVEMBER, users, vectors(len(users), seed=0), num_buckets=1)
    sizes: list[int] = []
    monkeypatch.setattr(publish, "ONLINE_BATCH_ROWS", 1_000)
    monkeypatch.setattr(publish, "MIN_BATCH_ROWS", 1_000)
    monkeypatch.setattr(online_sqlite, "online_features", killing(99, sizes))
    reports: list[tuple[int, int, str]] = []
    publish_view(storage, "user_embedding", NOVEMBER, report=lambda *seen: reports.append(seen))
    assert sizes == [1_000, 1_000, 501]
    assert reports[-1] == (2_501, 2_501, "user_embedding")


def test_half_written_files_of_a_kill_are_no_part_of_the_history(storage: Storage):
    write_rfm(storage, NOVEMBER, USERS[:5])
    publish_view(storage, "user_rfm", NOVEMBER)
    partition = storage.feature_store / "offline" / "user_rfm" / "cutoff=2011-11-09"
    leftover = partition / ".features.parquet.0123abcd.aside"
    leftover.write_bytes(b"half a file")
    assert publish_view(storage, "user_rfm", NOVEMBER).num_rows == 5
    source = open_store(storage).get_feature_view("user_rfm").batch_source
    assert pq.read_table(partition / "features.parquet").num_rows == 5
    assert source.path == str(partition.parent.resolve())
    assert remove_leftovers(storage.home) == 1


def test_two_checkpoints_in_one_partition_are_refused(storage: Storage):
    write_embeddings(storage, NOVEMBER, USERS[:9], vectors(9, 0), ("checkpoint-a", "checkpoint-b"))
    with pytest.raises(PipelineError, match="mixes the checkpoints checkpoint-a, checkpoint-b"):
        publish_view(storage, "user_embedding", NOVEMBER)
    assert not (storage.feature_store / "offline").exists()


def _without_user(table: pa.Table) -> pa.Table:
    users = pc.if_else(pc.equal(table["user_id"], USERS[1]), None, table["user_id"])
    return table.set_column(table.column_names.index("user_id"), "user_id", users)


def _of_other_cutoff(table: pa.Table) -> pa.Table:
    cutoffs = pa.array([OCTOBER, *[NOVEMBER] * (table.num_rows - 1)], table.schema.field(0).type)
    return table.set_column(0, "observation_cutoff", cutoffs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.slice(0, 0), "there is no row"),
        (_without_user, "user_id is null in 1 rows"),
        (_of_other_cutoff, "1 rows of other cutoffs"),
        (lambda table: pa.concat_tables([table, table.slice(2, 1)]), "'user-0002' has more than"),
        (lambda table: table.drop_columns(["frequency"]), "lack the column 'frequency'"),
    ],
)
def test_rows_that_break_the_contract_are_refused(
    storage: Storage, change: Callable[[pa.Table], pa.Table], message: str
):
    path: Path = write_rfm(storage, NOVEMBER, USERS[:5])
    pq.write_table(change(pq.read_table(path)), path)
    with pytest.raises(PipelineError, match=message):
        publish_view(storage, "user_rfm", NOVEMBER)


def test_missing_files_and_unknown_views_are_the_users_mistake(storage: Storage):
    with pytest.raises(PipelineError, match=r"no user_rfm\.parquet in"):
        publish_view(storage, "user_rfm", NOVEMBER)
    with pytest.raises(PipelineError, match="no view 'user_shoes'"):
        publish_view(storage, "user_shoes", NOVEMBER)


def test_both_stores_cut_timestamps_to_the_second(storage: Storage):
    write_embeddings(storage, NOVEMBER, USERS[:1], vectors(1, seed=0))
    publish_view(storage, "user_embedding", NOVEMBER)
    folder = storage.feature_store / "offline" / "user_embedding" / "v1" / "cutoff=2011-11-09"
    table = pq.read_table(folder / "features.parquet").sort_by("user_id")
    assert table["user_id"].to_pylist() == [COLD_START_USER, USERS[0]]
    served = lookup(storage, USERS[0])["user_embedding__last_event_at"]
    assert table["last_event_at"].to_pylist() == [None, served]
    assert (served.hour, served.minute, served.second, served.microsecond) == (22, 59, 59, 0)


def test_views_published_at_the_same_time_all_arrive(storage: Storage):
    write_rfm(storage, NOVEMBER, USERS)
    write_predictions(storage, NOVEMBER, USERS)
    write_segments(storage, NOVEMBER, USERS)
    views = ("user_rfm", "user_predictions", "user_segment")
    with ThreadPoolExecutor(len(views)) as pool:
        done = list(pool.map(lambda view: publish_view(storage, view, NOVEMBER), views))
    assert [summary.num_rows for summary in done] == [len(USERS)] * 3
    assert sorted(read_published(storage)) == sorted(views)
    found = lookup(storage, USERS[-1])
    assert {found[f"{view}__cutoff_at"] for view in views} == {NOVEMBER}
