"""Starting Dagster's jobs from the command line, so that their runs show in the UI.

A run executes in this process. One run at a time works in a source's home; what a killed run left
behind is cleaned up by the next one.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg
import psutil
from rich.console import Console

from behavior_pipeline.encoder.live import checkpoint_folder
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.ingest.arrivals import events_span
from behavior_pipeline.pipeline import Pipeline, open_pipeline
from behavior_pipeline.settings import SETTINGS_FILE, Settings, load_settings
from behavior_pipeline.storage import Storage, make_private_folder, remove_leftovers
from behavior_pipeline.terminal import Terminal, set_active
from behavior_pipeline.windows import EvaluationWindows, cutoff_of, default_cutoff, partition_of

WORKSPACE = Path(__file__).parents[1] / "workspace.yaml"
POLL_SECONDS = 0.5
PRETRAINING = "pretraining"  # the job that works on what is loaded already
MISTAKES = {kind.__name__ for kind in (PipelineError, *PipelineError.__subclasses__())}
BLOCKED = "DagsterAssetCheckFailedError"  # a class that Dagster does not export

PID_TAG = ".dagster/behavior_pipeline_pid"  # tags of this prefix are hidden in the UI
STARTED_TAG = ".dagster/behavior_pipeline_started"


@dataclass(frozen=True)
class Night:
    """What a finished job worked on."""

    pipeline: Pipeline
    windows: EvaluationWindows


INSTANCE_CONFIG = """\
# Written by behavior-pipeline; edit freely.
telemetry:
  enabled: false
nux:
  enabled: false
concurrency:
  runs:
    max_concurrent_runs: 1  # a home has one warehouse: nights of a backfill follow one another
  pools:
    default_limit: 1      # DuckDB, the online store and the machine's cores have one user each
    granularity: op
"""


def dagster_home(settings: Settings) -> Path:
    """Return the folder of Dagster's own records, made and configured when it is missing.

    `DAGSTER_HOME` wins; otherwise it lies in the data root, so that the runs of one data root
    are seen together.
    """
    given = os.environ.get("DAGSTER_HOME")
    home = Path(given) if given else settings.data_root.absolute() / "dagster"
    make_private_folder(home)
    config = home / "dagster.yaml"
    if not config.exists():
        config.write_text(INSTANCE_CONFIG)
    os.environ["DAGSTER_HOME"] = str(home)
    return home


@contextmanager
def holding(storage: Storage) -> Iterator[None]:
    """Hold a home for one run; the lock goes with the process, however it ends.

    Raises:
        PipelineError: if another process holds it.
    """
    lock = storage.home / ".lock"
    with lock.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise PipelineError(
                f"Another run is at work in {storage.home}.", "Wait for it, or stop it."
            ) from None
        yield


def work(
    job: str, overrides: Mapping[str, Any], cutoff: datetime | None, console: Console
) -> Night:
    """Load the source, settle the cutoff, and execute a job for its night.

    The history is loaded first, so that a cutoff outside the data is refused before any work;
    pretraining takes the events as the nights have left them.

    Raises:
        PipelineError: for the user's mistakes.
        RuntimeError: if a step failed for another reason.
    """
    opened = open_pipeline(**overrides)
    with holding(opened.storage):
        remove_leftovers(opened.storage.home)
        if job != PRETRAINING or not any(opened.storage.events.glob("arrival=*")):
            execute("history", None, overrides, console)
        span = events_span(opened.storage)
        settled = cutoff or default_cutoff(span.last_event_at, opened.preset.tasks.horizon_days)
        windows = opened.windows(settled)
        execute(job, partition_of(settled), overrides, console)
    return Night(opened, windows)


def arrive(overrides: Mapping[str, Any], cutoff: datetime, console: Console) -> Night:
    """Execute the nightly job: what arrived on the day before the cutoff, with the live checkpoint.

    Raises:
        PipelineError: for the user's mistakes.
        RuntimeError: if a step failed for another reason.
    """
    opened = open_pipeline(**overrides)
    checkpoint_folder(opened.storage.checkpoints)
    with holding(opened.storage):
        remove_leftovers(opened.storage.home)
        execute("nightly", partition_of(cutoff), overrides, console)
    return Night(opened, opened.windows(cutoff))


def execute(
    job: str, partition: str | None, overrides: Mapping[str, Any], console: Console
) -> None:
    """Execute a job for a night and show its steps.

    Raises:
        PipelineError: the user's mistake that a step ran into, or a night before the first one.
        RuntimeError: if a step failed for another reason, or a blocking check held the run back.
    """
    settings = load_settings(**overrides)
    dagster_home(settings)
    with dg.DagsterInstance.get() as instance, _as_of(partition, settings):
        close_dead_runs(instance)
        _execute(instance, job, partition, overrides, console)


@contextmanager
def _as_of(partition: str | None, settings: Settings) -> Iterator[None]:
    """Let a night be one, also where its events are dated later than this machine's clock.

    Raises:
        PipelineError: if the night lies before the first partition.
    """
    if partition is None:
        yield
        return
    if partition < f"{settings.partitions_start}":
        raise PipelineError(
            f"The night {partition} lies before the first one, {settings.partitions_start}.",
            f"Set partitions_start, in {SETTINGS_FILE} or BEHAVIOR_PARTITIONS_START, earlier.",
        )
    with dg.partition_loading_context(max(datetime.now(UTC), cutoff_of(partition))):
        yield


def close_dead_runs(instance: dg.DagsterInstance) -> int:
    """Mark runs whose process is gone as failed, and free the pools that they held."""
    started = instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED]))
    dead = [run for run in started if PID_TAG in run.tags and not _is_alive(run.tags)]
    for run in dead:
        instance.report_run_failed(run, "The process of this run was killed.")
        instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
    return len(dead)


def _execute(
    instance: dg.DagsterInstance,
    job: str,
    partition: str | None,
    overrides: Mapping[str, Any],
    console: Console,
) -> None:
    """Run in this process, with one line per step."""
    from behavior_pipeline.definitions import defs  # noqa: PLC0415 - loads every stage

    definition = defs().resolve_job_def(job)
    terminal = Terminal(console)
    set_active(terminal)
    with terminal.progress:
        result = definition.execute_in_process(
            run_config={
                "loggers": {"terminal": {}},
                "resources": {"pipeline": {"config": {"overrides": dict(overrides)}}},
            },
            instance=instance,
            partition_key=partition,
            tags=_process_tags(),
            raise_on_error=False,
        )
    set_active(None)
    if not result.success:
        _raise_cause(result)


def _raise_cause(result: dg.ExecuteInProcessResult) -> None:
    """Raise what made the first failed step fail."""
    for event in result.filter_events(lambda event: event.is_step_failure):
        error = event.step_failure_data.error
        while error is not None and error.cause is not None:
            error = error.cause
        if error is not None and error.cls_name in MISTAKES:
            raise PipelineError(error.message.split(": ", 1)[-1].strip())
        if error is not None and error.cls_name == BLOCKED:
            break  # the check's own line has said what it found
        detail = error.to_string() if error is not None else str(event.message)
        raise RuntimeError(f"The step {event.step_key} failed.\n{detail}")
    raise RuntimeError("A blocking check held the run back; its line above says what it found.")


def _process_tags() -> dict[str, str]:
    """Say which process executes a run, so that its death can be noticed."""
    process = psutil.Process()
    return {PID_TAG: str(process.pid), STARTED_TAG: f"{process.create_time():.2f}"}


def _is_alive(tags: Mapping[str, str]) -> bool:
    """Tell whether the process behind the tags still lives (and is no other of the same number)."""
    try:
        process = psutil.Process(int(tags[PID_TAG]))
    except psutil.NoSuchProcess:
        return False
    return f"{process.create_time():.2f}" == tags.get(STARTED_TAG)


def serve(settings: Settings, host: str, port: int) -> None:
    """Serve Dagster's web page and its daemon until one of them ends or Ctrl-C."""
    dagster_home(settings)
    with dg.DagsterInstance.get() as instance:
        close_dead_runs(instance)  # a run that was killed would hold back the queue for ever
    tool = [sys.executable, "-m"]
    page = [*tool, "dagster_webserver", "-w", str(WORKSPACE), "-h", host, "-p", str(port)]
    daemon = [*tool, "dagster._daemon", "run", "-w", str(WORKSPACE)]
    processes = [subprocess.Popen(command) for command in (page, daemon)]  # noqa: S603 - no shell
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        while all(process.poll() is None for process in processes):
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        pass
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
