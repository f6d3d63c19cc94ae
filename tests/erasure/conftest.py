"""One home in which the whole job has run twice, so that a candidate's lane is there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SMALL = {
    "BEHAVIOR_SIMULATED_USERS": "200",
    "BEHAVIOR_SIMULATED_DAYS": "120",
    "BEHAVIOR_ENCODER_PRESET": "tiny",
    "BEHAVIOR_NUM_TARGETS": "5",
    "BEHAVIOR_NUM_BUCKETS": "2",
    "BEHAVIOR_NUM_SEGMENTS": "3",
    "BEHAVIOR_BOOTSTRAP_SAMPLES": "20",
    "BEHAVIOR_THREADS": "1",
    "BEHAVIOR_MAX_PROBE_LOSS": "1",
    "BEHAVIOR_MAX_FORETELLING_LOSS": "9",
    "BEHAVIOR_PROMOTION": "manual",
}


@pytest.fixture(scope="session")
def small_environment() -> dict[str, str]:
    """The developer's environment without the pipeline's own variables, plus small settings."""
    foreign = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("BEHAVIOR_", "DAGSTER_", "DBT_"))
    }
    return foreign | SMALL


@pytest.fixture(scope="session")
def finished_home(
    tmp_path_factory: pytest.TempPathFactory, small_environment: dict[str, str]
) -> Path:
    """The home of a finished run with a candidate beside it."""
    root = tmp_path_factory.mktemp("erasure")
    environment = small_environment | {"BEHAVIOR_DATA_ROOT": str(root)}
    for steps, command in (("10", "run"), ("12", "pretrain"), ("12", "candidate")):
        done = subprocess.run(
            [sys.executable, "-m", "behavior_pipeline.cli", command],
            env=environment | {"BEHAVIOR_MAX_TRAINING_STEPS": steps},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode in {0, 1}, done.stdout + done.stderr
    return root / "simulated"
