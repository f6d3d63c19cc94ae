"""`erase`: users leave a home for ever."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

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

Users = Annotated[list[str] | None, typer.Argument(help="Ids, as events call the users.")]
File = Annotated[
    Path | None,
    typer.Option(
        "--file", help="Ids: a text file with one a line, or CSV or Parquet with a column user_id."
    ),
]


@shows_mistakes
def erase(
    users: Users = None, file: File = None, source: Source = None, data_root: DataRoot = None
) -> None:
    """Remove users from everything below a source's home, and keep them out for ever."""
    from behavior_pipeline.erasure.erase import erase as erase_users
    from behavior_pipeline.erasure.ids import read_ids
    from behavior_pipeline.progress import progress_bar

    pipeline = opened(given(source=source, data_root=data_root))
    ids = [*(users or []), *(read_ids(file) if file else [])]
    with progress_bar("erasing", console) as report:
        receipt = erase_users(pipeline, ids, report)
    console.print(_table(receipt))
    for line in receipt["not_covered"]:
        console.print(Text(f"Not covered: {line}."), soft_wrap=True)
    place = pipeline.storage.home / "erasures" / f"{receipt['id']}.json"
    console.print(f"The receipt: {place}", soft_wrap=True, markup=False)


def _table(receipt: dict[str, Any]) -> Table:
    """Show what went where."""
    table = Table(title=f"{receipt['num_users']:,} users erased", title_justify="left")
    table.add_column("place")
    table.add_column("rows", justify="right")
    for place, number in receipt["rows"].items():
        table.add_row(Text(place), f"{number:,}")
    return table


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(erase)
