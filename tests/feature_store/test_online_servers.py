"""Redis and PostgreSQL: real servers, Feast's own writing beside ours, Feast's own reading."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feast import FeatureStore
from feature_store_builders import (
    NOVEMBER,
    OCTOBER,
    online_table,
    vectors,
    write_embeddings,
    write_predictions,
    write_rfm,
    write_segments,
    write_similar_users,
)
from place_builders import OWNER, PASSWORD, free_port, postgres_server, redis_server
from redis import Redis

from behavior_pipeline.contracts import COLD_START_USER
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.feature_store import publish
from behavior_pipeline.feature_store.lookup import lookup
from behavior_pipeline.feature_store.online import delete_online
from behavior_pipeline.feature_store.partition import VIEWS
from behavior_pipeline.feature_store.publish import publish_view
from behavior_pipeline.feature_store.repository import (
    LOCATION,
    definitions_folder,
    offline_folder,
    open_store,
    view_of,
)
from behavior_pipeline.feature_store.verify import verify_published
from behavior_pipeline.storage import Storage

USERS = ["", "u", "user-ä", "日本", *(f"user-{number:03d}" for number in range(60))]
Content = dict[Any, Any]


class RedisServer:
    """A server with one database for our writing and one for Feast's."""

    kind = "redis"

    def __init__(self, address: str) -> None:
        self.address = address

    def variables(self, database: int) -> dict[str, str]:
        return {"BEHAVIOR_REDIS": f"{self.address},db={database},password={PASSWORD}"}

    def content(self, database: int, view: str) -> Content:
        """Every field of every hash; all views share them."""
        del view
        host, port = self.address.split(":")
        with Redis(host, int(port), database, PASSWORD) as client:
            return {key: (client.hgetall(key), client.ttl(key)) for key in client.scan_iter()}


class PostgresServer:
    """As RedisServer."""

    kind = "postgres"

    def __init__(self, address: str) -> None:
        self.host, self.port = address.split(":")
        with self._connect("postgres") as connection:
            for database in range(3):
                connection.execute(f"CREATE DATABASE number_{database}")  # type: ignore[arg-type]

    def _connect(self, name: str) -> psycopg.Connection[Any]:
        login = {"user": OWNER, "password": PASSWORD, "dbname": name}
        return psycopg.connect(host=self.host, port=int(self.port), **login, autocommit=True)

    def variables(self, database: int) -> dict[str, str]:
        values = {
            "HOST": self.host,
            "PORT": self.port,
            "DATABASE": f"number_{database}",
            "USER": OWNER,
            "PASSWORD": PASSWORD,
            "SSLMODE": "disable",
        }
        return {f"BEHAVIOR_POSTGRES_{name}": value for name, value in values.items()}

    def content(self, database: int, view: str) -> Content:
        """Every row of a view."""
        with self._connect(f"number_{database}") as connection:
            query = f'SELECT * FROM "{online_table(view)}"'
            rows = connection.execute(query).fetchall()  # type: ignore[arg-type]
            return {row[:2]: row[2:] for row in rows}


Server = RedisServer | PostgresServer


@pytest.fixture(scope="module", params=["redis", "postgres"])
def _running(request: pytest.FixtureRequest) -> Iterator[Server]:
    if request.param == "redis":
        with redis_server() as address:
            yield RedisServer(address)
    else:
        with postgres_server() as address:
            yield PostgresServer(address)


@pytest.fixture
def server(_running: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setenv("BEHAVIOR_ONLINE_STORE", _running.kind)
    use(_running, 0, monkeypatch)
    _empty(_running)
    return _running


def use(server: Server, database: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.variables(database).items():
        monkeypatch.setenv(name, value)


def _empty(server: Server) -> None:
    if isinstance(server, RedisServer):
        host, port = server.address.split(":")
        with Redis(host, int(port), password=PASSWORD) as client:
            client.flushall()
        return
    for database in range(2):
        with server._connect(f"number_{database}") as connection:
            connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")


def write_all(storage: Storage) -> None:
    values = vectors(len(USERS), seed=1)
    values[1, :3] = [np.nan, 0.0, -0.0]
    write_embeddings(storage, NOVEMBER, USERS, values)
    for write in (write_rfm, write_predictions, write_segments, write_similar_users):
        write(storage, NOVEMBER, USERS)


def with_feast(storage: Storage, theirs: Storage, view: str) -> None:
    """Let Feast itself write what we published, into whichever database is in use."""
    partition = next(offline_folder(storage, view).rglob("*.parquet"))
    frame = pq.read_table(partition).to_pandas(integer_object_nulls=True)
    open_store(theirs).write_to_online_store(view, df=frame)


pytestmark = [pytest.mark.redis, pytest.mark.postgres]


def test_what_is_written_is_what_feast_would_have_written(
    storage: Storage, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_all(storage)
    theirs = Storage(tmp_path / "theirs")
    for view in VIEWS:
        publish_view(storage, view, NOVEMBER)
        use(server, 1, monkeypatch)
        with_feast(storage, theirs, view)
        use(server, 0, monkeypatch)
        expected = server.content(1, view)
        assert len(expected) >= len(USERS)
        assert server.content(0, view) == expected
    # And over what was there: each row again, in another way where the store has one.
    for view in VIEWS:
        publish_view(storage, view, NOVEMBER)
        assert server.content(0, view) == server.content(1, view)


def test_untouched_feast_reads_what_was_written(
    storage: Storage, server: Server, monkeypatch: pytest.MonkeyPatch
):
    values = vectors(len(USERS), seed=3)
    write_embeddings(storage, NOVEMBER, USERS, values)
    publish_view(storage, "user_embedding", NOVEMBER)
    assert not (storage.feature_store / "online.db").exists()
    monkeypatch.setenv(LOCATION, str(storage.feature_store.resolve()))
    file = definitions_folder() / f"feature_store.{server.kind}.yaml"
    store = FeatureStore(repo_path=str(definitions_folder()), fs_yaml_file=file)
    response = store.get_online_features(
        features=["user_embedding:embedding", "user_embedding:cutoff_at"],
        entity_rows=[{"user_id": user} for user in [*USERS, "nobody"]],
    ).to_dict()
    served = np.array(response["embedding"][:-1], np.float32)
    assert (served.view(np.uint32) == values.view(np.uint32)).all()
    assert response["embedding"][-1] is None
    assert set(response["cutoff_at"][:-1]) == {NOVEMBER}
    assert verify_published(storage, NOVEMBER).is_equal
    assert lookup(storage, "nobody")["is_cold_start"]


def test_a_killed_publication_is_completed_by_the_next(
    storage: Storage, server: Server, monkeypatch: pytest.MonkeyPatch
):
    class Killed(BaseException):
        pass

    def die(done: int, _total: int, _name: str) -> None:
        if done >= 20:
            raise Killed

    for cutoff, seed in ((OCTOBER, 1), (NOVEMBER, 2)):
        write_embeddings(storage, cutoff, USERS, vectors(len(USERS), seed))
    monkeypatch.setattr(publish, "ONLINE_BATCH_ROWS", 10)
    for cutoff in (OCTOBER, NOVEMBER):
        with pytest.raises(Killed):
            publish_view(storage, "user_embedding", cutoff, report=die)
    assert publish_view(storage, "user_embedding", NOVEMBER).is_served
    assert verify_published(storage, NOVEMBER).is_equal
    assert len(server.content(0, "user_embedding")) >= len(USERS)


@pytest.mark.usefixtures("server")
def test_removed_users_are_gone_from_one_view(storage: Storage):
    write_all(storage)
    for view in ("user_embedding", "user_rfm"):
        publish_view(storage, view, NOVEMBER)
    store = open_store(storage)
    view = view_of(store, "user_embedding", 1)
    gone = pa.array([USERS[2], USERS[7], "nobody", USERS[7]])
    assert delete_online(store, view, gone) == 2
    assert delete_online(store, view, gone) == 0
    asked = [*USERS, COLD_START_USER]
    found = store.get_online_features(
        features=["user_embedding:embedding", "user_rfm:frequency"],
        entity_rows=[{"user_id": user} for user in asked],
    ).to_dict()
    missing = [user for user, vector in zip(asked, found["embedding"], strict=True) if not vector]
    assert missing == [USERS[2], USERS[7]]
    assert found["frequency"] == [*range(1, len(USERS) + 1), None]
    assert delete_online(store, store.get_feature_view("user_rfm"), gone) == 2


def test_a_missing_variable_is_named(
    storage: Storage, server: Server, monkeypatch: pytest.MonkeyPatch
):
    name = list(server.variables(0))[-1]
    monkeypatch.delenv(name)
    with pytest.raises(PipelineError, match=f"needs the environment variable {name}"):
        open_store(storage)


def test_a_server_that_does_not_answer_is_said_in_words(
    storage: Storage, server: Server, monkeypatch: pytest.MonkeyPatch
):
    write_rfm(storage, NOVEMBER, USERS)
    monkeypatch.setenv("BEHAVIOR_REDIS", f"127.0.0.1:{free_port()}")
    monkeypatch.setenv("BEHAVIOR_POSTGRES_PORT", str(free_port()))
    with pytest.raises(PipelineError, match=r"The online store in (Redis|PostgreSQL) answers"):
        publish_view(storage, "user_rfm", NOVEMBER)
    assert not server.content(0, "user_rfm") if server.kind == "redis" else True


def test_a_wrong_password_is_said_in_words_and_not_shown(
    storage: Storage, server: Server, monkeypatch: pytest.MonkeyPatch
):
    write_rfm(storage, NOVEMBER, USERS)
    for name, value in server.variables(0).items():
        monkeypatch.setenv(name, value.replace(PASSWORD, "not 'the\" password"))
    with pytest.raises(PipelineError, match="The online store in") as refused:
        publish_view(storage, "user_rfm", NOVEMBER)
    assert "not 'the" not in str(refused.value)
