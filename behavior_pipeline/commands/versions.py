"""`versions`, `candidate`, `promote`, `rollback`: which checkpoint services read."""

from __future__ import annotations

import typer
from rich.table import Table
from rich.text import Text

from behavior_pipeline.commands.options import (
    Cutoff,
    DataRoot,
    Source,
    console,
    given,
    opened,
    shows_mistakes,
)
from behavior_pipeline.windows import parse_cutoff


@shows_mistakes
def versions(source: Source = None, data_root: DataRoot = None) -> None:
    """List the versions in the feature store: live, candidate, and those to return to."""
    from behavior_pipeline.feature_store.published import read_published
    from behavior_pipeline.feature_store.versions import read_versions

    storage = opened(given(source=source, data_root=data_root)).storage
    found = read_versions(storage)
    table = Table("version", "state", "checkpoint", "served cutoff", "promoted", "gates")
    for number, version in sorted(found.known.items()):
        view = read_published(storage, number).get("user_embedding")
        table.add_row(
            str(number),
            found.state_of(number),
            version.checkpoint_id or "none yet",
            (view and view.online_cutoff) or "none",
            (version.promoted_at or "")[:19],
            Text(_gates(version.gates, version.failed_gates)),
        )
    console.print(table)


def _gates(gates: dict[str, dict[str, object]], failed: list[str]) -> str:
    """Say in words what the gates found."""
    if not gates:
        return "none asked"
    return f"held back by {', '.join(failed)}" if failed else f"{len(gates)} passed"


@shows_mistakes
def candidate(cutoff: Cutoff = None, source: Source = None, data_root: DataRoot = None) -> None:
    """Embed a new checkpoint beside the live one, ask the gates, publish it as the candidate.

    Without a cutoff, that of the live version's newest night.
    """
    from behavior_pipeline.errors import PipelineError
    from behavior_pipeline.feature_store.published import newest_cutoff
    from behavior_pipeline.holding import holding
    from behavior_pipeline.runs import execute
    from behavior_pipeline.windows import partition_of

    overrides = given(source=source, data_root=data_root)
    storage = opened(overrides).storage
    settled = parse_cutoff(cutoff) if cutoff else newest_cutoff(storage)
    if settled is None:
        raise PipelineError(
            "Nothing was published yet.", "Run `behavior-pipeline run` for this source first."
        )
    with holding(storage):
        execute("candidate", partition_of(settled), overrides, console)
    versions(source=source, data_root=data_root)


@shows_mistakes
def promote(source: Source = None, data_root: DataRoot = None) -> None:
    """Let services read the candidate from now on, if every gate let it pass."""
    _change("promotion", source, data_root)


@shows_mistakes
def rollback(source: Source = None, data_root: DataRoot = None) -> None:
    """Let services read the version that was live before; nothing is embedded anew."""
    _change("rollback", source, data_root)


def _change(job: str, source: Source, data_root: DataRoot) -> None:
    """Run a job that changes what is live, and list the versions."""
    from behavior_pipeline.runs import change_version

    change_version(job, given(source=source, data_root=data_root), console)
    versions(source=source, data_root=data_root)


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in (versions, candidate, promote, rollback):
        app.command()(command)
