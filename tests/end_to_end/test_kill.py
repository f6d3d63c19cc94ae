"""`kill -9` at random moments, then the same run again: nothing is lost, nothing is different.

`BEHAVIOR_KILLS` says how often; the suite kills a few times, `make test-long` ten.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import duckdb
import pytest

from .conftest import FinishedRun, Installation, new_installation

NUM_KILLS = int(os.environ.get("BEHAVIOR_KILLS", "2"))
END = "2026-05-01"  # the simulation's last event lies on the evening before
COMPARISON = Path("simulated") / "reports" / "2026-03-31" / "comparison.json"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_killed_job_run_again_says_what_an_undisturbed_one_says(tmp_path: Path) -> None:
    undisturbed = new_installation(tmp_path / "undisturbed")
    started = time.monotonic()
    done = undisturbed.run("run")
    seconds = time.monotonic() - started
    assert done.returncode == 0, done.stdout + done.stderr

    killed = new_installation(tmp_path / "killed")
    chance = random.Random(20260101)  # noqa: S311 - moments, not secrets
    moments = [chance.uniform(0.1, 0.95) * seconds for _ in range(NUM_KILLS)]
    for moment in moments:
        kill(killed, moment, "run")
    again = killed.run("run")

    assert again.returncode == 0, again.stdout + again.stderr
    assert (killed.root / COMPARISON).read_bytes() == (undisturbed.root / COMPARISON).read_bytes()
    assert not list(killed.storage.home.rglob("*.aside"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_killed_night_run_again_says_what_an_undisturbed_one_says(
    finished: FinishedRun, tmp_path: Path
) -> None:
    undisturbed, killed = (new_installation(tmp_path / name) for name in ("undisturbed", "killed"))
    for installation in (undisturbed, killed):
        shutil.copytree(finished.storage.home, installation.storage.home)
    night = ("nightly", "--cutoff", END)
    started = time.monotonic()
    done = undisturbed.run(*night)
    seconds = time.monotonic() - started
    assert done.returncode == 0, done.stdout + done.stderr

    chance = random.Random(20260102)  # noqa: S311 - moments, not secrets
    moments = [chance.uniform(0.1, 0.95) * seconds for _ in range(max(1, NUM_KILLS // 2))]
    for moment in moments:
        kill(killed, moment, *night)
    again = killed.run(*night)

    assert again.returncode == 0, again.stdout + again.stderr
    report = Path("simulated") / "reports" / END / "comparison.json"
    assert (killed.root / report).read_bytes() == (undisturbed.root / report).read_bytes()
    assert tables_of(killed) == tables_of(undisturbed)
    assert not list(killed.storage.home.rglob("*.aside"))


def tables_of(installation: Installation) -> dict[str, list[tuple[Any, ...]]]:
    """Return the rows of everything that analysts read, but for when it was written."""
    with duckdb.connect(str(installation.storage.analytics), read_only=True) as connection:
        names = [
            name for (name,) in connection.execute("SELECT name FROM (SHOW TABLES)").fetchall()
        ]
        columns = "COLUMNS(name -> name <> 'written_at' AND name <> 'ingested_at')::VARCHAR"
        return {
            name: connection.execute(f"SELECT {columns} FROM {name} ORDER BY ALL").fetchall()
            for name in names
        }


def kill(installation: Installation, seconds: float, *arguments: str) -> None:
    """Start the job and kill it after some seconds; if it was over by then, at half of them.

    Machines that others work on too are not evenly fast.
    """
    while not kill_after(installation, seconds, *arguments):
        seconds /= 2


def kill_after(installation: Installation, seconds: float, *arguments: str) -> bool:
    """Start the job, kill it and all its children; tell whether it was still at work."""
    process = subprocess.Popen(
        installation.command(*arguments),
        env=installation.environment,
        cwd=installation.root,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True
    return False
