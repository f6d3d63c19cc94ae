"""`behavior-pipeline drift`: what the last nights were named, and the figures of the newest."""

from __future__ import annotations

from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from behavior_pipeline.commands.options import (
    DataRoot,
    Source,
    console,
    given,
    opened,
    shows_mistakes,
)
from behavior_pipeline.errors import PipelineError

if TYPE_CHECKING:
    from behavior_pipeline.downstream.drift.verdicts import Verdict


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(shows_mistakes(drift))


def drift(
    source: Source = None,
    data_root: DataRoot = None,
    nights: Annotated[int, typer.Option(min=1, help="So many of the last nights.")] = 14,
    picture: Annotated[Path | None, typer.Option(help="PNG to draw.")] = None,
) -> None:
    """Show how the last nights differ from those before them, and what that is named."""
    from behavior_pipeline.downstream.drift.history import read_history
    from behavior_pipeline.downstream.drift.picture import drift_png
    from behavior_pipeline.downstream.drift.verdicts import judge_nights

    pipeline = opened(given(source=source, data_root=data_root))
    verdicts = judge_nights(read_history(pipeline.storage), pipeline.settings)
    if not verdicts:
        raise PipelineError(
            f"No night of '{pipeline.preset.name}' was measured yet.",
            "Run one: behavior-pipeline nightly --cutoff …",
        )
    console.print(nights_table(verdicts[-nights:]))
    console.print(figures_table(verdicts[-1]))
    if picture is not None:
        picture.write_bytes(drift_png(verdicts))


def nights_table(verdicts: list[Verdict]) -> Table:
    """Return the verdict of each night, the newest last."""
    table = Table("cutoff", "checkpoint", "verdict")
    for verdict in verdicts:
        night = verdict.night
        words = Text(verdict.words, style="bold red" if verdict.is_alarm else "")
        table.add_row(f"{night.cutoff:%Y-%m-%d}", night.checkpoint_id[:8], words)
    return table


def figures_table(verdict: Verdict) -> Table:
    """Return the figures of a night beside what was expected of them."""
    title = Text(f"figures at {verdict.night.cutoff:%Y-%m-%d}")
    table = Table("figure", "value", "expected", "alarm below", "alarm above", title=title)
    for name, judged in verdict.judgement.figures.items():
        numbers = (judged.value, judged.expected, judged.low, judged.high)
        style = "bold red" if judged.is_alarm else ""
        shown = (f"{number:.4g}" if isfinite(number) else "" for number in numbers)
        table.add_row(Text(name, style), *shown)
    for name in sorted(verdict.night.figures.keys() - verdict.judgement.figures.keys()):
        table.add_row(Text(name), f"{verdict.night.figures[name]:.4g}", "", "", "")
    return table
