"""Fixtures that several rooms share."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from place_builders import postgres_programs

from behavior_pipeline.settings import Settings, load_settings
from behavior_pipeline.storage import Storage

hypothesis_settings.register_profile(
    "default", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
hypothesis_settings.load_profile("default")

FINISHED = "finished"  # fixture of tests/end_to_end: a run of the whole job


def realdata_folder() -> Path:
    """Where the real event logs are, if anywhere."""
    default = Path(__file__).parents[1] / ".." / "shared" / "data"
    return Path(os.environ.get("BEHAVIOR_REALDATA", default)).resolve()


@pytest.hookimpl(tryfirst=True)  # before the workers look at the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, saying so, what cannot run here; keep together what shares an expensive fixture."""
    missing = _missing()
    for item in items:
        item.add_marker(pytest.mark.xdist_group(_group(item)))
        for marker, reason in missing.items():
            if marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


def _missing() -> dict[str, str]:
    """Name what this machine lacks: marker -> reason."""
    missing = {}
    folder = realdata_folder()
    if not folder.is_dir():
        missing["realdata"] = f"no real event logs in {folder}: set BEHAVIOR_REALDATA"
    programs = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    if programs:
        missing["browser"] = f"not installed: {', '.join(programs)} (see .ci/run)"
    if postgres_programs() is None:
        missing["postgres"] = "not installed: PostgreSQL's server, Debian's package postgresql"
    if shutil.which("redis-server") is None:
        missing["redis"] = "not installed: Redis' server, Debian's package redis-server"
    return missing


def _group(item: pytest.Item) -> str:
    """Name the tests that one worker runs: they share a finished run, a built warehouse, a file."""
    if FINISHED in getattr(item, "fixturenames", ()):
        return FINISHED
    if item.path.parent.name == "warehouse":
        return "warehouse"
    if "shard" in item.fixturenames:
        return item.nodeid
    return str(item.path)


@pytest.fixture
def realdata() -> Path:
    return realdata_folder()


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(tmp_path / "data" / "test")


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Small settings that no environment variable or file of the developer's changes."""
    for name in [name for name in os.environ if name.startswith("BEHAVIOR_")]:
        if name != "BEHAVIOR_REALDATA":
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return load_settings(
        data_root=tmp_path / "data",
        memory_limit="1GB",
        threads=1,
        num_buckets=3,
        encoder_preset="tiny",
        max_training_steps=5,
        min_token_count=2,
        num_targets=5,
        bootstrap_samples=20,
    )
