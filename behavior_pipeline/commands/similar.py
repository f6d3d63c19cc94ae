"""`behavior-pipeline similar USER`: the users whose embeddings are most like a user's."""

from __future__ import annotations

from typing import Annotated

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

Number = Annotated[int, typer.Option("-k", min=1, help="How many.")]
Exact = Annotated[bool, typer.Option("--exact", help="Compare with everyone now.")]


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(similar)


@shows_mistakes
def similar(
    user: str,
    num: Number = 10,
    exact: Exact = False,
    source: Source = None,
    data_root: DataRoot = None,
) -> None:
    """Show the users most like a user at the newest cutoff."""
    from behavior_pipeline.embeddings.similar_to import similar_to

    pipeline = opened(given(source=source, data_root=data_root))
    found = similar_to(pipeline.storage, user, num, is_exact=exact)
    facts = found.facts
    kind = "compared with everyone" if found.is_exact else f"recall about {facts.recall:.3f}"
    title = f"most like {user} at {facts.cutoff}, checkpoint {facts.checkpoint_id}, {kind}"
    console.print(Text(title))
    table = Table()
    table.add_column("user", overflow="fold")
    table.add_column("cosine", justify="right")
    for name, cosine in found.neighbors:
        table.add_row(Text(name), f"{cosine:.4f}")
    console.print(table)
    if not found.neighbors:
        console.print(f"{user} has no usable event, so nobody is known to be alike.", markup=False)
