"""Users are gone from every byte below a home, stay gone, and nobody else has changed."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from behavior_pipeline.erasure import erase as erasing
from behavior_pipeline.erasure.erase import complete_pending, erase
from behavior_pipeline.erasure.rewriting import Affected, IsErased
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.feature_store.lookup import lookup
from behavior_pipeline.ingest.arrivals import load_document
from behavior_pipeline.storage import Storage, read_json
from behavior_pipeline.suppression import (
    hash_of,
    suppress,
    suppressed_condition,
    suppressed_hashes,
)

pytestmark = pytest.mark.slow


@pytest.fixture
def home(finished_home: Path, tmp_path: Path) -> Storage:
    """A copy of a home in which the whole job has run, with a candidate beside it."""
    copy = tmp_path / "data" / "simulated"
    shutil.copytree(finished_home, copy)
    return Storage(copy)


def users_of(storage: Storage) -> list[str]:
    """Everybody who has an event, the most active first."""
    tables = [
        pq.read_table(path, columns=["user_id"]) for path in storage.events.rglob("events*.parquet")
    ]
    counts = pa.concat_tables(tables)["user_id"].value_counts().to_pylist()
    return [row["values"] for row in sorted(counts, key=lambda row: -row["counts"])]


def texts_of(home: Path) -> Iterator[tuple[str, str]]:
    """Every file below a home as text; Parquet and databases as what they hold and as bytes."""
    for path in sorted(home.rglob("*")):
        if not path.is_file():
            continue
        name = str(path.relative_to(home))
        yield name, path.read_bytes().decode("latin-1")
        if path.suffix == ".parquet":
            yield name, str(pq.ParquetFile(path).read().to_pylist())
        if path.suffix == ".duckdb":
            yield name, "".join(rows_of(path))


def rows_of(path: Path) -> Iterator[str]:
    """All rows of all tables of a DuckDB file."""
    with duckdb.connect(str(path), read_only=True) as connection:
        tables = connection.execute("select schema_name, table_name from duckdb_tables()")
        for schema, table in tables.fetchall():
            yield str(connection.execute(f'from "{schema}"."{table}"').fetchall())


def test_no_byte_names_an_erased_user(home: Storage):
    erased = users_of(home)[:3]
    before = dict(texts_of(home.home))
    assert sum(any(user in text for user in erased) for text in before.values()) > 20
    receipt = erase(home, erased)
    found = [name for name, text in texts_of(home.home) if any(user in text for user in erased)]
    assert found == []
    for place in ("events rows", "embeddings rows", "sequences rows", "feature_store rows",
                  "candidates rows", "predictions rows", "segments rows", "states rows",
                  "controls rows", "marts rows", "online rows", "analytics rows"):  # fmt: skip
        assert receipt.counts[place] > 0, place
    assert lookup(home, erased[0])["is_cold_start"] is True
    assert not (home.home / "erasures" / "pending.json").exists()
    kept = read_json(home.home / "erasures" / f"{receipt.erasure_id}.json")
    assert kept["user_hashes"] == receipt.user_hashes
    assert kept["checkpoints"]


def test_nobody_else_changes(home: Storage):
    erased, other = users_of(home)[:3], users_of(home)[5]
    before, seen = rows_by_file(home, erased), lookup(home, other)
    erase(home, erased)
    assert rows_by_file(home, erased) == before
    assert lookup(home, other) == seen
    with sqlite3.connect(home.feature_store / "online.db") as connection:
        assert connection.execute("pragma integrity_check").fetchall() == [("ok",)]
    with duckdb.connect(str(home.analytics), read_only=True) as connection:
        query = "select count(*) from duckdb_columns() where comment is not null"
        (num_comments,) = connection.execute(query).fetchone()
        assert num_comments > 0
        assert connection.execute("select count(*) from user_rfm").fetchone()[0] > 0


def rows_by_file(storage: Storage, erased: list[str]) -> dict[str, list[object]]:
    """The rows of everybody else in every Parquet file that names users."""
    found = {}
    for path in sorted(storage.home.rglob("*.parquet")):
        table = pq.ParquetFile(path).read()
        if "user_id" in table.schema.names:
            is_erased = pc.is_in(table["user_id"], value_set=pa.array(erased))
            rows = table.filter(pc.invert(is_erased))
            found[str(path.relative_to(storage.home))] = rows.to_pylist()
    return found


def test_a_load_is_whole_afterwards_and_says_how_much_was_suppressed(home: Storage):
    erased = users_of(home)[:2]
    erase(home, erased)
    document = load_document(home, "history")
    assert document is not None
    parts = ("num_stored", "num_duplicates", "num_deletions", "num_quarantined", "num_suppressed")
    assert sum(document[part] for part in parts) == document["num_read"]
    assert document["num_suppressed"] > 0


def test_loading_everything_again_brings_nobody_back(
    home: Storage, finished_home: Path, small_environment: dict[str, str]
):
    erased = users_of(home)[:3]
    erase(home, erased)
    shutil.copytree(finished_home / "raw", home.home / "raw", dirs_exist_ok=True)
    environment = small_environment | {"BEHAVIOR_DATA_ROOT": str(home.home.parent)}
    for command in (("run",), ("nightly", "--cutoff", "2026-03-31")):
        done = subprocess.run(
            [sys.executable, "-m", "behavior_pipeline.cli", *command],
            env=environment | {"BEHAVIOR_MAX_TRAINING_STEPS": "10"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    shutil.rmtree(home.home / "raw")  # it is the source, which still has them
    found = [name for name, text in texts_of(home.home) if any(user in text for user in erased)]
    assert found == []
    document = load_document(home, "history")
    assert document is not None
    assert document["num_suppressed"] > 0


def test_erasing_again_finds_nothing_and_changes_nothing(home: Storage):
    erased = users_of(home)[:2]
    erase(home, erased)
    before = {name: text for name, text in texts_of(home.home) if not name.startswith("erasures")}
    again = erase(home, erased)
    assert sum(again.counts.values()) == 0
    after = {name: text for name, text in texts_of(home.home) if not name.startswith("erasures")}
    assert {name for name in before if before[name] != after.get(name)} <= {
        "feature_store/online.db", "feature_store/published.json",
    }  # fmt: skip


def test_many_users_take_one_pass(home: Storage, monkeypatch: pytest.MonkeyPatch):
    written: list[tuple[Path, ...]] = []
    rewrite = erasing.rewrite

    def noting(affected: Affected, is_erased: IsErased) -> None:
        written.append(affected.paths)
        rewrite(affected, is_erased)

    monkeypatch.setattr(erasing, "rewrite", noting)
    everybody = users_of(home)
    erase(home, [*everybody[:40], *(f"nobody-{number}" for number in range(10_000))])
    names = [path for paths in written for path in paths]
    assert len(names) == len(set(names)) > 0
    assert len(suppressed_hashes(home)) == 10_040


class Killed(BaseException):
    """Stands for a kill: nothing in the package catches it."""


@pytest.mark.parametrize(
    "step",
    ["suppress", "erase_from_quarantine", "_erase_event_ids", "recount_loads",
     "recount_published", "erase_from_warehouse", "erase_from_analytics", "erase_from_online"],
)  # fmt: skip
def test_an_erasure_that_was_killed_is_completed_by_the_next_run(
    home: Storage, step: str, monkeypatch: pytest.MonkeyPatch
):
    erased = users_of(home)[:3]

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(erasing, step, die)
        with pytest.raises(Killed):
            erase(home, erased)
    assert lookup(home, users_of(home)[-1])  # readers go on
    receipt = complete_pending(home)
    assert receipt is not None
    assert receipt.counts["events rows"] > 0
    found = [name for name, text in texts_of(home.home) if any(user in text for user in erased)]
    assert found == []


def test_ids_that_are_none_are_refused(home: Storage):
    for ids in ([], [""], ["__cold_start__"]):
        with pytest.raises(PipelineError, match="no user that can be erased"):
            erase(home, ids)


def test_sql_and_python_agree_on_hashes(tmp_path: Path):
    storage = Storage(tmp_path / "home")
    with duckdb.connect() as connection:
        assert suppressed_condition(connection, storage) == "false"
        users = ["", "u", "日本", "it's", "x" * 200]
        suppress(storage, users)
        condition = suppressed_condition(connection, storage)
        connection.register("rows", pa.table({"user_id": [*users, "other", None]}))
        found = connection.execute(f"select {condition} from rows").fetchall()
    assert [value for (value,) in found] == [True] * 5 + [False] * 2
    assert hash_of(b"key", "The quick brown fox jumps over the lazy dog") == (
        "f7bc83f430538424b13298e6aa6fb143ef4d59a14946175997479dbc2d1a3cd8"
    )  # RFC 2104's algorithm with SHA-256; a value that is widely published
