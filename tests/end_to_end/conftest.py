"""One small run of the whole job, through the command line and Dagster, that many tests read."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from behavior_pipeline.storage import Storage, read_json
from behavior_pipeline.windows import parse_cutoff

START_SECONDS = 120
SMALL = {
    "BEHAVIOR_SIMULATED_USERS": "300",
    "BEHAVIOR_SIMULATED_DAYS": "120",
    "BEHAVIOR_ENCODER_PRESET": "tiny",
    "BEHAVIOR_MAX_TRAINING_STEPS": "10",
    "BEHAVIOR_NUM_TARGETS": "5",
    "BEHAVIOR_NUM_BUCKETS": "2",
    "BEHAVIOR_NUM_SEGMENTS": "3",
    "BEHAVIOR_BOOTSTRAP_SAMPLES": "20",
    "BEHAVIOR_THREADS": "1",
    "BEHAVIOR_MAX_PROBE_LOSS": "0.2",  # of 300 users an AUROC is noise
}


@dataclass(frozen=True)
class Installation:
    """A data root of its own and the environment that points to it."""

    root: Path

    @property
    def environment(self) -> dict[str, str]:
        """The developer's environment without the pipeline's own variables, plus small settings."""
        foreign = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("BEHAVIOR_", "DAGSTER_", "DBT_"))
        }
        return foreign | SMALL | {"BEHAVIOR_DATA_ROOT": str(self.root)}

    @property
    def storage(self) -> Storage:
        """The home of the simulated source."""
        return Storage(self.root / "simulated")

    def command(self, *arguments: str) -> list[str]:
        """Return the command line as the installed script would run it."""
        return [sys.executable, "-m", "behavior_pipeline.cli", *arguments]

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command of the pipeline to its end."""
        return subprocess.run(
            self.command(*arguments),
            env=self.environment,
            cwd=self.root,
            capture_output=True,
            text=True,
            check=False,
        )


@dataclass(frozen=True)
class FinishedRun:
    """What a run of the whole job left behind."""

    installation: Installation
    output: str

    @property
    def storage(self) -> Storage:
        """The home of the simulated source."""
        return self.installation.storage

    @property
    def report_folder(self) -> Path:
        """Where the comparison and the page are."""
        (folder,) = (self.storage.home / "reports").iterdir()
        return folder

    @property
    def cutoff(self) -> datetime:
        """The night's cutoff."""
        return parse_cutoff(self.report_folder.name)

    @property
    def comparison(self) -> dict[str, Any]:
        """The comparison of the night."""
        content: dict[str, Any] = read_json(self.report_folder / "comparison.json")
        return content


def new_installation(folder: Path) -> Installation:
    """Return an installation with an empty data root."""
    folder.mkdir(parents=True, exist_ok=True)
    return Installation(folder)


@contextmanager
def serving(
    installation: Installation, log: Path, settings: dict[str, str] | None = None
) -> Iterator[str]:
    """Serve the UI as `make ui` does, on a free port; yield its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with log.open("w") as output:
        server = subprocess.Popen(
            installation.command("ui", "--port", str(port)),
            env=installation.environment | (settings or {}),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _wait_until_served(address, server, log)
            yield address
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(30)


def _wait_until_served(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()
        try:
            with urlopen(f"{address}/server_info", timeout=5):  # noqa: S310 - our own server
                return
        except (URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(log.read_text())


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """Run `behavior-pipeline run` once."""
    installation = new_installation(tmp_path_factory.mktemp("finished") / "data")
    done = installation.run("run")
    assert done.returncode == 0, done.stdout + done.stderr
    return FinishedRun(installation, done.stdout)
