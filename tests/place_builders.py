"""Events of a shop for every place where they may lie, and servers of this machine to hold them."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from behavior_pipeline.ingest.presets import parse_preset

OWNER = "owner"
PASSWORD = "pass-word of the tests"  # noqa: S105 - of a server that lives as long as a test

PRESET = parse_preset(
    """
name: shop
description: A shop of the tests.
columns:
  user_id: who
  event_type: what
  occurred_at: {column: at, latest: 2030-01-01}
  item_id: sku
  category: is_new
  location: born
  context: key
  amount: price
  codes: codes
tasks: {propensity_column: event_type, horizon_days: 3, lookback_days: 7}
""",
    "shop",
)
SCHEMA = pa.schema(
    [
        ("who", pa.int64()),
        ("what", pa.string()),
        ("at", pa.timestamp("us", tz="UTC")),
        ("sku", pa.string()),
        ("price", pa.decimal128(10, 2)),
        ("codes", pa.list_(pa.int32())),
        ("is_new", pa.bool_()),
        ("born", pa.date32()),
        ("weight", pa.float64()),
        ("key", pa.string()),
    ]
)
KEY = "0f5ae9b6-0f0e-4c39-b1e5-0a1f2d0c9a11"


def at(day: int, hour: int = 0, microsecond: int = 0) -> datetime:
    """A time of January 2024."""
    return datetime(2024, 1, day, hour, microsecond=microsecond, tzinfo=UTC)


Event = tuple[Any, ...]
BORN = date(1990, 5, 4)
EVENTS: list[Event] = [
    (1, "view", at(1, 10), "a", Decimal("1.50"), [3, 14], True, BORN, 0.1, KEY),
    (1, "view", at(1, 10), "a", Decimal("1.50"), [3, 14], True, BORN, 0.1, KEY),
    (1, "buy", at(1, 11, 1), 'b, "big"', Decimal("2.00"), [], False, None, 1e300, None),
    (2, "view", at(2), "it's", None, None, None, None, None, None),
    (3, "buy", at(3, 23, 999_999), None, Decimal("-3.00"), [-1], None, BORN, 2.0, KEY),
]
BAD: Event = (None, "view", at(2, 5), "a", None, None, None, None, None, None)


def typed_table(rows: Sequence[Event]) -> pa.Table:
    """Rows as an Arrow table."""
    columns = list(zip(*rows, strict=True)) if rows else [[] for _ in SCHEMA]
    arrays = [pa.array(list(c), f.type) for c, f in zip(columns, SCHEMA, strict=True)]
    return pa.table(arrays, schema=SCHEMA)


def write_events(file: Path, rows: Sequence[Event] = EVENTS) -> Path:
    """Write rows to a Parquet file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(typed_table(rows), file)
    return file


def postgres_programs() -> Path | None:
    """The folder of initdb and pg_ctl, if PostgreSQL's server is installed."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    found = str(debian[-1]) if debian else shutil.which("initdb")
    return Path(found).resolve().parent if found else None


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def postgres_server() -> Iterator[str]:
    """Yield `127.0.0.1:port` of a new server that asks OWNER for PASSWORD; its zone is not UTC."""
    programs = postgres_programs()
    assert programs is not None
    folder = Path(tempfile.mkdtemp(prefix="pg"))  # short: it holds the socket
    port = free_port()
    (folder / "password").write_text(PASSWORD)
    if os.geteuid() == 0:
        user = pwd.getpwnam("postgres")
        for path in (folder, folder / "password"):
            os.chown(path, user.pw_uid, user.pw_gid)
    options = f"-p {port} -k {folder} -h 127.0.0.1 -c fsync=off -c timezone=Asia/Tokyo"
    control = [str(programs / "pg_ctl"), "-D", str(folder / "data"), "-w"]
    initdb = [str(programs / "initdb"), "-D", str(folder / "data"), "-U", OWNER, "-E", "UTF8"]
    login = ["--auth=scram-sha-256", f"--pwfile={folder / 'password'}"]
    _as_server([*initdb, *login, "--no-sync"], folder)
    try:
        _as_server([*control, "-l", str(folder / "log"), "-o", options, "start"], folder)
        yield f"127.0.0.1:{port}"
    finally:
        _as_server([*control, "-m", "immediate", "stop"], folder)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def redis_server() -> Iterator[str]:
    """Yield `127.0.0.1:port` of a new server that asks for PASSWORD, and keeps nothing on disk."""
    folder, port = Path(tempfile.mkdtemp(prefix="redis")), free_port()
    settings = folder / "redis.conf"
    settings.write_text(f'bind 127.0.0.1\nport {port}\nsave ""\nrequirepass "{PASSWORD}"\n')
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(["redis-server", settings], cwd=folder, stdout=log)
    try:
        _wait_for(port, server)
        yield f"127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    """Wait until a server lets somebody in, for half a minute at the most."""
    for _ in range(300):
        assert server.poll() is None, "the server ended"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    pytest.fail(f"nothing listens on port {port}")


def _as_server(command: list[str], folder: Path) -> None:
    """Run a program of the server; it refuses to be root's."""
    user = "postgres" if os.geteuid() == 0 else None
    done = subprocess.run(
        command,
        cwd=folder,
        user=user,
        group=user,
        extra_groups=[] if user else None,
        check=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"},
    )
    assert done.returncode == 0, done.stderr
