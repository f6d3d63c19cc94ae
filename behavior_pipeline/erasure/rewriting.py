"""Parquet files without some users: written aside and renamed, a row group at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from behavior_pipeline.storage import aside_of, writing_file

NEIGHBOURS: Final = "similar_user_ids"
"""Column with lists of other users: a row that names an erased one goes as well."""

_BATCH_ROWS: Final = 65_536
_NESTED: Final = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)

IsErased = Callable[[pa.Table], pa.ChunkedArray]
"""Rows (n,) to booleans: whether a row has to go."""


@dataclass(frozen=True)
class Affected:
    """A file with rows that have to go.

    Attributes:
        paths: its names; several if it is hard-linked.
        num_rows: rows that have to go.
    """

    paths: tuple[Path, ...]
    num_rows: int


def by_user(users: pa.Array) -> IsErased:
    """Return what finds rows of users, and rows that name them as neighbours."""

    def is_erased(table: pa.Table) -> pa.ChunkedArray:
        names = set(table.schema.names)
        found = pc.is_in(table["user_id"], value_set=users) if "user_id" in names else None
        if NEIGHBOURS in names:
            named = _names_any(table[NEIGHBOURS], users)
            found = named if found is None else pc.or_(found, named)
        return found

    return is_erased


def by_event(event_ids: pa.Array) -> IsErased:
    """Return what finds rows of events."""
    return lambda table: pc.is_in(table["event_id"], value_set=event_ids)


def find_affected(
    paths: Sequence[Path], columns: Sequence[str], is_erased: IsErased
) -> Iterator[Affected]:
    """Yield the files that have rows to go; a file with several names once.

    Args:
        paths: Parquet files.
        columns: that tell; files without any of them are passed over.
        is_erased: tells from these columns.
    """
    names: dict[tuple[int, int], list[Path]] = {}
    for path in paths:
        status = path.stat()
        names.setdefault((status.st_dev, status.st_ino), []).append(path)
    for same in names.values():
        if num_rows := _count(same[0], columns, is_erased):
            yield Affected(tuple(same), num_rows)


def _count(path: Path, columns: Sequence[str], is_erased: IsErased) -> int:
    """Count the rows of a file that have to go."""
    with pq.ParquetFile(path) as file:
        present = [name for name in columns if name in file.schema_arrow.names]
        if not present:
            return 0
        return sum(
            pc.sum(is_erased(pa.Table.from_batches([batch]))).as_py() or 0
            for batch in file.iter_batches(_BATCH_ROWS, columns=present)
        )


def rewrite(affected: Affected, is_erased: IsErased) -> None:
    """Write a file anew without the rows that have to go, under all its names.

    Row groups, order, schema and its metadata stay; each name is replaced in one rename.
    """
    first, *others = affected.paths
    with pq.ParquetFile(first) as file, writing_file(first) as aside:
        codec = _codec(file)
        with pq.ParquetWriter(aside, file.schema_arrow, compression=codec) as out:
            for number in range(file.num_row_groups):
                table = file.read_row_group(number)
                out.write_table(table.filter(pc.invert(is_erased(table))))
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
    named = pc.is_in(column.flatten(), value_set=users)
    rows = pc.list_parent_indices(column).filter(named).unique()
    places = pa.array(range(len(column)), rows.type)
    return pa.chunked_array([pc.is_in(places, value_set=rows)])
