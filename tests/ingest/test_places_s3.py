from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from ingest_builders import (
    ROWS,
    Row,
    events,
    load,
    quarantine,
    said,
    write_rows,
)
from place_builders import EVENTS, PRESET, free_port, write_events
from pyarrow import fs
from typer.testing import CliRunner

from behavior_pipeline.cli import app
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.ingest.places import s3_objects
from behavior_pipeline.ingest.places.fetch import fetched
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage

moto_server = pytest.importorskip("moto.server", reason="not installed: pip install 'moto[server]'")

SECRET = "secret-of-the-tests"  # noqa: S105 - the server takes any
BUCKET = "landing"
Put = Callable[[str, bytes], None]


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def put(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Put:
    """An empty bucket in an environment that reaches it; puts an object there."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "tests")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    store = fs.S3FileSystem(
        endpoint_override=endpoint, region="eu-west-1", allow_bucket_creation=True
    )
    store.create_dir(BUCKET)
    store.delete_dir_contents(BUCKET)

    def put_object(key: str, content: bytes) -> None:
        with store.open_output_stream(f"{BUCKET}/{key}", compression=None) as target:
            target.write(content)

    return put_object


def _put_rows(put: Put, key: str, rows: list[Row], folder: Path) -> None:
    put(key, write_rows(folder / Path(key).name, rows).read_bytes())


@pytest.mark.parametrize("path", ["a.parquet", "in", "in/", "in/*.parquet", "**/x.parquet", ""])
def test_the_same_events_as_from_parquet(
    path: str, tmp_path: Path, put: Put, storage: Storage, settings: Settings
) -> None:
    file = write_events(tmp_path / "a.parquet")
    load(file, storage, settings, preset=PRESET)
    put("a.parquet" if path == "a.parquet" else "in/x.parquet", file.read_bytes())
    home = Storage(tmp_path / "home")
    summary = load(f"s3://{BUCKET}/{path}", home, settings, preset=PRESET)
    assert summary.num_inserted == len(EVENTS)
    assert said(events(home)) == said(events(storage))


@pytest.mark.parametrize("kind", ["csv", "csv.gz", "jsonl", "jsonl.gz", "parquet"])
def test_every_kind_is_read_and_quarantine_names_the_object(
    kind: str, tmp_path: Path, put: Put, storage: Storage, settings: Settings
) -> None:
    bad = ("1", "view", "never", "a", "1")
    for name in ("x", "y"):
        _put_rows(put, f"in/{name} 1.{kind}", [*ROWS, bad, ROWS[0]], tmp_path)
    load(write_rows(tmp_path / "a.csv", ROWS * 2 + [ROWS[0]] * 2), storage, settings)
    home = Storage(tmp_path / "home")
    load(f"s3://{BUCKET}/in/*.{kind}", home, settings)
    assert said(events(home)) == said(events(storage))
    assert [(row["source_file"], row["row_number"]) for row in quarantine(home)] == [
        (f"s3://{BUCKET}/in/{name} 1.{kind}", len(ROWS) + 1) for name in ("x", "y")
    ]
    assert not list((home.home / "scratch").rglob("*.aside"))  # no copy stays


def test_malformed_lines_name_the_object(put: Put, storage: Storage, settings: Settings) -> None:
    put("a.csv", b"who,what,at,sku,price\n1,view,2024-01-01,a,1\n2,view\n1,buy,2024-01-01,a,1\n")
    load(f"s3://{BUCKET}/a.csv", storage, settings)
    assert [(row["source_file"], row["row_number"]) for row in quarantine(storage)] == [
        (f"s3://{BUCKET}/a.csv", 2)
    ]


def test_a_night_takes_the_objects_of_its_day_whole(
    tmp_path: Path, put: Put, storage: Storage, settings: Settings
) -> None:
    for day in ("2024-03-01", "2024-03-02"):
        user = day[-1]
        _put_rows(put, f"in/{day}/x.csv", [(user, *row[1:]) for row in ROWS], tmp_path)
    path = f"s3://{BUCKET}/in/{{date}}/*.csv"
    load(path, storage, settings, arrival="2024-03-02", day=date(2024, 3, 2))
    assert {row["user_id"] for row in events(storage)} == {"2"}
    assert len(events(storage)) == len(ROWS)  # all occurred on other days
    load(path.replace("{date}", "*"), storage, settings)  # as defs/ingest.py does
    assert {row["user_id"] for row in events(storage)} == {"1", "2"}
    with pytest.raises(PipelineError, match=rf"s3://{BUCKET}/in/2024-03-03/\*\.csv"):
        load(path, storage, settings, arrival="2024-03-03", day=date(2024, 3, 3))


@pytest.mark.parametrize(
    ("key", "glob", "is_match"),
    [
        ("in/a.csv", "in", True),
        ("in/b/a.csv", "in", True),
        ("in/_tmp/a.csv", "in", False),
        ("in/.a.csv", "in", False),
        ("in/_a.csv", "in/_a.csv", True),
        ("in/_a.csv", "in/*.csv", False),
        ("in/b/a.csv", "in/*.csv", False),
        ("in/b/a.csv", "in/*", True),
        ("in/b/c/a.csv", "in/**/*.csv", True),
        ("in/a.csv", "in/**/*.csv", True),
        ("in/_tmp/a.csv", "in/**/*.csv", False),
        ("in/day=1/a.csv", "in/day=[12]/?.csv", True),
        ("in/day=3/a.csv", "in/day=[12]/?.csv", False),
        ("inner/a.csv", "in", False),
        ("a.csv", "", True),
    ],
)
def test_globs_are_those_of_local_files(key: str, glob: str, is_match: bool) -> None:
    patterns = glob.split("/") if glob else []
    assert s3_objects._matches(key.split("/"), patterns) is is_match


def test_a_name_that_looks_like_a_glob_is_found(
    tmp_path: Path, put: Put, storage: Storage, settings: Settings
) -> None:
    _put_rows(put, "it's [1].csv", ROWS, tmp_path)
    assert load(f"s3://{BUCKET}/it's [1].csv", storage, settings).num_accepted == len(ROWS)


def test_keys_lead_out_of_no_folder(tmp_path: Path, put: Put, settings: Settings) -> None:
    write_rows(tmp_path / "x.csv", ROWS)
    put("in/x%2F..%2F..%2Fy.csv", (tmp_path / "x.csv").read_bytes())
    put("in/a b/é.csv", (tmp_path / "x.csv").read_bytes())
    work = tmp_path / "work"
    work.mkdir()
    with fetched(f"s3://{BUCKET}/in", None, work, settings) as found:
        assert {Path(file).parent for file in found.files} == {work / "fetched"}
        assert sorted(found.names.values()) == [
            f"s3://{BUCKET}/in/a b/é.csv",
            f"s3://{BUCKET}/in/x%2F..%2F..%2Fy.csv",
        ]


class _Object(io.BytesIO):
    """A stream that remembers how much was asked of it at a time."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.asked: list[int | None] = []

    def read(self, size: int | None = -1, /) -> bytes:
        self.asked.append(size)
        return super().read(size)


class _Store:
    """As much of a file system as copying needs."""

    def __init__(self, content: bytes) -> None:
        self.opened = _Object(content)

    def open_input_stream(self, path: str, compression: Any) -> _Object:
        assert (path, compression) == ("bucket/a.csv", None)
        return self.opened


def test_objects_come_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_objects, "_CHUNK_BYTES", 10)
    store = _Store(b"x" * 95)
    s3_objects._copy(store, "s3://bucket/a.csv", tmp_path / "copy", 95)
    assert store.opened.asked == [10] * 11
    assert (tmp_path / "copy").read_bytes() == b"x" * 95


def test_an_object_that_changes_meanwhile_is_named(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"'s3://bucket/a\.csv' changed"):
        s3_objects._copy(_Store(b"x" * 9), "s3://bucket/a.csv", tmp_path / "copy", 95)


MISTAKES = {
    "no bucket": ("s3://no-such-bucket/in", "does not exist (NO_SUCH_BUCKET)"),
    "no bucket, glob": ("s3://no-such-bucket/*.csv", "does not exist (NO_SUCH_BUCKET)"),
    "no object": (f"s3://{BUCKET}/none.csv", "no object, folder or match"),
    "no match": (f"s3://{BUCKET}/in/*.csv", "no object, folder or match"),
    "no kind": (f"s3://{BUCKET}/a.xlsx", f"'s3://{BUCKET}/a.xlsx' is not of a supported kind"),
    "mixed": (f"s3://{BUCKET}/mixed", f"csv (such as s3://{BUCKET}/mixed/a.csv)"),
    "corrupt": (f"s3://{BUCKET}/b.parquet", f"'s3://{BUCKET}/b.parquet' cannot be read"),
    "truncated": (f"s3://{BUCKET}/c.csv.gz", f"'s3://{BUCKET}/c.csv.gz' cannot be read"),
    "empty": (f"s3://{BUCKET}/d.csv", f"'s3://{BUCKET}/d.csv' is empty"),
    "no column": (f"s3://{BUCKET}/e.csv", f"'s3://{BUCKET}/e.csv' has no column"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_explained_and_names_the_address(
    case: str, tmp_path: Path, put: Put, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("a.xlsx", "mixed/a.csv", "mixed/b.jsonl"):
        put(key, b"a\n1\n")
    put("b.parquet", b"PAR1" * 9)
    put("c.csv.gz", b"\x1f\x8b\x08broken")
    put("d.csv", b"")
    put("e.csv", b"a,b\n1,2\n")
    path, message = MISTAKES[case]
    _assert_explained(path, message, tmp_path, monkeypatch)


def test_no_server_is_explained(tmp_path: Path, put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    assert put
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{free_port()}")  # it wins
    _assert_explained(f"s3://{BUCKET}/in", "NETWORK_CONNECTION", tmp_path, monkeypatch)


def test_wrong_credentials_are_explained(
    tmp_path: Path, put: Put, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert put

    def check_credentials(after: str) -> None:
        place = f"{endpoint}/moto-api/reset-auth"
        request = Request(place, after.encode(), {"Content-Type": "text/plain"}, method="POST")  # noqa: S310
        urlopen(request).close()  # noqa: S310 - the tests' own server

    check_credentials("0")
    try:
        _assert_explained(f"s3://{BUCKET}/in", "credentials", tmp_path, monkeypatch)
    finally:
        check_credentials("inf")


def _assert_explained(
    path: str, message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    result = CliRunner().invoke(
        app, ["run", "--source", "oss_commits", "--path", path, "--data-root", "data"]
    )
    joined = " ".join(result.output.split())
    assert result.exit_code == 2, joined
    assert message in joined
    assert [word for word in ("Traceback", SECRET, ".aside", str(folder)) if word in joined] == []
