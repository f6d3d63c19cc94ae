"""The command that serves features over HTTP."""

from __future__ import annotations

from typing import Annotated

import typer

from behavior_pipeline.commands.options import (
    DataRoot,
    Source,
    console,
    given,
    opened,
    shows_mistakes,
)

PORT = 6566


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(serve)


@shows_mistakes
def serve(
    source: Source = None,
    data_root: DataRoot = None,
    port: Annotated[int, typer.Option(help="Port of the server.")] = PORT,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    workers: Annotated[int, typer.Option(min=1, help="Processes that answer.")] = 1,
) -> None:
    """Serve the published features with Feast's own server; stop it with Ctrl-C."""
    from behavior_pipeline.feature_store.serving import serve_features

    pipeline = opened(given(source=source, data_root=data_root))
    console.print(f"Features: http://{host}:{port}/get-online-features  (Ctrl-C stops it)")
    serve_features(pipeline.storage, host, port, workers)
