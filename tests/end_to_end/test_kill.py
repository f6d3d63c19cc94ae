"""`kill -9` at random moments, then the same run again: nothing is lost, nothing is different.

`BEHAVIOR_KILLS` says how often; the suite kills a few times, `make test-long` ten.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from .conftest import Installation, new_installation

NUM_KILLS = int(os.environ.get("BEHAVIOR_KILLS", "2"))
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
    num_killed = sum(kill_after(killed, moment) for moment in moments)
    again = killed.run("run")

    assert again.returncode == 0, again.stdout + again.stderr
    assert num_killed >= 1
    assert (killed.root / COMPARISON).read_bytes() == (undisturbed.root / COMPARISON).read_bytes()
    assert not list(killed.storage.home.rglob("*.aside"))


def kill_after(installation: Installation, seconds: float) -> bool:
    """Start the job, kill it and all its children; tell whether it was still at work."""
    process = subprocess.Popen(
        installation.command("run"),
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
