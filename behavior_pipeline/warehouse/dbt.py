"""Runs dbt in a process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import behavior_pipeline
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.progress import Report, report_nothing

DBT_PROJECT = Path(behavior_pipeline.__file__).parents[1] / "dbt_sql"
"""The dbt project at the root of the repository; it is its own profiles folder."""

_PROGRESS_LINE = re.compile(r"(\d+) of (\d+) (?:OK|PASS|WARN|ERROR|FAIL|SKIP)\w* (.*?)\s*\.*\s*\[")
_CLOCK = re.compile(r"^\d\d:\d\d:\d\d\s*")
_MAX_SHOWN_FAILURES = 3


def dbt_arguments(
    command: str, variables: Mapping[str, object], work: Path, database: Path | None = None
) -> list[str]:
    """Return dbt's arguments for a command, with everything it writes kept under `work`.

    Args:
        command: such as `build` or `compile`.
        variables: those of `dbt_project.yml`.
        work: folder for dbt's own artifacts and logs.
        database: the DuckDB file to work in; the variable `warehouse_path` where absent.
    """
    given = dict(variables) | ({"warehouse_path": str(database)} if database else {})
    return [
        command,
        *("--project-dir", str(DBT_PROJECT)),
        *("--profiles-dir", str(DBT_PROJECT)),
        *("--target-path", str(work / "target")),
        *("--log-path", str(work / "logs")),
        *("--vars", json.dumps(given, sort_keys=True)),
    ]


def run_dbt(arguments: list[str], report: Report = report_nothing) -> None:
    """Run dbt in a process of its own, so that its memory goes back when it is done.

    Raises:
        PipelineError: with the models and tests that failed.
    """
    command = [sys.executable, "-u", "-m", "dbt.cli.main", "--no-use-colors", *arguments]
    with subprocess.Popen(  # noqa: S603 - the arguments are a list; no shell reads them
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=_environment()
    ) as process:
        lines = list(_reported(process, report))
    if process.returncode:
        raise PipelineError(_failure(lines), "The old warehouse stays as it was.")


def _reported(process: subprocess.Popen[str], report: Report) -> Iterator[str]:
    """Yield dbt's lines, reporting each node that is done."""
    for line in process.stdout or ():
        if match := _PROGRESS_LINE.search(line):
            report(int(match[1]), int(match[2]), match[3])
        yield line.rstrip()


def _failure(lines: list[str]) -> str:
    """Return what dbt says about the first failures, or its last lines."""
    texts = [_CLOCK.sub("", line) for line in lines]
    starts = [i for i, text in enumerate(texts) if re.match(r"(Failure|\w* ?Error) in ", text)]
    shown = [text for start in starts[:_MAX_SHOWN_FAILURES] for text in texts[start : start + 4]]
    about = [line for line in shown or texts[-8:] if line.strip() and "compiled code" not in line]
    return "\n".join(("dbt could not build the warehouse:", *dict.fromkeys(about)))


def _environment() -> dict[str, str]:
    """Return this process's environment without the developer's own dbt settings."""
    return {name: value for name, value in os.environ.items() if not name.startswith("DBT_")}
