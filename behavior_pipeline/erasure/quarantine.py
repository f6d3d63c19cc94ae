"""Quarantined rows of users: found by what their raw text says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from behavior_pipeline.erasure.rewriting import Affected, Without
from behavior_pipeline.ingest.arrivals import QUARANTINE_FILE
from behavior_pipeline.ingest.presets import ColumnMapping
from behavior_pipeline.ingest.raw_rows import users_named
from behavior_pipeline.storage import Storage

_BATCH_ROWS: Final = 65_536


def quarantine_files(storage: Storage) -> list[Path]:
    """Return the files of all quarantined rows, of every load that lies there."""
    return sorted(storage.quarantine.rglob(f"*{QUARANTINE_FILE}"))


def find_quarantined(
    storage: Storage, mapping: ColumnMapping, users: frozenset[str]
) -> Iterator[Affected]:
    """Yield the files with rows that name one of the users."""
    for path in quarantine_files(storage):
        with pq.ParquetFile(path) as file:
            count = sum(
                pc.sum(_named(batch.column("raw_row"), mapping, users)).as_py() or 0
                for batch in file.iter_batches(_BATCH_ROWS, columns=["raw_row"])
            )
        if count:
            yield Affected((path,), count)


def without_quarantined(mapping: ColumnMapping, users: frozenset[str]) -> Without:
    """Return what takes these rows out of a table."""

    def without(table: pa.Table) -> pa.Table:
        return table.filter(pc.invert(_named(table["raw_row"], mapping, users)))

    return without


def _named(
    raw_rows: pa.Array | pa.ChunkedArray, mapping: ColumnMapping, users: frozenset[str]
) -> pa.Array:
    """Tell which raw rows (n,) name one of the users.

    An id may be written within a line that could not be read, with what elsewhere separates values.
    """
    return pa.array(
        [not users.isdisjoint(users_named(mapping, raw_row)) for raw_row in raw_rows.to_pylist()],
        pa.bool_(),
    )
