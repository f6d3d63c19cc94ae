from __future__ import annotations

import sqlite3
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feast import ValueType
from feast.type_map import python_values_to_proto_values
from feature_store_builders import (
    NOVEMBER,
    online_table,
    vectors,
    write_embeddings,
    write_predictions,
    write_rfm,
    write_segments,
    write_similar_users,
)

from behavior_pipeline.contracts import COLD_START_USER
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.feature_store.list_serialization import float_lists, string_lists
from behavior_pipeline.feature_store.online import delete_online, write_online
from behavior_pipeline.feature_store.partition import VIEWS
from behavior_pipeline.feature_store.publish import publish_view
from behavior_pipeline.feature_store.repository import offline_folder, open_store, view_of
from behavior_pipeline.feature_store.serialization import entity_keys, online_features
from behavior_pipeline.storage import Storage

USERS = ["", "u", "user-ä", "日本", *(f"user-{number:03d}" for number in range(60))]
Row = tuple[Any, ...]


def rows_of(storage: Storage, view: str) -> list[Row]:
    """Every row that the online store holds of a view, with the types that SQLite gave them."""
    names = "entity_key, feature_name, value, value_text, event_ts, created_ts"
    types = ", ".join(f"typeof({name})" for name in names.split(", "))
    with sqlite3.connect(storage.feature_store / "online.db") as connection:
        query = f"select {names}, {types} from {online_table(view)} order by 1, 2"
        return connection.execute(query).fetchall()


def write_all(storage: Storage) -> None:
    values = vectors(len(USERS), seed=1)
    values[1, :3] = [np.nan, 0.0, -0.0]
    write_embeddings(storage, NOVEMBER, USERS, values)
    for write in (write_rfm, write_predictions, write_segments, write_similar_users):
        write(storage, NOVEMBER, USERS)
    rfm = pq.read_table(storage.marts(NOVEMBER) / "user_rfm.parquet")
    signed = pa.array([(-0.0, 0.0, 1e-310, 2.5)[row % 4] for row in range(len(USERS))])
    at = rfm.column_names.index("monetary")
    rfm = rfm.set_column(at, rfm.schema.field(at), signed)
    pq.write_table(rfm, storage.marts(NOVEMBER) / "user_rfm.parquet")


@pytest.mark.parametrize("view", VIEWS)
def test_what_is_written_is_what_feast_would_have_written(
    storage: Storage, view: str, tmp_path: Path
):
    write_all(storage)
    publish_view(storage, view, NOVEMBER)
    theirs = Storage(tmp_path / "theirs")
    partition = next(offline_folder(storage, view).rglob("*.parquet"))
    frame = pq.read_table(partition).to_pandas(integer_object_nulls=True)
    open_store(theirs).write_to_online_store(view, df=frame)
    assert len(rows_of(storage, view)) >= len(USERS) * 3
    assert rows_of(storage, view) == rows_of(theirs, view)


def test_a_reader_never_waits_and_sees_whole_batches(storage: Storage, monkeypatch):
    write_embeddings(storage, NOVEMBER, USERS, vectors(len(USERS), seed=0))
    publish_view(storage, "user_embedding", NOVEMBER)
    write_embeddings(storage, NOVEMBER, USERS, vectors(len(USERS), seed=9))
    monkeypatch.setattr("behavior_pipeline.feature_store.publish.ONLINE_BATCH_ROWS", 10)
    store, seen = open_store(storage), list[int]()

    def read_meanwhile(done: int, _total: int, _name: str) -> None:
        rows = store.get_online_features(
            features=["user_embedding:embedding"],
            entity_rows=[{"user_id": user} for user in USERS],
        ).to_dict()["embedding"]
        assert all(row is not None for row in rows)
        seen.append(done)

    publish_view(storage, "user_embedding", NOVEMBER, report=read_meanwhile)
    assert seen[0] == 10
    assert seen[-1] == len(USERS) + 1


@pytest.mark.parametrize("max_left", [0, 1 << 29])
def test_few_rows_stay_in_the_write_ahead_file_until_it_is_large(
    storage: Storage, monkeypatch, max_left: int
):
    monkeypatch.setattr("behavior_pipeline.feature_store.online_sqlite.MAX_LEFT_BYTES", max_left)
    write_embeddings(storage, NOVEMBER, USERS, vectors(len(USERS), seed=0))
    publish_view(storage, "user_embedding", NOVEMBER)
    left = storage.feature_store / "online.db-wal"
    assert (left.exists() and left.stat().st_size > 0) == (max_left > 0)
    assert len({row[0] for row in rows_of(storage, "user_embedding")}) == len(USERS) + 1


def page_size(storage: Storage) -> int:
    with sqlite3.connect(storage.feature_store / "online.db") as connection:
        return connection.execute("PRAGMA page_size").fetchall()[0][0]


@pytest.mark.parametrize(("width", "expected"), [(8, 8_192), (768, 16_384)])
def test_pages_suit_the_vectors_and_other_views_are_kept(
    storage: Storage, width: int, expected: int
):
    write_rfm(storage, NOVEMBER, USERS)
    publish_view(storage, "user_rfm", NOVEMBER)
    others = rows_of(storage, "user_rfm")
    write_embeddings(storage, NOVEMBER, USERS, vectors(len(USERS), seed=0, width=width))
    publish_view(storage, "user_embedding", NOVEMBER)
    assert page_size(storage) == expected
    assert rows_of(storage, "user_rfm") == others
    assert len({row[0] for row in rows_of(storage, "user_embedding")}) == len(USERS) + 1


def test_pages_stay_as_they_are_while_somebody_reads(storage: Storage):
    write_rfm(storage, NOVEMBER, USERS)
    publish_view(storage, "user_rfm", NOVEMBER)
    write_embeddings(storage, NOVEMBER, USERS, vectors(len(USERS), seed=0, width=768))
    with sqlite3.connect(storage.feature_store / "online.db") as reader:
        reader.execute(f"select * from {online_table('user_rfm')}").fetchone()
        publish_view(storage, "user_embedding", NOVEMBER)
    reader.close()
    assert page_size(storage) == 4_096
    assert len({row[0] for row in rows_of(storage, "user_embedding")}) == len(USERS) + 1


def test_vectors_with_a_null_are_refused(storage: Storage):
    write_embeddings(storage, NOVEMBER, USERS[:3], vectors(3, seed=0))
    publish_view(storage, "user_embedding", NOVEMBER)
    view = open_store(storage).get_feature_view("user_embedding")
    batch = pq.read_table(next(offline_folder(storage, view.name).rglob("*.parquet")))
    nulls = pa.nulls(batch.num_rows, batch.schema.field("embedding").type)
    batch = batch.set_column(batch.column_names.index("embedding"), "embedding", nulls)
    with pytest.raises(ValueError, match="embedding holds nulls"):
        online_features(batch.to_batches()[0], view)


def test_removed_users_are_gone_from_the_view_and_from_the_file(storage: Storage):
    write_all(storage)
    for view in ("user_embedding", "user_predictions"):
        publish_view(storage, view, NOVEMBER)
    others = rows_of(storage, "user_predictions")
    store = open_store(storage)
    view = view_of(store, "user_embedding", 1)
    gone = pa.array([USERS[2], USERS[7], "nobody", USERS[7]])
    assert delete_online(store, view, gone) == 2
    left = {bytes(row[0]) for row in rows_of(storage, "user_embedding")}
    assert left == {*entity_keys(pa.array([*USERS, COLD_START_USER]), "user_id")} - {
        *entity_keys(gone, "user_id")
    }
    assert rows_of(storage, "user_predictions") == others
    assert delete_online(store, view, gone) == 0
    content = b"".join(path.read_bytes() for path in storage.feature_store.glob("online.db*"))
    vector = vectors(len(USERS), seed=1)[7].tobytes()
    assert vector not in content
    assert vectors(len(USERS), seed=1)[8].tobytes() in content


def test_other_kinds_of_online_store_are_the_users_mistake(storage: Storage):
    view = open_store(storage).get_feature_view("user_rfm")
    kind = SimpleNamespace(type="dynamodb")
    store: Any = SimpleNamespace(config=SimpleNamespace(online_store=kind))
    with pytest.raises(PipelineError, match="of the kind 'dynamodb'"):
        write_online(store, view, [], 0)


LISTS = {
    "strings": pa.array(
        [["a"], [], None, ["", "ä", "日本"], ["x" * 200], ["y"] * 300, ["z" * 20_000]],
        pa.list_(pa.string()),
    ),
    "floats": pa.array(
        [[1.0], [], None, [-0.0, float("nan"), 1e-45], [0.5] * 31, [0.5] * 40, [2.0] * 5_000],
        pa.list_(pa.float32()),
    ),
}


@pytest.mark.parametrize("kind", LISTS)
def test_lists_of_any_length_are_feasts_bytes(kind: str):
    column, cut = LISTS[kind], LISTS[kind].slice(2, 4)
    value_type = ValueType.STRING_LIST if kind == "strings" else ValueType.FLOAT_LIST
    serialize = string_lists if kind == "strings" else float_lists
    theirs = [
        value.SerializeToString()
        for value in python_values_to_proto_values(column.to_pylist(), value_type)
    ]
    assert serialize(column) == theirs
    assert serialize(cut) == theirs[2:6]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([["a", None]]), "a list holds a null"),
        (pa.array([[1.0, None]], pa.list_(pa.float32())), "a list holds a null"),
        (pa.array([[1.0]]), "the lists hold double"),
    ],
)
def test_lists_that_feast_would_change_are_refused(column: pa.Array, message: str):
    serialize = string_lists if pa.types.is_string(column.type.value_type) else float_lists
    with pytest.raises(ValueError, match=message):
        serialize(column)
