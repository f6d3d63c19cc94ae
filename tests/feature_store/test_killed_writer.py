"""A writer of the SQLite store is killed at any moment while others read."""

from __future__ import annotations

import random
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from feature_store_builders import NOVEMBER, online_table, vectors, write_embeddings

from behavior_pipeline.feature_store.publish import publish_view
from behavior_pipeline.feature_store.repository import open_store
from behavior_pipeline.feature_store.verify import verify_published
from behavior_pipeline.storage import Storage

USERS = [f"user-{number:05d}" for number in range(4_000)]
WRITER = """
import sys
from datetime import datetime
from pathlib import Path
from behavior_pipeline.feature_store import publish
from behavior_pipeline.storage import Storage
publish.ONLINE_BATCH_ROWS = 100
storage, cutoff = Storage(Path(sys.argv[1])), datetime.fromisoformat(sys.argv[2])
def say(done, total, name):
    print(done, flush=True)
publish.publish_view(storage, "user_embedding", cutoff, report=say)
"""


@pytest.mark.slow
def test_a_killed_writer_leaves_whole_batches_and_a_whole_file(storage: Storage):
    write_embeddings(storage, NOVEMBER, USERS, vectors(len(USERS), seed=0))
    open_store(storage)
    file, chance = storage.feature_store / "online.db", random.Random(0)  # noqa: S311 - a test's
    seen = []
    for _ in range(4):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, storage.home, NOVEMBER.isoformat()],
            stdout=subprocess.PIPE,
        )
        assert writer.stdout is not None
        writer.stdout.readline()  # the first batch is written
        time.sleep(chance.uniform(0, 0.5))
        writer.kill()
        writer.wait()
        seen.append(rows_of_whole_users(file))
    assert all(100 <= users <= len(USERS) + 1 for users in seen)
    publish_view(storage, "user_embedding", NOVEMBER)
    assert rows_of_whole_users(file) == len(USERS) + 1
    assert verify_published(storage, NOVEMBER).is_equal


def rows_of_whole_users(file: Path) -> int:
    """Count the users, each of whom has all features, in a file without a fault."""
    table = online_table("user_embedding")
    with sqlite3.connect(file) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        per_user = f"SELECT count(*) AS n FROM {table} GROUP BY entity_key"
        query = f"SELECT count(*), min(n), max(n) FROM ({per_user})"
        users, fewest, most = connection.execute(query).fetchone()
    assert fewest == most
    return int(users)
