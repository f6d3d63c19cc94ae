"""What the command line makes of Dagster's runs."""

import fcntl
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.launcher.base import WorkerStatus

from behavior_pipeline import runs
from behavior_pipeline.defs.partitions import nights
from behavior_pipeline.defs.resources import (
    PARTITION_TAG,
    RANGE_END_TAG,
    RANGE_START_TAG,
    PipelineResource,
    night_of,
)
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.holding import holding
from behavior_pipeline.run_launcher import (
    PID_TAG,
    ProcessRunLauncher,
    close_dead_runs,
    process_tags,
)
from behavior_pipeline.runs import (
    INSTANCE_CONFIG,
    _as_of,
    _is_older_default,
    _raise_cause,
    dagster_home,
)
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage

LATER_THAN_ANY_CLOCK = "2999-01-01"


def test_events_may_be_dated_later_than_the_clock() -> None:
    assert not nights.has_partition_key(LATER_THAN_ANY_CLOCK)
    with _as_of(LATER_THAN_ANY_CLOCK, Settings()):
        assert nights.has_partition_key(LATER_THAN_ANY_CLOCK)


def test_a_night_before_the_first_is_refused() -> None:
    with pytest.raises(PipelineError, match="partitions_start"), _as_of("1999-12-31", Settings()):
        pass


def failed_run(*definitions: object) -> dg.ExecuteInProcessResult:
    """Execute assets and checks of which one fails."""
    return dg.materialize(list(definitions), raise_on_error=False)  # type: ignore[arg-type]


@dg.asset
def table(context: dg.AssetExecutionContext) -> None:
    """Something to check."""


@dg.asset_check(asset=table, blocking=True)
def is_sound() -> dg.AssetCheckResult:
    return dg.AssetCheckResult(passed=False)


@dg.asset
def spoilt() -> None:
    raise PipelineError("The file 'a: b' is empty.", "Fill it.")


def test_a_blocking_check_is_told_without_a_traceback() -> None:
    with pytest.raises(RuntimeError, match="blocking check") as caught:
        _raise_cause(failed_run(table, is_sound))
    assert "Stack Trace" not in str(caught.value)


def test_a_mistake_keeps_its_words() -> None:
    with pytest.raises(PipelineError) as caught:
        _raise_cause(failed_run(spoilt))
    assert str(caught.value) == "The file 'a: b' is empty.\nFill it."


def test_nights_of_a_backfill_follow_one_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    dagster_home(Settings())
    with dg.DagsterInstance.get() as instance:
        assert instance.get_concurrency_config().run_queue_config.max_concurrent_runs == 1


def test_a_configuration_that_nobody_edited_is_brought_up_to_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    config = tmp_path / "dagster.yaml"
    older, edited = "# an older default\n", "# an older default, edited\n"
    monkeypatch.setattr(runs, "OLDER_DEFAULTS", {hashlib.sha256(older.encode()).hexdigest()})
    config.write_text(older)
    dagster_home(Settings())
    assert config.read_text() == INSTANCE_CONFIG
    config.write_text(edited)
    dagster_home(Settings())
    assert config.read_text() == edited


def test_the_configuration_of_the_first_versions_is_known() -> None:
    first = (
        "# Written by behavior-pipeline; edit freely.\n"
        "telemetry:\n  enabled: false\nnux:\n  enabled: false\nconcurrency:\n  pools:\n"
        "    default_limit: 1      # DuckDB, the online store and the machine's cores "
        "have one user each\n    granularity: op\n"
    )
    assert _is_older_default(first.encode())
    assert not _is_older_default(INSTANCE_CONFIG.encode())


@pytest.fixture
def instance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dg.DagsterInstance]:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    dagster_home(Settings())
    with dg.DagsterInstance.get() as instance:
        yield instance


def started_run(instance: dg.DagsterInstance, pid: int) -> dg.DagsterRun:
    """Note a run that a terminal started and that a process of some number executes."""
    tags = process_tags(os.getpid()) | {PID_TAG: str(pid)}
    run = dg.DagsterRun("nightly", tags=tags, status=dg.DagsterRunStatus.STARTED)
    return instance.add_run(run)


def test_runs_are_watched_and_resumed(instance: dg.DagsterInstance) -> None:
    launcher = instance.run_launcher
    assert isinstance(launcher, ProcessRunLauncher)
    assert instance.run_monitoring_enabled
    assert instance.run_monitoring_max_resume_run_attempts > 0
    alive = started_run(instance, os.getpid())
    assert launcher.check_run_worker_health(alive).status is WorkerStatus.RUNNING
    with subprocess.Popen(["true"]) as ended:
        pass
    dead = started_run(instance, ended.pid)
    assert launcher.check_run_worker_health(dead).status is WorkerStatus.NOT_FOUND


def test_a_dead_run_of_a_terminal_has_failed(instance: dg.DagsterInstance) -> None:
    with subprocess.Popen(["true"]) as ended:
        pass
    dead, alive = started_run(instance, ended.pid), started_run(instance, os.getpid())
    assert close_dead_runs(instance) == 1
    statuses = {run.run_id: run.status for run in instance.get_runs()}
    assert statuses[dead.run_id] is dg.DagsterRunStatus.FAILURE
    assert statuses[alive.run_id] is dg.DagsterRunStatus.STARTED


@pytest.mark.parametrize(
    ("tags", "night"),
    [
        ({PARTITION_TAG: "2026-01-02"}, "2026-01-02"),
        ({RANGE_START_TAG: "2026-01-02", RANGE_END_TAG: "2026-01-02"}, "2026-01-02"),
        ({RANGE_START_TAG: "2026-01-02", RANGE_END_TAG: "2026-01-03"}, None),
        ({}, None),
    ],
)
def test_a_run_belongs_to_one_night(tags: dict[str, str], night: str | None) -> None:
    assert night_of(tags) == night


def test_a_home_is_held_by_one_process(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "home")
    hold = "import sys; from pathlib import Path; from behavior_pipeline.holding import holding; "
    hold += "from behavior_pipeline.storage import Storage; "
    hold += "held = holding(Storage(Path(sys.argv[1]))); held.__enter__(); print(1, flush=True); "
    hold += "sys.stdin.read()"
    command = [sys.executable, "-c", hold, str(storage.home)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline()
        with pytest.raises(PipelineError, match="Another run"), holding(storage):
            pass
        leftover = storage.home / f".thing.{other.pid}-0.aside"
        leftover.touch()
        told: list[str] = []

        def waiting() -> None:
            told.append("waits")
            other.kill()
            other.wait()

        with holding(storage, waiting), holding(storage):
            assert told == ["waits"]
            assert not leftover.exists()


def test_the_steps_of_a_run_hold_the_home(settings: Settings) -> None:
    @dg.asset
    def probe(pipeline: PipelineResource) -> None:
        lock = pipeline.open().storage.home / ".lock"
        with lock.open("w") as handle, pytest.raises(OSError):  # noqa: PT011 - held
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)

    resource = PipelineResource(overrides={"data_root": str(settings.data_root)})
    assert dg.materialize([probe], resources={"pipeline": resource}).success
