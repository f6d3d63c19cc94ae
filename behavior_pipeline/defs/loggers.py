"""Where a run's progress goes: its log, and the terminal of a run started on the command line."""

from __future__ import annotations

import logging
from typing import Any

import dagster as dg

from behavior_pipeline.progress import Report, log_report
from behavior_pipeline.terminal import Terminal, active

SHOWN_METADATA = 3  # figures beside a finished step


def report_to(context: dg.AssetExecutionContext, title: str) -> Report:
    """Return a progress report that goes to the run's log and, if there is one, the terminal."""
    log = log_report(title, context.log.info)

    def report(done: int, total: int, message: str) -> None:
        terminal = active()
        if terminal is not None:
            terminal.update(title, done, total, message)
        log(done, total, message)

    return report


class _TerminalHandler(logging.Handler):
    """Turns Dagster's events into lines of the active terminal."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)  # Dagster writes its events at this level
        self._figures: dict[str, str] = {}  # of each step that materialized something

    def emit(self, record: logging.LogRecord) -> None:
        event: dg.DagsterEvent | None = getattr(record, "dagster_meta", {}).get("dagster_event")
        terminal = active()
        if terminal is None or event is None or event.step_key is None:
            return
        kind = event.event_type
        if kind == dg.DagsterEventType.STEP_START:
            terminal.show_step(event.step_key)
        elif kind == dg.DagsterEventType.ASSET_MATERIALIZATION:
            self._figures[event.step_key] = _figures(event)
        elif kind == dg.DagsterEventType.ASSET_CHECK_EVALUATION:
            _show_failed_check(terminal, event)
        elif kind == dg.DagsterEventType.STEP_SUCCESS and event.step_key in self._figures:
            seconds = event.step_success_data.duration_ms / 1000
            terminal.finish_step(event.step_key, seconds, self._figures[event.step_key])


def _show_failed_check(terminal: Terminal, event: dg.DagsterEvent) -> None:
    """Print a line for a check that did not pass; those that did are silent."""
    evaluation = event.asset_check_evaluation_data
    if not evaluation.passed:
        found = {
            name: value.value
            for name, value in evaluation.metadata.items()
            if not isinstance(value, dg.MarkdownMetadataValue)  # tables are for the page
        }
        name = f"{evaluation.asset_key.to_user_string()}: {evaluation.check_name}"
        is_error = evaluation.severity is dg.AssetCheckSeverity.ERROR
        is_blocking = bool(evaluation.blocking) and is_error
        terminal.show_failed_check(name, str(found), is_blocking=is_blocking)


def _figures(event: dg.DagsterEvent) -> str:
    """Return the first few numbers of a materialization, as `num_users 3,245`."""
    metadata = event.step_materialization_data.materialization.metadata
    numbers = [
        (name.removeprefix("dagster/"), value.value)
        for name, value in metadata.items()
        if isinstance(value, dg.IntMetadataValue | dg.FloatMetadataValue)
    ]
    return ", ".join(f"{name} {_short(value)}" for name, value in numbers[:SHOWN_METADATA])


def _short(value: Any) -> str:
    """Write a number for people."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


@dg.logger({}, description="One line per step, for a person at a terminal.")
def terminal_logger(_context: dg.InitLoggerContext) -> logging.Logger:
    """Return the logger that runs started on the command line use."""
    logger = logging.getLogger("behavior_pipeline.terminal")
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    logger.handlers = [_TerminalHandler()]
    return logger


@dg.definitions
def loggers() -> dg.Definitions:
    """Offer the terminal's logger beside Dagster's own."""
    return dg.Definitions(
        loggers={"console": dg.colored_console_logger, "terminal": terminal_logger}
    )
