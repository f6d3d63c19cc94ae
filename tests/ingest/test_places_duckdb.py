from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from decimal import Decimal
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest
from ingest_builders import events, load, quarantine, said
from place_builders import BAD, EVENTS, PRESET, Event, typed_table, write_events
from typer.testing import CliRunner

from behavior_pipeline.cli import app
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.ingest.places import duckdb_tables
from behavior_pipeline.ingest.places.fetch import fetched
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage

WRITER = """
import duckdb, os, sys
connection = duckdb.connect(sys.argv[1])
connection.execute("CREATE TABLE IF NOT EXISTS written (n INTEGER)")
connection.execute("PRAGMA disable_checkpoint_on_shutdown; INSERT INTO written VALUES (1)")
print("has it", flush=True)
sys.stdin.read()
os._exit(0)
"""


def _database(file: Path, rows: list[Event] = EVENTS) -> Path:
    """A file with a table in two schemas and a view that leaves its database unsaid."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with duckdb.connect(str(file)) as connection:
        connection.register("rows", typed_table(rows))
        connection.execute("CREATE TABLE events AS FROM rows")
        connection.execute("CREATE SCHEMA web; CREATE TABLE web.visits AS FROM events")
        connection.execute("CREATE VIEW recent AS FROM web.visits")
    return file


@contextmanager
def _writer(file: Path) -> Iterator[subprocess.Popen[str]]:
    """Another program that holds a file for writing."""
    command = [sys.executable, "-c", WRITER, str(file)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "has it\n"
        yield program


@pytest.mark.parametrize("table", ["events", "main.events", "Web.VISITS", "recent"])
def test_the_same_events_as_from_parquet(
    table: str, tmp_path: Path, storage: Storage, settings: Settings
) -> None:
    file = _database(tmp_path / "it's.duckdb")
    before = file.read_bytes()
    load(write_events(tmp_path / "a.parquet"), storage, settings, preset=PRESET)
    home = Storage(tmp_path / "home")
    load(f"{file}::{table}", home, settings, preset=PRESET)
    assert said(events(home)) == said(events(storage))
    assert file.read_bytes() == before
    assert not file.with_name("it's.duckdb.wal").exists()


def test_quarantine_names_the_table(tmp_path: Path, storage: Storage, settings: Settings) -> None:
    file = _database(tmp_path / "shop.duckdb", [*EVENTS, BAD])
    load(f"{file}::web.visits", storage, settings, preset=PRESET)
    (row,) = quarantine(storage)
    assert (row["source_file"], row["row_number"]) == (f"{file}::web.visits", len(EVENTS) + 1)


def test_a_night_takes_what_occurred_on_its_day(
    tmp_path: Path, storage: Storage, settings: Settings
) -> None:
    path = f"{_database(tmp_path / 'shop.db')}::events"
    summary = load(path, storage, settings, preset=PRESET, arrival="d", day=date(2024, 1, 1))
    assert summary.num_inserted == 3


@pytest.mark.parametrize("path", ["{date}.duckdb::events", "all/shop.duckdb::day_{date}"])
def test_a_night_takes_the_file_or_the_table_of_its_day_whole(
    path: str, tmp_path: Path, storage: Storage, settings: Settings
) -> None:
    days = {"2024-03-01": EVENTS[:3], "2024-03-02": EVENTS[3:]}
    (tmp_path / "all").mkdir()
    for day, rows in days.items():
        _database(tmp_path / f"{day}.duckdb", rows)
        with duckdb.connect(str(tmp_path / "all" / "shop.duckdb")) as connection:
            connection.register("rows", typed_table(rows))
            connection.execute(f'CREATE TABLE "day_{day}" AS FROM rows')
    place = f"{tmp_path}/{path}"
    night = load(
        place, storage, settings, preset=PRESET, arrival="2024-03-02", day=date(2024, 3, 2)
    )
    assert night.num_inserted == 2
    load(place.replace("{date}", "*"), storage, settings, preset=PRESET)  # as defs/ingest.py does
    assert len(events(storage)) == len(EVENTS)


def test_a_writer_is_waited_for_and_kept_out_no_longer_than_the_copying(
    tmp_path: Path, settings: Settings
) -> None:
    file = _database(tmp_path / "shop.duckdb")
    with _writer(file) as program:
        assert program.stdin is not None
        release = threading.Timer(1, program.stdin.close)
        release.start()
        with fetched(f"{file}::written", None, tmp_path, settings) as found:
            assert pq.ParquetFile(found.files[0]).metadata.num_rows == 1  # of its log
            with _writer(file) as second:  # may write while the load goes on
                assert second.stdin is not None
                second.stdin.close()
        release.join()


def test_a_writer_that_stays_is_named(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = _database(tmp_path / "shop.duckdb")
    monkeypatch.setattr(duckdb_tables, "PATIENCE_SECONDS", 0.1)
    with _writer(file) as program:
        with (
            pytest.raises(PipelineError, match=r"shop\.duckdb' is held by another program"),
            fetched(f"{file}::events", None, tmp_path, settings),
        ):
            pass
        program.kill()


def test_types_that_parquet_cannot_hold_arrive_as_exact_text(
    tmp_path: Path, settings: Settings
) -> None:
    file = tmp_path / "shop.duckdb"
    with duckdb.connect(str(file)) as connection:
        connection.execute(
            "CREATE VIEW v AS SELECT sum(1::BIGINT << 60) AS total, INTERVAL '1us' AS gap, "
            "[1::HUGEINT] AS codes, 'x'::ENUM('x') AS kind, 1.50::DECIMAL(5, 2) AS price"
        )
    with fetched(f"{file}::v", None, tmp_path, settings) as found:
        assert pq.ParquetFile(found.files[0]).read().to_pylist() == [
            {
                "total": str(2**60),
                "gap": "00:00:00.000001",
                "codes": "[1]",
                "kind": "x",
                "price": Decimal("1.50"),
            }
        ]


MISTAKES = {
    "file": ("none.duckdb::events", "There is no DuckDB file 'none.duckdb'"),
    "no name": ("shop.duckdb", "'shop.duckdb' names no table"),
    "table": ("shop.duckdb::web.visit", "Did you mean 'web.visits'?"),
    "schema": ("shop.duckdb::visits", "no table or view 'main.visits' in 'shop.duckdb'"),
    "kind": ("text.duckdb::events", "'text.duckdb' cannot be read"),
    "other engine": ("sqlite.db::events", "'sqlite.db' cannot be read"),
    "view": ("shop.duckdb::broken", "'shop.duckdb' cannot be read"),
    "column": ("shop.duckdb::events", "'shop.duckdb::events' has no column"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_explained(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with duckdb.connect(str(_database(tmp_path / "shop.duckdb"))) as connection:
        connection.execute("CREATE TABLE gone (n INTEGER); CREATE VIEW broken AS FROM gone")
        connection.execute("DROP TABLE gone")
    (tmp_path / "text.duckdb").write_text("no database")
    (tmp_path / "sqlite.db").write_bytes(b"SQLite format 3\x00" + bytes(4096))
    path, message = MISTAKES[case]
    result = CliRunner().invoke(
        app, ["run", "--source", "oss_commits", "--path", path, "--data-root", "data"]
    )
    joined = " ".join(result.output.split())
    assert result.exit_code == 2, joined
    assert message in joined
    assert [word for word in ("Traceback", ".aside") if word in joined] == []
