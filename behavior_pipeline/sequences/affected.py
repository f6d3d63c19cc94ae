"""Whom a night must tokenize anew: users whose events before the cutoff are not those of before.

A user's sequence depends on the vocabulary and on the user's events before the cutoff. Under the
same vocabulary it is that of an earlier folder unless the user was rebuilt since, or has an event
between the two cutoffs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import duckdb
import polars as pl
import pyarrow as pa

from behavior_pipeline.layers import EVENTS_FILE, USERS_FILE, Layers, bucket_file
from behavior_pipeline.sequences.reading import GONE, MANIFEST, touched_files
from behavior_pipeline.sequences.tokenization import EVENT_COLUMNS
from behavior_pipeline.settings import Settings
from behavior_pipeline.sql import fetch_one, open_engine, parquet, user_bucket
from behavior_pipeline.storage import Storage, read_json

MAX_AFFECTED_SHARE: Final = 0.3
"""A larger share of the users, and everybody is tokenized: that is then hardly dearer."""


@dataclass(frozen=True)
class Affected:
    """Users to tokenize anew on top of an earlier folder.

    Attributes:
        base: the earlier folder.
        users: `user_id`, `user_bucket`, and `is_known`: whether the base has the user.
        events: all their events before the cutoff, with `user_bucket`.
    """

    base: Path
    users: pl.DataFrame
    events: pl.DataFrame

    def of_bucket(self, bucket: int) -> tuple[pa.Array, pl.DataFrame]:
        """Return a bucket's users, and their events."""
        users = self.users.filter(user_bucket=bucket)["user_id"].to_arrow()
        return users.cast(pa.string()), self.events.filter(user_bucket=bucket)

    def num_known(self, bucket: int) -> int:
        """Count a bucket's users that the base has."""
        return int(self.users.filter(user_bucket=bucket)["is_known"].sum())


def find_affected(
    storage: Storage,
    settings: Settings,
    layers: Layers,
    wanted: Mapping[str, Any],
    earlier: Sequence[Path],
) -> Affected | None:
    """Find the best earlier folder and the users that it does not have as they are now.

    Args:
        storage: for scratch files.
        settings: memory and threads.
        layers: the events that count.
        wanted: the manifest of the folder to be.
        earlier: folders that may be built upon.

    Returns:
        None if everybody is to be tokenized: no folder will do, or too many users are affected.
    """
    base = _best(layers, wanted, earlier)
    if base is None:
        return None
    engine = open_engine(settings.memory_limit, settings.threads, storage.scratch / "spill")
    with engine as connection:
        known = read_json(base / MANIFEST)
        num_affected = _find_users(connection, layers, known, wanted)
        if num_affected > MAX_AFFECTED_SHARE * known["num_users"]:
            return None
        return Affected(base, _users(connection, layers, base), _events(connection, layers, wanted))


def _best(layers: Layers, wanted: Mapping[str, Any], earlier: Sequence[Path]) -> Path | None:
    """Return the folder with the nearest cutoff, the newest first, among those that will do."""
    found = []
    for folder in earlier:
        manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else None
        if manifest is not None and _will_do(layers, wanted, manifest):
            distance = abs(_time(manifest["cutoff"]) - _time(wanted["cutoff"]))
            found.append((distance, -manifest["version"], folder))
    return min(found)[2] if found else None


def _will_do(layers: Layers, wanted: Mapping[str, Any], manifest: Mapping[str, Any]) -> bool:
    """Tell whether the users changed since a folder was written are known, under the same ids."""
    same = ("vocabulary_id", "max_events", "base")
    return all(manifest.get(name) == wanted[name] for name in same) and (
        layers.users_files(manifest["version"]) is not None
    )


def _find_users(
    connection: duckdb.DuckDBPyConnection,
    layers: Layers,
    known: Mapping[str, Any],
    wanted: Mapping[str, Any],
) -> int:
    """Make the table `affected`; return how many users it has."""
    connection.execute("CREATE TABLE affected (user_id VARCHAR)")
    if files := layers.users_files(known["version"]):
        connection.execute(f"INSERT INTO affected SELECT DISTINCT user_id FROM {parquet(files)}")
    first, last = sorted((_time(known["cutoff"]), _time(wanted["cutoff"])))
    if first < last:
        connection.execute(
            f"INSERT INTO affected SELECT DISTINCT user_id FROM ({layers.relation()}) "
            "WHERE occurred_at >= $first AND occurred_at < $last "
            "AND user_id NOT IN (FROM affected)",
            {"first": first, "last": last},
        )
    return int(fetch_one(connection, "SELECT count(*) FROM affected")[0])


def _users(connection: duckdb.DuckDBPyConnection, layers: Layers, base: Path) -> pl.DataFrame:
    """Return the affected users, each with its bucket and whether the base has it."""
    bases = [base / bucket_file(bucket) for bucket in range(layers.num_buckets)]
    numbered = [(file, 0) for file in bases]
    for file in bases:
        numbered += [(each, int(each.name.split(".")[1])) for each in touched_files(file)]
    rows = " UNION ALL ".join(
        f"(SELECT user_id, num_events, {number} AS number FROM "
        f"{parquet([file])} SEMI JOIN affected USING (user_id))"
        for file, number in numbered
    )
    known = (
        f"SELECT user_id FROM ({rows}) GROUP BY user_id HAVING arg_max(num_events, number) > {GONE}"
    )
    bucket = user_bucket("affected.user_id", layers.num_buckets)
    return connection.execute(
        f"SELECT user_id, {bucket} AS user_bucket, user_id IN ({known}) AS is_known FROM affected"
    ).pl()


def _events(
    connection: duckdb.DuckDBPyConnection, layers: Layers, wanted: Mapping[str, Any]
) -> pl.DataFrame:
    """Return the affected users' events before the cutoff."""
    relation = _relation(connection, layers)
    columns = ", ".join((*EVENT_COLUMNS, "user_bucket"))
    return connection.execute(
        f"SELECT {columns} FROM ({relation}) WHERE user_id IN (FROM affected) "
        "AND occurred_at < $cutoff",
        {"cutoff": _time(wanted["cutoff"])},
    ).pl()


def _relation(connection: duckdb.DuckDBPyConnection, layers: Layers) -> str:
    """Return where the affected users' events are: the newest layer alone, if it has them all."""
    if not layers.layers:
        return layers.relation()
    newest = layers.layer_folder(layers.layers[-1])
    users = parquet([newest / USERS_FILE])
    missing = f"SELECT count(*) FROM affected WHERE user_id NOT IN (SELECT user_id FROM {users})"
    if fetch_one(connection, missing)[0]:
        return layers.relation()
    return f"FROM {parquet([newest / EVENTS_FILE])}"


def _time(text: str) -> datetime:
    """Read a cutoff."""
    return datetime.fromisoformat(text)
