"""`erase`: users are removed from everything below a home, and kept out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from behavior_pipeline.commands.options import (
    DataRoot,
    Source,
    console,
    given,
    opened,
    shows_mistakes,
)
from behavior_pipeline.errors import PipelineError

Users = Annotated[list[str] | None, typer.Argument(help="Ids of users, as in the events.")]
File = Annotated[Path | None, typer.Option("--file", help="Text file with one id a line.")]


@shows_mistakes
def erase(
    users: Users = None, file: File = None, source: Source = None, data_root: DataRoot = None
) -> None:
    """Remove users from events, features, embeddings and stores; keep them out for ever."""
    from behavior_pipeline.erasure.erase import erase as erase_users
    from behavior_pipeline.progress import progress_bar

    storage = opened(given(source=source, data_root=data_root)).storage
    with progress_bar("erasing", console) as report:
        receipt = erase_users(storage, [*(users or []), *_listed(file)], report)
    table = Table("place", "rows removed", title=f"{len(receipt.user_hashes):,} users erased")
    for place, count in sorted(receipt.counts.items()):
        table.add_row(place, f"{count:,}")
    console.print(table)
    console.print("Not covered:")
    for words in receipt.not_covered:
        console.print(f"- {words}", markup=False)
    path = storage.home / "erasures" / f"{receipt.erasure_id}.json"
    console.print(f"The receipt: {path}", soft_wrap=True, markup=False)


def _listed(file: Path | None) -> list[str]:
    """Return the ids in a file, one a line; empty lines do not count."""
    if file is None:
        return []
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PipelineError(
            f"The list of users '{file}' cannot be read: {error}.",
            "Give a text file in UTF-8 with one id a line.",
        ) from None
    return [line.strip() for line in lines if line.strip()]


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(erase)
