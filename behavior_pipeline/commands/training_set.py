"""`behavior-pipeline training-set`: labels beside the features that were known at their moments."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from behavior_pipeline.commands.options import (
    DataRoot,
    Source,
    console,
    errors,
    given,
    opened,
    shows_mistakes,
)
from behavior_pipeline.errors import PipelineError

if TYPE_CHECKING:
    from behavior_pipeline.feature_store.training_set import TrainingSetSummary

Labels = Annotated[
    Path, typer.Option(help="Parquet or CSV: user_id, a column of moments, any labels.")
]
Out = Annotated[Path, typer.Option(help="Parquet file to write.")]
Service = Annotated[
    str | None, typer.Option(help="Feature service to join; training_set if nothing is named.")
]
Features = Annotated[
    list[str] | None, typer.Option(help="view:feature to join instead; may be repeated.")
]
TimeColumn = Annotated[str, typer.Option(help="Column of moments; UTC where it names no zone.")]
AsPublished = Annotated[
    bool, typer.Option("--as-published", help="Only values already written at the moment.")
]
OneCheckpoint = Annotated[
    bool, typer.Option("--one-checkpoint", help="Refuse vectors of several checkpoints.")
]


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command("training-set")(training_set)


@shows_mistakes
def training_set(
    labels: Labels,
    out: Out,
    service: Service = None,
    features: Features = None,
    time_column: TimeColumn = "event_timestamp",
    as_published: AsPublished = False,
    one_checkpoint: OneCheckpoint = False,
    source: Source = None,
    data_root: DataRoot = None,
) -> None:
    """Join labels with each user's features as they were known at the label's moment."""
    from behavior_pipeline.feature_store.training_set import SERVICE, write_training_set
    from behavior_pipeline.progress import progress_bar

    if service and features:
        raise PipelineError("--service and --features were both given.", "Give one of them.")
    pipeline = opened(given(source=source, data_root=data_root))
    with progress_bar("joining", console) as report:
        summary = write_training_set(
            pipeline.storage,
            labels,
            out,
            features or service or SERVICE,
            time_column=time_column,
            as_published=as_published,
            one_checkpoint=one_checkpoint,
            report=report,
        )
    _show(summary, out)


def _show(summary: TrainingSetSummary, out: Path) -> None:
    """Print what was found, and warn of what would mislead a model."""
    from behavior_pipeline.feature_store.training_set import in_words

    table = Table("view", "rows found", "written after their moment", "checkpoints")
    for view, counts in summary.views.items():
        found, later = f"{counts.num_found:,}", f"{counts.num_written_later:,}"
        table.add_row(view, found, later, Text(", ".join(sorted(counts.checkpoints))))
    console.print(table)
    console.print(f"{summary.num_rows:,} rows in {out}", soft_wrap=True, markup=False)
    for view, counts in summary.views.items():
        if counts.is_mixed:
            _warn(
                f"{view} holds rows of {len(counts.checkpoints)} checkpoints, whose vectors do not "
                f"compare: {in_words(counts.checkpoints)}. --one-checkpoint refuses that."
            )
    if any(counts.num_written_later for counts in summary.views.values()):
        _warn(
            "Some values were valid at their moments, but written later: production did not have "
            "them yet. --as-published leaves them out."
        )


def _warn(message: str) -> None:
    text = Text.assemble(("Warning:", "bold yellow"), " ", message)
    errors.print(text, highlight=False, soft_wrap=True)
