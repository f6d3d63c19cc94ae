"""What the commands share: options, the opened pipeline, how a mistake is shown."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.text import Text

from behavior_pipeline.errors import PipelineError

USER_MISTAKE = 2
FAILURE = 1

console = Console(file=sys.stdout)  # stays where it is when a step redirects what others print
errors = Console(stderr=True)

P = ParamSpec("P")
R = TypeVar("R")

Source = Annotated[str | None, typer.Option(help="Preset name, or path of your own preset.")]
RawPath = Annotated[
    str | None,
    typer.Option(
        "--path",
        help="Raw events: file, folder or glob, also at s3://bucket/…; file.duckdb::table; or "
        "postgresql://host/database?table=….",
    ),
]
Cutoff = Annotated[str | None, typer.Option(help="Observation cutoff, YYYY-MM-DD (midnight UTC).")]
DataRoot = Annotated[Path | None, typer.Option(help="Folder that holds everything written.")]
Horizon = Annotated[int | None, typer.Option(help="Days of the label window.")]
Lookback = Annotated[int | None, typer.Option(help="Days of the population window.")]
Seed = Annotated[int | None, typer.Option(help="Every random choice derives from it.")]
Encoder = Annotated[str | None, typer.Option(help="Encoder preset: tiny, small or base.")]
Full = Annotated[
    bool, typer.Option("--full", help="Publish every embedding, not only those that changed.")
]
Steps = Annotated[int | None, typer.Option(help="Optimiser steps at the most.")]


def shows_mistakes(command: Callable[P, R]) -> Callable[P, R]:
    """Show a user's mistake as a short message with exit code 2, without a traceback."""

    @wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except PipelineError as mistake:
            _complain("Error:", mistake)
            raise typer.Exit(USER_MISTAKE) from None
        except RuntimeError as failure:
            _complain("Failed:", failure)
            raise typer.Exit(FAILURE) from None

    return wrapper


def _complain(heading: str, reason: Exception) -> None:
    """Print a message as it is: brackets in a path or a value are no markup."""
    text = Text.assemble((heading, "bold red"), " ", str(reason))
    errors.print(text, highlight=False, soft_wrap=True)


def given(**values: Any) -> dict[str, Any]:
    """Keep the options that were given, as plain values that a run's configuration can hold."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in values.items()
        if value is not None
    }


def opened(overrides: dict[str, Any]) -> Any:
    """Open the pipeline with some settings of a command."""
    from behavior_pipeline.pipeline import open_pipeline

    return open_pipeline(**overrides)
