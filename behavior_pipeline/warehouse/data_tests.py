"""Runs the data tests of a plan on what a build has just made, before it counts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from behavior_pipeline.errors import PipelineError
from behavior_pipeline.layers import EVENTS_FILE
from behavior_pipeline.sql import parquet
from behavior_pipeline.warehouse.state import TOUCHED
from behavior_pipeline.warehouse.workbench import EVENTS, Workbench

_WAY_OUT: Final = (
    "The warehouse that analysts read stays as it was; correct what arrived and load it again."
)


class FailedTestsError(PipelineError):
    """Some rows fail data tests.

    Attributes:
        failures: rows that fail each data test, those without any among them.
    """

    def __init__(self, failures: Mapping[str, int]) -> None:
        failed = {name: rows for name, rows in failures.items() if rows}
        listed = "; ".join(f"{name} ({rows:,} rows)" for name, rows in failed.items())
        super().__init__(f"Data tests of the warehouse failed: {listed}.", _WAY_OUT)
        self.failures = dict(failures)


def run_tests(bench: Workbench, scope: Mapping[str, str]) -> dict[str, int]:
    """Run every data test on what was built; return the rows that fail each: none.

    Args:
        bench: the warehouse at work.
        scope: relations that stand for models, so that only they are looked at.

    Raises:
        FailedTestsError: if any row fails a test.
    """
    for name, relation in scope.items():
        bench.set_scope(name, relation)
    failures = {test.name: bench.check(test) for test in bench.plan.tests}
    bench.clear_scope()
    if any(failures.values()):
        raise FailedTestsError(failures)
    return failures


def touched_scope(bench: Workbench, folder: Path | None) -> dict[str, str]:
    """Return the rows of the users touched, of each model that is stored by user."""
    scope = {
        model.name: f"FROM {bench.table(model)} WHERE user_id IN (SELECT user_id FROM {TOUCHED})"
        for model in bench.plan.of_grain("user")
    }
    if folder is not None:
        scope[EVENTS] = f"FROM {parquet([folder / EVENTS_FILE])}"
    return scope
