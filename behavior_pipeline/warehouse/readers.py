"""Keeps what an open `analytics.duckdb` reads: its events lie in Parquet files beside it.

A file that was replaced keeps a second name for as long as somebody has it open, so that it can be
asked which Parquet it needs. DuckDB locks what it opens, also read-only, and the operating system
lets go of the lock when the reader ends, however it ends. Nothing is counted or timed: what no open
file needs is removed by the next build.
"""

from __future__ import annotations

import fcntl
import os
import re
from pathlib import Path
from typing import Final
from uuid import uuid4

import duckdb

from behavior_pipeline.storage import Storage, make_private_folder

_FOLDER: Final = re.compile(r"(?:base|layer)=\w+")


def keep_for_readers(storage: Storage) -> None:
    """Give the published file, which is about to be replaced, a second name if it is open."""
    remove_closed(storage)
    if storage.analytics.is_file() and _is_open(storage.analytics):
        folder = make_private_folder(storage.replaced_analytics)
        os.link(storage.analytics, folder / f"{uuid4().hex[:12]}.duckdb")


def remove_closed(storage: Storage) -> None:
    """Remove the second names of files that nobody has open any more."""
    for file in storage.replaced_analytics.glob("*.duckdb"):
        if not _is_open(file):
            file.unlink()


def folders_read(storage: Storage) -> set[str]:
    """Return the folders of sessionized events that the published file or an open one needs."""
    remove_closed(storage)
    files = [storage.analytics, *storage.replaced_analytics.glob("*.duckdb")]
    return {folder for file in files if file.is_file() for folder in _folders_of(file)}


def _folders_of(database: Path) -> set[str]:
    """Return the folders that the views of a database read."""
    with duckdb.connect(str(database), read_only=True) as connection:
        views = connection.execute("SELECT sql FROM duckdb_views() WHERE NOT internal").fetchall()
    return {folder for (sql,) in views for folder in _FOLDER.findall(sql)}


def _is_open(database: Path) -> bool:
    """Tell whether another process has a DuckDB file open."""
    with database.open("r+b") as handle:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False
