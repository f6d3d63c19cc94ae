"""Takes over a feature store from before there were versions: what it holds becomes version 1.

Every step looks whether it is due, so a kill between two is mended by the next opening.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Final

from behavior_pipeline.feature_store.published import PublishedView, read_published
from behavior_pipeline.feature_store.versions import (
    FIRST,
    VERSIONED,
    Version,
    Versions,
    versions_file,
    write_versions,
)
from behavior_pipeline.sql import quote_identifier
from behavior_pipeline.storage import Storage, make_private_folder, read_json, write_json

PROJECT: Final = "behavior_pipeline"


def upgrade(storage: Storage, online_file: Path) -> None:
    """Rename the history, the online tables and the records of views without a version.

    Args:
        storage: the home.
        online_file: Feast's SQLite file, which need not be there.
    """
    for view in VERSIONED:
        _move_history(storage.feature_store / "offline" / view)
    if online_file.exists():
        with closing(sqlite3.connect(online_file)) as connection, connection:
            for view in VERSIONED:
                _rename_table(connection, f"{PROJECT}_{view}")
    _rename_records(storage.feature_store / "published.json")
    _record_first(storage)


def _move_history(folder: Path) -> None:
    """Move the cutoffs of a view below version 1."""
    cutoffs = sorted(folder.glob("cutoff=*"))
    if cutoffs:
        first = make_private_folder(folder / f"v{FIRST}")
        for cutoff in cutoffs:
            cutoff.rename(first / cutoff.name)


def _rename_table(connection: sqlite3.Connection, name: str) -> None:
    """Let a view's table be that of version 1, unless there is one."""
    query = "select name from sqlite_master where type = 'table' and name in (?, ?)"
    new = f"{name}_v{FIRST}"
    if connection.execute(query, (name, new)).fetchall() == [(name,)]:
        connection.execute(
            f"alter table {quote_identifier(name)} rename to {quote_identifier(new)}"
        )


def _rename_records(path: Path) -> None:
    """Let the records of views be those of version 1."""
    content = read_json(path) if path.exists() else {}
    if any(view in content for view in VERSIONED):
        names = {view: f"{view}@v{FIRST}" for view in VERSIONED}
        write_json(path, {names.get(name, name): state for name, state in content.items()})


def _record_first(storage: Storage) -> None:
    """Bind version 1 to the checkpoint behind what it holds."""
    if versions_file(storage).exists():
        return
    cutoffs = read_published(storage, FIRST).get(VERSIONED[0], PublishedView()).cutoffs
    if cutoffs:
        newest = cutoffs[max(cutoffs)].checkpoint_id
        write_versions(storage, Versions(known={FIRST: Version(FIRST, newest)}))
