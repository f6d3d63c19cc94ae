from __future__ import annotations

import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from adbc_driver_postgresql import dbapi
from ingest_builders import LATER, events, load, quarantine, said
from place_builders import (
    BAD,
    EVENTS,
    OWNER,
    PASSWORD,
    PRESET,
    Event,
    at,
    free_port,
    postgres_server,
    write_events,
)
from typer.testing import CliRunner

from behavior_pipeline.cli import app
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.ingest.places import postgres_tables
from behavior_pipeline.ingest.places.fetch import fetched
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage

pytestmark = pytest.mark.postgres

COLUMNS = (
    "who bigint, what text, at timestamptz, sku varchar(40), price numeric(10, 2), "
    "codes integer[], is_new boolean, born date, weight double precision, key uuid"
)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with postgres_server() as place:
        yield place


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGUSER", OWNER)
    monkeypatch.setenv("PGPASSWORD", PASSWORD)


@pytest.fixture
def address(server: str) -> str:
    """The start of a path; each test has a schema of its own."""
    _execute(server, "DROP SCHEMA IF EXISTS web CASCADE", "CREATE SCHEMA web")
    return f"postgresql://{server}/postgres?table="


def _execute(server: str, *statements: str) -> None:
    with dbapi.connect(f"postgresql://{server}/postgres") as connection:
        for statement in statements:
            with connection.cursor() as cursor:
                cursor.execute(statement)
        connection.commit()


def _literal(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, list):
        return f"ARRAY{value}::integer[]"
    return "'" + str(value).replace("'", "''") + "'"


def _create(server: str, table: str, rows: list[Event] = EVENTS) -> None:
    values = ", ".join(f"({', '.join(_literal(value) for value in row)})" for row in rows)
    _execute(server, f"CREATE TABLE {table} ({COLUMNS})", f"INSERT INTO {table} VALUES {values}")


def _read(path: str, folder: Path, settings: Settings, day: date | None = None) -> Any:
    folder.mkdir(exist_ok=True)
    with fetched(path, day, folder, settings) as found:
        (file,) = found.files
        return pq.ParquetFile(file).read()


def test_the_same_events_as_from_parquet(
    tmp_path: Path, server: str, address: str, storage: Storage, settings: Settings
) -> None:
    _create(server, "web.events")
    _execute(server, "CREATE MATERIALIZED VIEW web.later AS SELECT * FROM web.events")
    load(write_events(tmp_path / "a.parquet"), storage, settings, preset=PRESET)
    expected = events(storage)
    assert len(expected) == len(EVENTS)
    for table in ("web.events", "web.later"):
        home = Storage(tmp_path / table)
        load(address + table, home, settings, preset=PRESET, at=LATER)
        assert said(events(home)) == said(expected)
    load(address + "web.events", storage, settings, preset=PRESET, at=LATER)
    assert events(storage) == expected  # it was loaded before


@pytest.mark.parametrize("type_", ["timestamptz", "timestamp", "date"])
def test_a_night_reads_what_arrived_on_its_utc_day(
    type_: str, tmp_path: Path, server: str, address: str, storage: Storage, settings: Settings
) -> None:
    _create(server, "web.events")
    times = {"2024-01-09 23:59:59": 1, "2024-01-10 00:00:00": 2, "2024-01-11 00:00:00": 3}
    cast = f"::{type_}" if type_ != "timestamptz" else "::timestamp AT TIME ZONE 'UTC'"
    _execute(
        server,
        f"ALTER TABLE web.events ADD COLUMN came {type_}",
        *[
            f"UPDATE web.events SET came = '{time}'{cast} WHERE who = {who}"
            for time, who in times.items()
        ],
    )
    path = address + "web.events&arrived_at=came"
    day = date(2024, 1, 10)
    assert _read(path, tmp_path / "copies", settings, day)["who"].to_pylist() == [2]  # not more
    night = load(path, storage, settings, preset=PRESET, arrival=f"{day}", day=day)
    assert (night.num_read, night.num_inserted) == (1, 1)  # it occurred on another day
    load(path, storage, settings, preset=PRESET)
    assert len(events(storage)) == len(EVENTS)
    with pytest.raises(PipelineError, match=r"no row whose 'came' lies on 2024-01-12"):
        load(path, storage, settings, preset=PRESET, arrival="2024-01-12", day=date(2024, 1, 12))


def test_without_arrived_at_a_night_takes_what_occurred_on_its_day(
    server: str, address: str, storage: Storage, settings: Settings
) -> None:
    _create(server, "web.events")
    path, day = address + "web.events", date(2024, 1, 1)
    assert load(path, storage, settings, preset=PRESET, arrival="d", day=day).num_inserted == 3


def test_quarantine_names_the_table(
    server: str, address: str, storage: Storage, settings: Settings
) -> None:
    _create(server, "web.events", [*EVENTS, BAD])
    load(address + "web.events&arrived_at=at", storage, settings, preset=PRESET)
    (row,) = quarantine(storage)
    assert (row["source_file"], row["row_number"]) == (address + "web.events", len(EVENTS) + 1)


TYPES = {
    "numeric": ("'12345678901234567890.123'::numeric", "12345678901234567890.123"),
    "nan": ("'NaN'::numeric", "NaN"),
    "timestamptz": ("'2024-01-01 10:00+02'::timestamptz", at(1, 8)),
    "timestamp": ("'2024-01-01 10:00'::timestamp", at(1, 10).replace(tzinfo=None)),
    "uuid": ("'{0F5AE9B6-0F0E-4C39-B1E5-0A1F2D0C9A11}'::uuid", EVENTS[0][9]),
    "jsonb": ("""'{"a":   1}'::jsonb""", '{"a": 1}'),
    "char": ("'ab'::char(5)", "ab"),
    "real": ("1.5::real", 1.5),
    "oid": ("4294967295::oid", 4294967295),
    "money": ("5.25::money", "5.25"),
    "interval": ("'1 day 00:00:01'::interval", "1 day 00:00:01"),
    "inet": ("'127.0.0.1'::inet", "127.0.0.1/32"),
    "bytea": (r"'\xdead'::bytea", b"\xde\xad"),
    "enum": ("'sad'::web.mood", "sad"),
    "domain": ("7::web.small", 7),
    "smallints": ("'{1,2,NULL}'::smallint[]", [1, 2, None]),
    "bigints": ("'{5}'::bigint[]", [5]),
    "domain of ints": ("'{5}'::web.list", [5]),
    "numerics": ("'{1.50}'::numeric[]", ["1.50"]),
    "uuids": ("ARRAY[gen_random_uuid()] = '{}'", False),
    "moods": ("'{sad}'::web.mood[]", ["sad"]),
    "null time": ("NULL::timestamptz", None),
}


def test_types_arrive_usable(tmp_path: Path, server: str, address: str, settings: Settings) -> None:
    columns = ", ".join(f'{sql} AS "{name}"' for name, (sql, _) in TYPES.items())
    _execute(
        server,
        "CREATE TYPE web.mood AS ENUM ('sad')",
        "CREATE DOMAIN web.small AS smallint",
        "CREATE DOMAIN web.list AS integer[]",
        f"CREATE VIEW web.types AS SELECT {columns}",
    )
    (row,) = _read(address + "web.types", tmp_path, settings).to_pylist()
    assert row == {name: value for name, (_, value) in TYPES.items()}


def test_infinite_times_are_quarantined_as_no_times(
    server: str, address: str, storage: Storage, settings: Settings
) -> None:
    _create(server, "web.events")
    for time in ("infinity", "-infinity"):
        _execute(server, f"INSERT INTO web.events (who, what, at, born) VALUES (9, 'x', '{time}', '{time}')")  # fmt: skip # noqa: E501
    summary = load(address + "web.events", storage, settings, preset=PRESET)
    assert summary.reasons == {"occurred_at cannot be read as a time": 2}


def test_names_that_look_like_sql_are_only_names(
    tmp_path: Path, server: str, address: str, settings: Settings
) -> None:
    _execute(
        server,
        """CREATE TABLE web."a.b""; DROP TABLE x" ("it's ""odd"" $1" int, "At" timestamptz)""",
        """INSERT INTO web."a.b""; DROP TABLE x" VALUES (1, '2024-01-01 00:00+00')""",
    )
    path = address + "web.%22a.b%22%22; DROP TABLE x%22&arrived_at=At"
    assert _read(path, tmp_path, settings, date(2024, 1, 1)).num_rows == 1
    assert _read(path, tmp_path, settings).column_names == ['it\'s "odd" $1', "At"]


def test_rows_come_in_batches(
    tmp_path: Path,
    server: str,
    address: str,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _execute(server, "CREATE VIEW web.many AS SELECT g, repeat('x', 90) FROM generate_series(1, 20000) g")  # fmt: skip # noqa: E501
    monkeypatch.setattr(postgres_tables, "BATCH_BYTES", 100_000)
    told: list[str] = []
    path = address + "web.many"
    with fetched(path, None, tmp_path, settings, lambda *step: told.append(step[2])) as found:
        metadata = pq.ParquetFile(found.files[0]).metadata
    sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert len(sizes) >= 18  # about 100 bytes a row
    assert max(sizes) < 1_200
    assert sum(sizes) == 20_000
    assert len(told) == len(sizes)
    assert told[-1] == "fetched 20,000 rows"


def test_nothing_can_be_written(
    tmp_path: Path, server: str, address: str, settings: Settings
) -> None:
    _execute(
        server,
        "CREATE TABLE web.log (n int)",
        "CREATE FUNCTION web.note() RETURNS int LANGUAGE sql AS 'INSERT INTO web.log VALUES (1) RETURNING n'",  # noqa: E501
        "CREATE VIEW web.trap AS SELECT web.note()",
    )
    with pytest.raises(PipelineError, match="read-only transaction"):
        _read(address + "web.trap", tmp_path, settings)


def test_a_password_file_serves_as_well(
    tmp_path: Path, server: str, address: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    _create(server, "web.events")
    file = tmp_path / "passwords"
    file.write_text(f"127.0.0.1:*:*:{OWNER}:{PASSWORD}\n")
    file.chmod(0o600)
    monkeypatch.delenv("PGPASSWORD")
    monkeypatch.setenv("PGPASSFILE", str(file))
    assert _read(address + "web.events", tmp_path, settings).num_rows == len(EVENTS)


def test_a_missing_driver_is_explained(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "adbc_driver_postgresql", None)
    with pytest.raises(PipelineError, match="pip install adbc-driver-postgresql"):
        _read("postgresql://127.0.0.1/postgres?table=events", tmp_path, settings)


MISTAKES = {
    "table": ("web.evnts", r"no table or view 'web\.evnts'.*Did you mean 'web\.events'"),
    "schema": ("events", r"no table or view 'public\.events'"),
    "case": ("web.Events", r"Did you mean 'web\.events'"),
    "column": ("web.events&arrived_at=att", r"no column 'att'.*Did you mean 'at'"),
    "type": ("web.events&arrived_at=what", "'what'.*is of type text"),
    "denied": ("web.closed", "permission denied"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_wrong_name_is_explained(
    case: str,
    tmp_path: Path,
    server: str,
    address: str,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _create(server, "web.events")
    _execute(
        server,
        "CREATE TABLE web.closed (n int)",
        "DROP ROLE IF EXISTS reader",
        f"CREATE ROLE reader LOGIN PASSWORD '{PASSWORD}'",
        "GRANT USAGE ON SCHEMA web TO reader",
        "GRANT SELECT ON web.events TO reader",
    )
    monkeypatch.setenv("PGUSER", "reader")
    table, message = MISTAKES[case]
    try:
        with pytest.raises(PipelineError, match=f"(?s){message}") as caught:
            _read(address + table, tmp_path, settings, date(2024, 1, 1))
    finally:
        monkeypatch.setenv("PGUSER", OWNER)
        _execute(server, "DROP OWNED BY reader", "DROP ROLE reader")
    assert PASSWORD not in str(caught.value)


@pytest.mark.parametrize(
    ("database", "variables", "message"),
    [
        (
            "postgres",
            {"PGPASSWORD": "wrong word"},
            'password authentication failed for user "owner"',
        ),
        ("postgres", {"PGPASSWORD": ""}, "no password supplied"),
        ("postgres", {"PGSERVICE": "nowhere"}, 'definition of service "nowhere" not found'),
        ("nowhere", {}, 'database "nowhere" does not exist'),
        (None, {}, "Connection refused"),
    ],
)
def test_a_server_that_refuses_is_explained(
    database: str | None,
    variables: dict[str, str],
    message: str,
    tmp_path: Path,
    server: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    place = f"{server}/{database}" if database else f"127.0.0.1:{free_port()}/postgres"
    options = ["--path", f"postgresql://{place}?table=web.events", "--data-root", "data"]
    result = CliRunner().invoke(app, ["run", "--source", "oss_commits", *options])
    joined = " ".join(result.output.split())
    assert (result.exit_code, message in joined, "PGPASSWORD" in joined) == (2, True, True), joined
    assert "Traceback" not in joined
    assert "wrong word" not in joined
