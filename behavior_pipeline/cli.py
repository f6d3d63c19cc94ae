"""The command line: thin; every command runs the jobs that the Dagster UI shows, or a stage."""

from __future__ import annotations

from datetime import datetime
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from behavior_pipeline.commands import drift, erase, serve, similar, training_set, versions
from behavior_pipeline.commands.options import (
    Cutoff,
    DataRoot,
    Encoder,
    Full,
    Horizon,
    Lookback,
    RawPath,
    Seed,
    Source,
    Steps,
    console,
    given,
    opened,
    shows_mistakes,
)
from behavior_pipeline.windows import parse_cutoff

DEFAULT_GAPS = "10,15,20,25,30,40,50,60,75,90,120"

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Raw behavioural events become one embedding per user, every night.",
)
study = typer.Typer(no_args_is_help=True, help="Side rooms: nothing here feeds the nightly path.")
app.add_typer(study, name="study")


@app.command()
@shows_mistakes
def run(
    source: Source = None,
    path: RawPath = None,
    cutoff: Cutoff = None,
    data_root: DataRoot = None,
    horizon_days: Horizon = None,
    lookback_days: Lookback = None,
    seed: Seed = None,
    encoder_preset: Encoder = None,
    max_training_steps: Steps = None,
    full: Full = False,
) -> None:
    """Do everything: load the source, pretrain, embed, publish, compare with RFM.

    Without a cutoff, the latest one is taken whose label window lies inside the data.
    """
    overrides = given(
        source=source,
        path=path,
        data_root=data_root,
        horizon_days=horizon_days,
        lookback_days=lookback_days,
        seed=seed,
        encoder_preset=encoder_preset,
        max_training_steps=max_training_steps,
        published_rows="all" if full else None,
    )
    _work(overrides, cutoff, "pretraining_and_nightly")


@app.command()
@shows_mistakes
def nightly(
    cutoff: Annotated[str, typer.Option(help="Midnight UTC that ends the night's day.")],
    source: Source = None,
    path: RawPath = None,
    data_root: DataRoot = None,
    horizon_days: Horizon = None,
    lookback_days: Lookback = None,
    seed: Seed = None,
    full: Full = False,
) -> None:
    """Run one night: the day's arrivals become published embeddings, with the live checkpoint."""
    from behavior_pipeline.runs import arrive

    overrides = given(
        source=source,
        path=path,
        data_root=data_root,
        horizon_days=horizon_days,
        lookback_days=lookback_days,
        seed=seed,
        published_rows="all" if full else None,
    )
    night = arrive(overrides, parse_cutoff(cutoff), console)
    _show_comparison(night.pipeline.storage.reports(night.windows.cutoff))


@app.command()
@shows_mistakes
def pretrain(
    cutoff: Cutoff = None,
    source: Source = None,
    path: RawPath = None,
    data_root: DataRoot = None,
    horizon_days: Horizon = None,
    lookback_days: Lookback = None,
    seed: Seed = None,
    encoder_preset: Encoder = None,
    max_training_steps: Steps = None,
) -> None:
    """Train a new checkpoint that knows nothing after the night's train cutoff."""
    overrides = given(
        source=source,
        path=path,
        data_root=data_root,
        horizon_days=horizon_days,
        lookback_days=lookback_days,
        seed=seed,
        encoder_preset=encoder_preset,
        max_training_steps=max_training_steps,
    )
    _work(overrides, cutoff, "pretraining")


@app.command()
@shows_mistakes
def simulate(
    out: Annotated[Path, typer.Option(help="Folder to write Parquet files to.")],
    users: Annotated[int, typer.Option(min=1)] = 3000,
    days: Annotated[int, typer.Option(min=1)] = 180,
    events: Annotated[int | None, typer.Option(help="About so many events in all.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    start: Annotated[datetime, typer.Option(formats=["%Y-%m-%d"])] = datetime(2026, 1, 1),  # noqa: DTZ001 - a day
) -> None:
    """Write the events of a simulated shop: no evidence about real people."""
    from behavior_pipeline.ingest.simulator import simulate as write_simulation
    from behavior_pipeline.progress import progress_bar

    with progress_bar("simulating", console) as report:
        summary = write_simulation(out, users, days, seed, start.date(), events, report)
    console.print(
        f"{summary.num_events:,} simulated events of {summary.num_users:,} users in {out}",
        markup=False,
    )


@app.command()
@shows_mistakes
def lookup(user: str, source: Source = None, data_root: DataRoot = None) -> None:
    """Show what services read of a user from the online store."""
    from behavior_pipeline.feature_store.lookup import lookup as read_user

    pipeline = opened(given(source=source, data_root=data_root))
    features = read_user(pipeline.storage, user)
    table = Table(title=Text(f"user {user}"), title_justify="left")
    table.add_column("feature", overflow="fold")
    table.add_column("value", overflow="fold")
    for name, value in features.items():
        table.add_row(name, Text(_short(value)))
    console.print(table)


@app.command()
@shows_mistakes
def presets() -> None:
    """List the mapping presets that ship with the pipeline."""
    from behavior_pipeline.ingest.presets import load_preset, preset_names

    table = Table("preset", "horizon", "lookback", "what it maps")
    for name in preset_names():
        preset = load_preset(name)
        tasks = preset.tasks
        table.add_row(
            name, f"{tasks.horizon_days} d", f"{tasks.lookback_days} d", preset.description
        )
    console.print(table)


@app.command()
@shows_mistakes
def ui(
    port: Annotated[int, typer.Option(help="Port of the web page.")] = 3000,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    data_root: DataRoot = None,
) -> None:
    """Serve the Dagster UI with its daemon; stop it with Ctrl-C."""
    from behavior_pipeline.runs import serve
    from behavior_pipeline.settings import load_settings

    console.print(f"Dagster: http://{host}:{port}  (Ctrl-C stops it)")
    serve(load_settings(data_root=data_root), host, port)


@study.command()
@shows_mistakes
def sessions(
    session_column: Annotated[str, typer.Option(help="Column with the sessions to compare with.")],
    source: Source = None,
    path: RawPath = None,
    gaps: Annotated[str, typer.Option(help="Session gaps in minutes.")] = DEFAULT_GAPS,
    out: Annotated[Path | None, typer.Option(help="Markdown to put the table into.")] = None,
    picture: Annotated[Path | None, typer.Option(help="PNG to draw.")] = None,
    data_root: DataRoot = None,
) -> None:
    """Compare our sessions, under several gaps, with sessions that the source has."""
    from behavior_pipeline.progress import progress_bar
    from behavior_pipeline.studies import session_report
    from behavior_pipeline.studies.session_agreement import compare_sessions, parse_gaps

    minutes = parse_gaps(gaps)
    pipeline = opened(given(source=source, path=path, data_root=data_root))
    inputs = (pipeline.preset, pipeline.raw_path, session_column, minutes)
    with progress_bar("comparing sessions", console) as report:
        compared = compare_sessions(*inputs, pipeline.storage, pipeline.settings, report)
    console.print(session_report.study_table(compared))
    if out is not None:
        session_report.update_document(out, session_report.study_markdown(compared, inputs[1]))
    if picture is not None:
        session_report.draw_picture(compared, picture)


@app.command()
def version() -> None:
    """Print the version."""
    console.print(package_version("behavior-pipeline"))


versions.register(app)
erase.register(app)
training_set.register(app)
similar.register(app)
drift.register(app)
serve.register(app)


def main() -> None:
    """Run the command line."""
    app()


def _work(overrides: dict[str, Any], cutoff: str | None, job: str) -> None:
    """Execute a job for a cutoff and show its comparison, if it makes one."""
    from behavior_pipeline.runs import work

    settled = parse_cutoff(cutoff) if cutoff else None
    night = work(job, overrides, settled, console)
    if job != "pretraining":
        _show_comparison(night.pipeline.storage.reports(night.windows.cutoff))


def _show_comparison(folder: Path) -> None:
    """Print the comparison of a night and where its page is."""
    from behavior_pipeline.downstream.console import comparison_table
    from behavior_pipeline.storage import read_json

    console.print(comparison_table(read_json(folder / "comparison.json")))
    console.print(f"The whole report: {folder / 'report.html'}", soft_wrap=True, markup=False)


def _short(value: Any) -> str:
    """Write a feature's value on one line; a vector shows its beginning and its length."""
    if isinstance(value, list | tuple):
        if not value or isinstance(value[0], str):
            return ", ".join(value)
        start = ", ".join(f"{number:.4f}" for number in value[:4])
        return f"[{start}, …] ({len(value)} numbers)"
    return str(value)


if __name__ == "__main__":
    main()
