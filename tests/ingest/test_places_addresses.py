from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from behavior_pipeline.cli import app
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.ingest.places.addresses import (
    TableName,
    parse_table,
    place_of,
    without_secrets,
)
from behavior_pipeline.ingest.places.fetch import check_path, is_taken_whole


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("events/*.csv", "files"),
        ("a::b.csv", "files"),
        ("/data/shop.duckdb::events", "duckdb"),
        ("/data/{date}.DB::web.events", "duckdb"),
        ("shop.duckdb", "duckdb"),
        ("s3://bucket/a.duckdb::events", "s3"),
        ("postgresql://[::1]:5432/shop?table=t", "postgres"),
        ("postgres:///shop?table=t", "postgres"),
    ],
)
def test_a_path_names_its_place(path: str, place: str) -> None:
    assert place_of(path) == place


def test_a_folder_may_be_called_like_a_database(tmp_path: Path) -> None:
    (tmp_path / "shop.db").mkdir()
    assert place_of(str(tmp_path / "shop.db")) == "files"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("events", TableName("main", "events")),
        ("web.events", TableName("web", "events")),
        ('"a.b"."c""d"', TableName("a.b", 'c"d')),
        ("a.b.c", None),
        ("", None),
        ("web.", None),
    ],
)
def test_tables_are_named_as_in_sql(text: str, name: TableName | None) -> None:
    assert parse_table(text, "main") == name


@pytest.mark.parametrize(
    ("path", "is_whole"),
    [
        ("/landing/{date}/*.csv", True),
        ("s3://bucket/{date}/*.csv", True),
        ("shop.duckdb::events", False),
        ("{date}.duckdb::events", True),
        ("postgresql://host/shop?table=t&arrived_at=at", True),
        ("postgresql://host/shop?table=t", False),
    ],
)
def test_a_night_takes_whole_what_the_path_tells_apart(path: str, is_whole: bool) -> None:
    assert is_taken_whole(path) is is_whole


@pytest.mark.parametrize(
    "path",
    [
        "postgresql://me:hunter2@host/shop?table=t",
        "postgresql://hunter2@host/shop?table=t",
        "postgresql://me:hun/ter2@host/shop?table=t",
        "postgresql://me:hun?ter2@host/shop",
        "postgresql://me:hunter2/shop?table=t",
        "postgresql://host/shop?table=t&password=hunter2",
        "postgresql://host/shop?table=t&sslpassword=hunter2",
        "postgresql://host/shop?table=t&hunter2",
        "postgresql://host/shop?table=t&table=hunter2",
        "postgresql+psycopg://me:hunter2@host/shop",
        "s3://key:hunter2@bucket/events",
        "s3://key:hun/ter2@bucket/events",
        "s3://bucket/events?access_key=a&secret_key=hunter2",
        "s3://bucket/a.csv?X-Amz-Signature=hunter2",
        "https://me:hunter2@host/a.csv",
    ],
)
def test_credentials_in_a_path_are_refused_unseen(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PipelineError) as caught:
        check_path(path)
    assert caught.value.way_out
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["run", "--source", "oss_commits", "--path", path])
    assert result.exit_code == 2
    for shown in (str(caught.value), result.output):
        assert "ter2" not in shown
    assert not list(tmp_path.iterdir())  # nor in any record


@pytest.mark.parametrize(
    "path",
    [
        "postgresql://host/shop",
        "postgresql://host/shop?table=",
        "postgresql://host/shop?table=t&arrived_at=",
        "postgresql://host/shop?table=events_{date}",
        "shop.duckdb",
        "shop.duckdb::",
        "s3://",
        "s3:///events",
        "gs://bucket/events",
    ],
)
def test_a_path_that_says_too_little_is_refused(path: str) -> None:
    with pytest.raises(PipelineError) as caught:
        check_path(path)
    assert caught.value.way_out


def test_what_a_server_repeats_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    assert without_secrets("key hunter2 is wrong") == "key *** is wrong"
