"""Starting Dagster's jobs from the command line, so that their runs show in the UI.

A run of the command line executes in this process; one of the page or its daemon in a process of
its own (see run_launcher.py). One run at a time works in a source's home (see holding.py).
"""

from __future__ import annotations

import hashlib
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
from rich.console import Console

from behavior_pipeline.encoder.live import CANDIDATE, checkpoint_folder, pointed_to
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.feature_store.versions import read_versions
from behavior_pipeline.holding import holding
from behavior_pipeline.ingest.arrivals import events_span
from behavior_pipeline.pipeline import Pipeline, open_pipeline
from behavior_pipeline.run_launcher import close_dead_runs, process_tags
from behavior_pipeline.settings import SETTINGS_FILE, Settings, load_settings
from behavior_pipeline.storage import make_private_folder
from behavior_pipeline.terminal import Terminal, set_active
from behavior_pipeline.windows import EvaluationWindows, cutoff_of, default_cutoff, partition_of

WORKSPACE = Path(__file__).parents[1] / "workspace.yaml"
POLL_SECONDS = 0.5
EVERYTHING = "pretraining_and_nightly"
PRETRAINING = "pretraining"  # the job that works on what is loaded already
MISTAKES = {kind.__name__ for kind in (PipelineError, *PipelineError.__subclasses__())}
BLOCKED = "DagsterAssetCheckFailedError"  # a class that Dagster does not export


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
run_launcher:             # a process per run, known by its id
  module: behavior_pipeline.run_launcher
  class: ProcessRunLauncher
run_monitoring:           # a run whose process died is resumed under its own id, in its place
  enabled: true
  poll_interval_seconds: 10
  max_resume_run_attempts: 2
  start_timeout_seconds: 300
  cancel_timeout_seconds: 120
run_retries:              # one that died while it started, or too often, is tried once more
  enabled: true
  max_retries: 1
  retry_on_asset_or_op_failure: false   # a step that failed says why; again would fail again
"""

OLDER_DEFAULTS = frozenset(
    {
        "ef8af2290ba64c48da84b768c9748cfe595baf358e9e8cd3cf9083078f3d6efc",
        "876c6ee715647832c6082a1bf04eb447c1b56065b001477e0e0683004bef3e58",
        "cf6107712203278a4ca4c927046648a7c7d2dcc451c8c1c3f336b31434647a09",
    }
)
"""SHA-256 of every `dagster.yaml` that earlier versions wrote: nobody has edited such a file."""


def dagster_home(settings: Settings) -> Path:
    """Return the folder of Dagster's own records, made and configured when it is missing.

    `DAGSTER_HOME` wins; otherwise it lies in the data root, so that the runs of one data root
    are seen together.
    """
    given = os.environ.get("DAGSTER_HOME")
    home = Path(given) if given else settings.data_root.absolute() / "dagster"
    make_private_folder(home)
    config = home / "dagster.yaml"
    if not config.exists() or _is_older_default(config.read_bytes()):
        config.write_text(INSTANCE_CONFIG)
    os.environ["DAGSTER_HOME"] = str(home)
    return home


def _is_older_default(content: bytes) -> bool:
    """Tell whether a configuration is what an earlier version wrote, to the letter."""
    return hashlib.sha256(content).hexdigest() in OLDER_DEFAULTS


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
        if job != PRETRAINING or not any(opened.storage.events.glob("arrival=*")):
            execute("history", None, overrides, console)
        span = events_span(opened.storage)
        settled = cutoff or default_cutoff(span.last_event_at, opened.preset.tasks.horizon_days)
        windows = opened.windows(settled)
        for part in _parts(job, opened):
            execute(part, partition_of(settled), overrides, console)
    return Night(opened, windows)


def _parts(job: str, opened: Pipeline) -> Iterator[str]:
    """Yield the jobs that a job comes to in a home.

    Where a checkpoint is live already, a new one is its candidate: the night goes on with the live
    one, and once more with the new one if the gates let it pass.
    """
    live = read_versions(opened.storage).live_version.checkpoint_id
    if job != EVERYTHING or live is None:
        yield job
        return
    yield from (PRETRAINING, "nightly")
    if pointed_to(opened.storage.checkpoints, CANDIDATE) is not None:
        yield "candidate"
    if read_versions(opened.storage).live_version.checkpoint_id != live:
        yield "nightly"


def change_version(job: str, overrides: Mapping[str, Any], console: Console) -> None:
    """Execute `promotion` or `rollback`, once no other run is at work in the home.

    Raises:
        PipelineError: for the user's mistakes.
        RuntimeError: if it failed for another reason.
    """
    opened = open_pipeline(**overrides)
    with holding(opened.storage):
        execute(job, None, overrides, console)


def arrive(overrides: Mapping[str, Any], cutoff: datetime, console: Console) -> Night:
    """Execute the nightly job: what arrived on the day before the cutoff, with the live checkpoint.

    Raises:
        PipelineError: for the user's mistakes.
        RuntimeError: if a step failed for another reason.
    """
    opened = open_pipeline(**overrides)
    checkpoint_folder(opened.storage.checkpoints)
    with holding(opened.storage):
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
            tags=process_tags(os.getpid()),
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


def serve(settings: Settings, host: str, port: int) -> None:
    """Serve Dagster's web page and its daemon until one of them ends or Ctrl-C.

    A run at work goes on to its end by itself; the next daemon takes up the queue.
    """
    dagster_home(settings)
    with dg.DagsterInstance.get() as instance:
        close_dead_runs(instance)  # the daemon resumes the others
    os.environ["BEHAVIOR_DATA_ROOT"] = str(settings.data_root.absolute())
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
