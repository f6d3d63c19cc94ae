"""Parquet files without some users: written aside and renamed, a row group at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from behavior_pipeline.storage import aside_of, writing_file

NEIGHBORS: Final = "similar_user_ids"
"""Column with lists of other users: erased ones leave the lists, the rows stay."""

SCORES: Final = "similarities"
"""Column with a number for each of them."""

NANOSECONDS: Final = 1_000_000_000
_BATCH_ROWS: Final = 65_536

Without = Callable[[pa.Table], pa.Table]
"""Returns rows as they are afterwards: some of them gone, or shorter lists in them."""


@dataclass(frozen=True)
class Affected:
    """A file that has to be written anew.

    Attributes:
        paths: its names; several if it is hard-linked.
        num_rows: rows that go, and rows whose lists get shorter.
    """

    paths: tuple[Path, ...]
    num_rows: int


@dataclass(frozen=True)
class Removal:
    """What goes from a file.

    Attributes:
        column: tells which rows go.
        values: of that column.
    """

    column: str
    values: pa.Array

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that tell whether a file is affected."""
        return (self.column, NEIGHBORS) if self.column == "user_id" else (self.column,)

    def named(self, table: pa.Table) -> pa.ChunkedArray:
        """Tell of rows (n,) whether they go, or their lists get shorter."""
        gone = pa.chunked_array([pa.repeat(pa.scalar(value=False), table.num_rows)])
        if self.column in table.schema.names:
            gone = pc.is_in(table[self.column], value_set=self.values)
        if NEIGHBORS in table.schema.names and NEIGHBORS in self.columns:
            gone = pc.or_(gone, _names_any(table[NEIGHBORS], self.values))
        return gone

    def count(self, table: pa.Table) -> int:
        """Count the rows that are not as they were afterwards."""
        return pc.sum(self.named(table)).as_py() or 0

    def without(self, table: pa.Table) -> pa.Table:
        """Return the rows that stay, without the users in lists."""
        if self.column in table.schema.names:
            gone = pc.is_in(table[self.column], value_set=self.values)
            table = table.filter(pc.invert(gone))
        if NEIGHBORS in table.schema.names and NEIGHBORS in self.columns:
            table = _shortened(table, self.values)
        return table


def find_affected(paths: Sequence[Path], removal: Removal) -> Iterator[Affected]:
    """Yield the files that something goes from; a file with several names once."""
    names: dict[tuple[int, int], list[Path]] = {}
    for path in paths:
        status = path.stat()
        names.setdefault((status.st_dev, status.st_ino), []).append(path)
    for same in names.values():
        if num_rows := _count(same[0], removal):
            yield Affected(tuple(same), num_rows)


def _count(path: Path, removal: Removal) -> int:
    """Count what goes from a file; its other columns are not read."""
    with pq.ParquetFile(path) as file:
        present = [name for name in removal.columns if name in file.schema_arrow.names]
        if not present:
            return 0
        batches = file.iter_batches(_BATCH_ROWS, columns=present)
        return sum(removal.count(pa.Table.from_batches([batch])) for batch in batches)


def rewrite(affected: Affected, without: Without) -> None:
    """Write a file anew, a row group at a time, and put it in place under all its names.

    Row groups, order, compression, schema and metadata stay. So does the time of the file, but for
    a second: of rows that do not say when they were written, it does. To the second it must be
    another, or a DuckDB that is reading mixes what it has cached of the old file with the new one.
    Each name is replaced in one rename.
    """
    first, *others = affected.paths
    status = first.stat()
    with pq.ParquetFile(first) as file, writing_file(first) as aside:
        schema = file.schema_arrow
        known = file.metadata.metadata or {}
        is_arrow = b"ARROW:schema" in known
        with pq.ParquetWriter(
            aside, schema, compression=_codec(file), store_schema=is_arrow
        ) as out:
            for number in range(file.num_row_groups):
                left = without(file.read_row_group(number))
                out.write_table(left, row_group_size=max(left.num_rows, 1))
        os.utime(aside, ns=(status.st_atime_ns, status.st_mtime_ns + NANOSECONDS))
    for other in others:
        link = aside_of(other)
        os.link(first, link)
        link.replace(other)


def _codec(file: pq.ParquetFile) -> str:
    """Return how a file is compressed."""
    if file.num_row_groups == 0 or file.metadata.row_group(0).num_columns == 0:
        return "zstd"
    name: str = file.metadata.row_group(0).column(0).compression
    return "none" if name == "UNCOMPRESSED" else name.lower()


def _names_any(lists: pa.ChunkedArray, users: pa.Array) -> pa.ChunkedArray:
    """Tell which lists (n,) name one of the users."""
    column = lists.combine_chunks()
    named = pc.is_in(pc.list_flatten(column), value_set=users)
    rows = pc.list_parent_indices(column).filter(named).unique()
    places = pa.array(range(len(column)), rows.type)
    return pa.chunked_array([pc.is_in(places, value_set=rows)])


def _shortened(table: pa.Table, users: pa.Array) -> pa.Table:
    """Take users out of the lists of neighbours, and their scores with them."""
    neighbors = table[NEIGHBORS].combine_chunks()
    is_left = pc.invert(pc.is_in(pc.list_flatten(neighbors), value_set=users))
    rows = pc.list_parent_indices(neighbors).filter(is_left).to_numpy()
    counts = np.bincount(rows, minlength=len(neighbors))
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())
    for name in (NEIGHBORS, SCORES):
        place = table.schema.get_field_index(name)
        field = table.schema.field(place)
        values = pc.list_flatten(table[name].combine_chunks()).filter(is_left)
        mask = table[name].combine_chunks().is_null()
        lists = pa.ListArray.from_arrays(offsets, values, mask=mask).cast(field.type)
        table = table.set_column(place, field, lists)
    return table
