"""The one way in: whatever place a path names, the load gets local files and the names of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import date
from pathlib import Path

from behavior_pipeline.errors import PipelineError
from behavior_pipeline.ingest.files import DATE_PLACE, RawFiles, find_files
from behavior_pipeline.ingest.places.addresses import place_of
from behavior_pipeline.ingest.places.duckdb_tables import fetch_duckdb, parse_duckdb
from behavior_pipeline.ingest.places.postgres_tables import fetch_postgres, parse_postgres
from behavior_pipeline.ingest.places.s3_objects import fetch_objects, parse_objects
from behavior_pipeline.progress import Report, report_nothing
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import make_private_folder

_PARSERS = {"duckdb": parse_duckdb, "postgres": parse_postgres, "s3": parse_objects}


def check_path(path: str) -> None:
    """Check what can be told from a path alone, before it is shown or stored anywhere.

    Raises:
        PipelineError: if the place is not known, or the path carries credentials.
    """
    place = place_of(path)
    if place != "files":
        _PARSERS[place](path)


def is_taken_whole(path: str) -> bool:
    """Tell whether the path itself says what arrived on a day, so that a night takes all of it."""
    if place_of(path) == "postgres":
        return parse_postgres(path).arrived_at is not None
    return DATE_PLACE in path


@contextmanager
def fetched(
    path: str,
    day: date | None,
    workspace: Path,
    settings: Settings,
    report: Report = report_nothing,
) -> Iterator[RawFiles]:
    """Yield the raw files of a path: local ones as they are, others as copies in `workspace`.

    A mistake that is found while they are in use names them as people know them, not the copies.

    Args:
        path: a local file, folder or glob, `file.duckdb::table`, `postgresql://…` or `s3://…`.
        day: takes the place of `{date}` and chooses the rows by `arrived_at`; None takes all.
        workspace: an existing folder; the copies stay in it.
        settings: memory and threads.
        report: told of objects and rows as they come.

    Raises:
        PipelineError: if there is nothing to read, or the place cannot be reached or read.
    """
    found = _fetch(path, day, workspace, settings, report)
    try:
        yield found
    except PipelineError as error:
        error.args = (_renamed(error.args[0], found.names),)
        error.way_out = _renamed(error.way_out, found.names)
        raise


def _fetch(
    path: str, day: date | None, workspace: Path, settings: Settings, report: Report
) -> RawFiles:
    """Return the raw files of a path, fetched where they are not local."""
    place = place_of(path)
    if place == "files":
        return find_files(path, day)
    folder = make_private_folder(workspace / "fetched")
    if place == "duckdb":
        return fetch_duckdb(path, day, folder, settings, report)
    if place == "postgres":
        return fetch_postgres(path, day, folder, report)
    return fetch_objects(path, day, folder, report)


def _renamed(text: str, names: Mapping[str, str]) -> str:
    """Return a message with the names that people know in place of the copies'."""
    for copy, name in names.items():
        text = text.replace(copy, name)
    return text
