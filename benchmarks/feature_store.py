"""Publishing a million users beside stock Feast's `materialize`, and reading them back.

Both write what lies in the history into the online store, stock Feast of fewer users: more are
beyond what it is kind to. A whole publication, which is all that a night does for a view, checks
and history too, is told beside it. Each is a process of its own, so that its peak memory is its
own.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager, redirect_stdout
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import psycopg
import pyarrow.parquet as pq
from feature_store_data import CUTOFF, write_embeddings
from figures import figure, measured, publish
from synthetic_nights import NIGHT, seconds_of, write_night

from behavior_pipeline.feature_store.ledger import served_before
from behavior_pipeline.feature_store.online import write_online
from behavior_pipeline.feature_store.partition import OFFLINE_FILE, read_batches
from behavior_pipeline.feature_store.publish import ONLINE_BATCH_ROWS, publish_view
from behavior_pipeline.feature_store.repository import offline_folder, open_store, view_of
from behavior_pipeline.feature_store.versions import FIRST
from behavior_pipeline.storage import Storage, cutoff_folder

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "examples")]

from place_builders import (  # noqa: E402 - found by the line above
    OWNER,
    PASSWORD,
    free_port,
    postgres_server,
    redis_server,
)
from read_features import read_features  # noqa: E402 - as above

VIEW = "user_embedding"
FEATURES = [f"{VIEW}:embedding", f"{VIEW}:checkpoint_id", f"{VIEW}:cutoff_at"]
PEER = "Feast 0.67 materialize"
SERVER_WIDTH = 256
TOUCHED = 0.01  # users of a night
NIGHTS = 8  # until all that a night leaves to a later one has been done
MAX_MOVE = 0.05  # of a vector before it is published anew
Line = dict[str, object]
Publication = tuple[float, float]
"""Users a second, and peak memory of the process in GB."""


def main() -> None:
    """Measure what was asked for and print it."""
    options = _options()
    lines: list[Line] = []
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="bench") as name:
        folder, peaks = Path(name), list[float]()
        for width in options.widths:
            lines += _sqlite(folder, options, width, peaks)
        lines.append(measured("publish_peak_gb", max(peaks), "GB", num_users=options.users))
        lines += _nights(folder, options) + _servers(folder, options)
    publish("feature_store", lines, is_kept=options.is_full)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--stock-users", type=int, default=20_000)
    parser.add_argument("--server-users", type=int, default=100_000)
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 768])
    parser.add_argument("--folder", help="where to write; 25 GB for a million users")
    options = parser.parse_args()
    options.is_full = options.users >= 1_000_000 and options.widths == [256, 768]  # noqa: PLR2004
    options.server_users = min(options.users, options.server_users)
    options.stock_users = min(options.users, options.stock_users)
    return options


def _sqlite(
    folder: Path, options: argparse.Namespace, width: int, peaks: list[float]
) -> list[Line]:
    """Publish to SQLite at a width; at the last one, read what is there."""
    ours, theirs = Storage(folder / f"ours_{width}"), Storage(folder / f"theirs_{width}")
    write_embeddings(ours, options.users, width)
    whole, peak = _alone(_publish, ours, options.users)
    stock, _ = _alone(_materialize, ours, options.stock_users, theirs)
    copied = Storage(folder / f"copied_{width}")
    speed, peak_online = _alone(_write_online, ours, options.users, copied)
    shutil.rmtree(copied.home)
    peaks += [peak, peak_online]
    name = f"publish_over_stock_{width}"
    more = {"peak_gb": round(max(peak, peak_online), 2), "whole_publication": round(whole)}
    lines = [figure(name, [speed], PEER, [stock], "users/s") | more]
    shutil.rmtree(ours.embeddings(CUTOFF))
    shutil.rmtree(offline_folder(ours, VIEW))
    if width == options.widths[-1]:
        lines += _reads(ours, theirs, options) + _http(ours, options.users)
    shutil.rmtree(ours.home)
    return lines


def _nights(folder: Path, options: argparse.Namespace) -> list[Line]:
    """Publish a night in full, and next ones that touch one user in a hundred, each time others.

    A service has the store open meanwhile. The nights go round once: what the first ones leave in
    SQLite's write-ahead file is moved in one of the later ones, and their mean holds it all.
    """
    storage, width = Storage(folder / "nights"), min(options.widths)
    with redirect_stdout(sys.stderr):
        store = open_store(storage)
        write_night(storage, NIGHT, options.users, width)
        full = seconds_of(storage, NIGHT)
        with closing(sqlite3.connect(store.config.online_store.path)) as service:
            service.execute("SELECT 1 FROM sqlite_master").fetchall()
            seconds = [_night(storage, at, options.users, width) for at in range(1, 1 + NIGHTS)]
    shutil.rmtree(storage.home)
    more = {"num_users": options.users, "width": width, "touched": TOUCHED, "full_s": full}
    share = float(np.mean(seconds)) / full
    more |= {"nights_s": [round(night, 2) for night in seconds]}
    return [measured("nightly_publish_over_full", share, "of a full publish", **more)]


def _night(storage: Storage, number: int, num_users: int, width: int) -> float:
    cutoff = NIGHT + timedelta(days=number)
    served = served_before(storage, cutoff, MAX_MOVE)
    write_night(storage, cutoff, num_users, width, TOUCHED, served, number)
    shutil.rmtree(storage.embeddings(cutoff - timedelta(days=1)))
    os.sync()
    return seconds_of(storage, cutoff)


def _alone(
    work: Callable[..., float], storage: Storage, num_users: int, *more: object
) -> Publication:
    """Do some work in a process of its own; return users a second and its peak memory."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        seconds, peak = pool.submit(_observed, work, storage, num_users, *more).result()
    print(
        f"{work.__name__}: {num_users:,} users in {seconds:.1f} s, {peak:.2f} GB", file=sys.stderr
    )
    return num_users / seconds, peak


def _observed(
    work: Callable[..., float], storage: Storage, num_users: int, *more: object
) -> tuple[float, float]:
    seconds = work(storage, num_users, *more)
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # given in kB


def _publish(storage: Storage, num_users: int) -> float:
    """Publish as a night does; return the seconds."""
    open_store(storage)
    started = time.perf_counter()
    summary = publish_view(storage, VIEW, CUTOFF)
    assert summary.num_rows == num_users + 1  # noqa: S101 - the cold-start row is one more
    return time.perf_counter() - started


def _write_online(ours: Storage, num_users: int, target: Storage) -> float:
    """Write all of our history into an online store that is empty; return the seconds."""
    path = offline_folder(ours, VIEW).joinpath(cutoff_folder(CUTOFF), OFFLINE_FILE)
    store = open_store(target)
    started = time.perf_counter()
    batches = read_batches(path, ONLINE_BATCH_ROWS)
    num_written = write_online(store, view_of(store, VIEW, FIRST), batches, num_users)
    assert num_written == num_users + 1  # noqa: S101 - the cold-start row is one more
    return time.perf_counter() - started


def _materialize(ours: Storage, num_users: int, theirs: Storage) -> float:
    """Let stock Feast write the first users of our history online; return the seconds."""
    file = cutoff_folder(CUTOFF), OFFLINE_FILE
    store, target = open_store(theirs), offline_folder(theirs, VIEW).joinpath(*file)
    target.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetFile(offline_folder(ours, VIEW).joinpath(*file)) as source:
        rows = next(source.iter_batches(num_users))
        with pq.ParquetWriter(target, rows.schema) as out:
            out.write_batch(rows)
    started = time.perf_counter()
    day = timedelta(days=1)
    store.materialize(CUTOFF - day, CUTOFF + day, feature_views=[VIEW])
    return time.perf_counter() - started


def _reads(ours: Storage, theirs: Storage, options: argparse.Namespace) -> list[Line]:
    """Read random users of our store, and of the one that stock Feast wrote, in turns."""
    os.sync()  # what was published just now is on its way to the disk, and would be measured too
    stores = (open_store(ours), options.users), (open_store(theirs), options.stock_users)
    lines = []
    for num_read, repeats in ((1, 2_000), (100, 1_000)):
        times: list[list[float]] = [[], []]
        for repeat in range(repeats):
            for place, (store, num_users) in enumerate(stores):
                users = _random_users(num_read, num_users, repeat)
                rows = [{"user_id": user} for user in users]
                times[place].append(_milliseconds(lambda: _read(store, rows)))  # noqa: B023 - now
        quantiles = [np.percentile(found, 99) for found in times]
        line = figure(f"read_{num_read}_p99_ms", quantiles[:1], PEER, quantiles[1:], "ms")
        lines.append(line | {"p50_ms": round(float(np.percentile(times[0], 50)), 3)})
    return lines


def _read(store: Any, rows: list[dict[str, str]]) -> None:
    """Read users' vectors as Python values."""
    found = store.get_online_features(features=FEATURES, entity_rows=rows).to_dict()
    assert found["embedding"][0] is not None  # noqa: S101 - everybody is there


def _http(storage: Storage, num_users: int) -> list[Line]:
    """Read random users through Feast's own server."""
    lines = []
    with _served(storage) as url:
        for num_read, repeats in ((1, 1_000), (100, 100)):
            asked = [_random_users(num_read, num_users, repeat) for repeat in range(repeats)]
            times = [_milliseconds(lambda: read_features(u, "churn_model", url)) for u in asked]  # noqa: B023 - now
            more = {"p50_ms": round(float(np.percentile(times, 50)), 3)}
            value = float(np.percentile(times, 99))
            lines.append(measured(f"http_{num_read}_p99_ms", value, "ms", **more))
    return lines


@contextmanager
def _served(storage: Storage) -> Iterator[str]:
    """Yield the address of a feature server of a home."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    program = "from behavior_pipeline.feature_store.serving import serve_features as serve; "
    program += "from behavior_pipeline.storage import Storage; from pathlib import Path; "
    program += f"serve(Storage(Path({str(storage.home)!r})), '127.0.0.1', {port})"
    server = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
    try:
        while not _answers(url):
            assert server.poll() is None  # noqa: S101 - it has ended
            time.sleep(0.2)
        yield url
    finally:
        server.terminate()
        server.wait()


def _answers(url: str) -> bool:
    try:
        with urlopen(f"{url}/health", timeout=5):  # noqa: S310 - our own
            return True
    except URLError:
        return False


def _servers(folder: Path, options: argparse.Namespace) -> list[Line]:
    """Publish to servers of this machine."""
    lines = []
    for kind, prepare in (("redis", _redis), ("postgres", _postgres)):
        ours, theirs = Storage(folder / f"ours_{kind}"), Storage(folder / f"theirs_{kind}")
        write_embeddings(ours, options.server_users, SERVER_WIDTH)
        os.environ["BEHAVIOR_ONLINE_STORE"] = kind
        with prepare() as use:
            use(0)
            speed, _ = _alone(_publish, ours, options.server_users)
            use(1)
            stock, _ = _alone(_materialize, ours, options.stock_users, theirs)
        lines.append(figure(f"{kind}_over_stock", [speed], PEER, [stock], "users/s"))
        del os.environ["BEHAVIOR_ONLINE_STORE"]
    return lines


@contextmanager
def _redis() -> Iterator[Callable[[int], None]]:
    """Yield what makes a database of a new Redis the one in use."""
    with redis_server() as address:

        def use(number: int) -> None:
            os.environ["BEHAVIOR_REDIS"] = f"{address},db={number},password={PASSWORD}"

        yield use


@contextmanager
def _postgres() -> Iterator[Callable[[int], None]]:
    """Yield what makes a database of a new PostgreSQL the one in use."""
    with postgres_server() as address:
        host, port = address.split(":")
        values = {"HOST": host, "PORT": port, "USER": OWNER, "PASSWORD": PASSWORD}
        os.environ |= {f"BEHAVIOR_POSTGRES_{name}": value for name, value in values.items()}
        os.environ["BEHAVIOR_POSTGRES_SSLMODE"] = "disable"

        def use(number: int) -> None:
            login = {"user": OWNER, "password": PASSWORD, "dbname": "postgres"}
            with psycopg.connect(host=host, port=int(port), autocommit=True, **login) as server:
                server.execute(f"CREATE DATABASE number_{int(number)}")  # type: ignore[arg-type]
            os.environ["BEHAVIOR_POSTGRES_DATABASE"] = f"number_{number}"

        yield use


def _random_users(num_read: int, num_users: int, seed: int) -> Sequence[str]:
    numbers = np.random.default_rng(seed).integers(0, num_users, num_read)
    return [f"{number:09d}" for number in numbers]


def _milliseconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return 1_000 * (time.perf_counter() - started)


if __name__ == "__main__":
    main()
