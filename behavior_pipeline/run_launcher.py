"""Runs of the page and its daemon, each in a process of its own that is watched and resumed.

Dagster's own launcher leaves a run to the server that holds the code. If both die, as when a
machine restarts, nobody notices: the run stays "started" and holds the queue and its pools for
ever. Here a run says which process executes it. Dagster's run monitoring asks for it every few
seconds and lets a new process resume the run, all of its steps and under its own id, so that it
keeps its place before the nights that wait.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import dagster as dg
import psutil
from dagster._core.launcher.base import (
    CheckRunHealthResult,
    LaunchRunContext,
    ResumeRunContext,
    RunLauncher,
    WorkerStatus,
)
from dagster._core.storage.tags import PRIORITY_TAG, RETRY_STRATEGY_TAG
from dagster._grpc.types import ExecuteRunArgs, ResumeRunArgs
from dagster._serdes import ConfigurableClass, ConfigurableClassData

PID_TAG = ".dagster/behavior_pipeline_pid"  # tags of this prefix are hidden in the UI
STARTED_TAG = ".dagster/behavior_pipeline_started"

RETRY_TAGS = {
    RETRY_STRATEGY_TAG: "ALL_STEPS",  # another night may have been in the warehouse meanwhile
    PRIORITY_TAG: "1",  # before the nights that wait
}
"""Tags that an automatic retry takes over from its run."""

KILLED = "The process of this run was killed."


class ProcessRunLauncher(RunLauncher[dg.DagsterInstance], ConfigurableClass):
    """Launches each run in a process of this machine, and knows whether it still lives.

    The process outlives the daemon: a night goes on when the page is stopped.
    """

    def __init__(self, inst_data: ConfigurableClassData | None = None) -> None:
        self._inst_data = inst_data
        self._children: list[subprocess.Popen[bytes]] = []
        super().__init__()  # type: ignore[no-untyped-call]

    @property
    def inst_data(self) -> ConfigurableClassData | None:
        """What `dagster.yaml` says of this class."""
        return self._inst_data

    @classmethod
    def config_type(cls) -> dict[str, Any]:
        """Take no configuration."""
        return {}

    @classmethod
    def from_config_value(
        cls, inst_data: ConfigurableClassData, config_value: Mapping[str, Any]
    ) -> ProcessRunLauncher:
        """Make the launcher that `dagster.yaml` names."""
        del config_value
        return cls(inst_data)

    def launch_run(self, context: LaunchRunContext) -> None:
        """Execute a run in a process of its own."""
        run = context.dagster_run
        if run.job_code_origin is None:
            raise ValueError(f"The run {run.run_id} does not say where its code is.")
        arguments = ExecuteRunArgs(run.job_code_origin, run.run_id, self._instance.get_ref())
        self._start(run, arguments)

    @property
    def supports_resume_run(self) -> bool:
        """Say that a run whose process died can go on in another one."""
        return True

    def resume_run(self, context: ResumeRunContext) -> None:
        """Execute a run once more, in a new process; one that a terminal showed has failed."""
        run = context.dagster_run
        self._instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
        if run.job_code_origin is None:
            self._instance.report_run_failed(run, KILLED)
            return
        arguments = ResumeRunArgs(run.job_code_origin, run.run_id, self._instance.get_ref())
        self._start(run, arguments)

    @property
    def supports_check_run_worker_health(self) -> bool:
        """Say that a dead process is noticed."""
        return True

    def check_run_worker_health(self, run: dg.DagsterRun) -> CheckRunHealthResult:
        """Tell whether the process of a run lives."""
        self._children = [child for child in self._children if child.poll() is None]
        if is_alive(run.tags):
            return CheckRunHealthResult(WorkerStatus.RUNNING)
        return CheckRunHealthResult(WorkerStatus.NOT_FOUND, KILLED)

    def terminate(self, run_id: str) -> bool:
        """Interrupt the process of a run; tell whether there was one."""
        run = self._instance.get_run_by_id(run_id)
        if run is None or run.is_finished:
            return False
        self._instance.report_run_canceling(run)
        if not is_alive(run.tags):
            self._instance.report_run_canceled(run)
            return False
        os.kill(int(run.tags[PID_TAG]), signal.SIGTERM)
        return True

    def _start(self, run: dg.DagsterRun, arguments: ExecuteRunArgs | ResumeRunArgs) -> None:
        """Start a process and note whose it is."""
        # The program `dagster` need not be on the path; the last words are what it is to do.
        command = [sys.executable, "-m", "dagster", *list(arguments.get_command_args())[-3:]]
        # In a session of its own, so that Ctrl-C in the page's terminal does not reach it.
        child = subprocess.Popen(command, start_new_session=True)  # noqa: S603 - no shell
        self._children.append(child)
        chosen = {name: value for name, value in run.tags.items() if name in RETRY_TAGS}
        tags = process_tags(child.pid) | RETRY_TAGS | chosen
        self._instance.add_run_tags(run.run_id, tags)


def process_tags(pid: int) -> dict[str, str]:
    """Say which process executes a run, so that its death can be noticed."""
    return {PID_TAG: str(pid), STARTED_TAG: f"{psutil.Process(pid).create_time():.2f}"}


def is_alive(tags: Mapping[str, str]) -> bool:
    """Tell whether the process behind the tags still lives (and is no other of the same number)."""
    try:
        process = psutil.Process(int(tags.get(PID_TAG, -1)))
        is_zombie = process.status() == psutil.STATUS_ZOMBIE
        return not is_zombie and f"{process.create_time():.2f}" == tags.get(STARTED_TAG)
    except (psutil.NoSuchProcess, ValueError):
        return False


def close_dead_runs(instance: dg.DagsterInstance) -> int:
    """Free the pools of runs whose process is gone; those that nobody can resume have failed."""
    started = instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED]))
    dead = [run for run in started if not is_alive(run.tags)]
    for run in dead:
        if run.job_code_origin is None:
            instance.report_run_failed(run, KILLED)
        instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
    return len(dead)
