from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
from feature_store_builders import NOVEMBER, vectors, write_embeddings
from hypothesis import given
from hypothesis import strategies as st

from behavior_pipeline.feature_store.publish import publish_view
from behavior_pipeline.feature_store.repository import offline_folder
from behavior_pipeline.feature_store.user_order import in_user_order
from behavior_pipeline.storage import Storage

ids = st.text(max_size=3)


def batches(users: list[str], size: int) -> list[pa.RecordBatch]:
    table = pa.table({"user_id": pa.array(users, pa.string())})
    return table.to_batches(max_chunksize=size) or [pa.RecordBatch.from_pylist([], table.schema)]


@given(st.lists(st.lists(ids, max_size=12), max_size=5), st.integers(1, 5))
def test_sorted_sources_become_one_sorted_stream(sources: list[list[str]], size: int):
    found = list(in_user_order([iter(batches(sorted(users), size)) for users in sources]))
    merged = [user for batch in found for user in batch.column("user_id").to_pylist()]
    assert merged == sorted(user for users in sources for user in users)
    assert all(batch.num_rows <= size * len(sources) for batch in found)


@given(st.lists(st.lists(ids, max_size=12), max_size=5), st.integers(1, 5))
def test_unsorted_sources_lose_no_row(sources: list[list[str]], size: int):
    found = in_user_order([iter(batches(users, size)) for users in sources])
    merged = [user for batch in found for user in batch.column("user_id").to_pylist()]
    assert sorted(merged) == sorted(user for users in sources for user in users)


def test_the_history_is_in_the_order_of_users(storage: Storage):
    users = [f"user-{number % 7}-{number}" for number in range(100)]
    write_embeddings(storage, NOVEMBER, users, vectors(len(users), seed=0), num_buckets=8)
    publish_view(storage, "user_embedding", NOVEMBER)
    found = pq.read_table(next(offline_folder(storage, "user_embedding").rglob("*.parquet")))
    assert found["user_id"].to_pylist() == sorted(found["user_id"].to_pylist())
