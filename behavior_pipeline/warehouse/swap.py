"""Builds a DuckDB file aside and puts it in place in one rename."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb

from behavior_pipeline.storage import Storage, aside_of, make_private_folder, writing_file


@contextmanager
def database_aside(storage: Storage, database: Path) -> Iterator[Path]:
    """Yield a path for a new version of a database, in a folder that is removed in the end.

    A folder, because DuckDB and dbt put files of their own beside the database. It is named so
    that `remove_leftovers` finds it after a kill.
    """
    folder = make_private_folder(aside_of(storage.scratch / database.name))
    try:
        yield folder.absolute() / database.name
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def swap_in(aside: Path, database: Path) -> None:
    """Put a finished database in place; whoever has the old one open keeps reading the old one."""
    with duckdb.connect(str(aside)) as connection:
        connection.execute("CHECKPOINT")  # nothing may be left in a log beside the file
    with writing_file(database) as target:
        aside.rename(target)
        # The log of someone who wrote to the old file must not be replayed on the new one.
        database.with_name(f"{database.name}.wal").unlink(missing_ok=True)
