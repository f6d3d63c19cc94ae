"""Sequence files as one stream per bucket: the base, with the users touched since in place.

A folder of sequences holds `bucket=<kkk>.parquet` for everybody, and in `touched/` any number of
`bucket=<kkk>.<nnn>.parquet` for users that were tokenized anew; the highest number counts. There, a
user without an event left has `num_events` -1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from behavior_pipeline.contracts import SEQUENCES
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.storage import read_json

MANIFEST: Final = "_sequences.json"  # readers of the folder as a data set pass over it
TOUCHED_FOLDER: Final = "touched"
GONE: Final = -1
"""`num_events` of a user who has no event before the cutoff any more."""


def sequence_files(folder: Path) -> list[Path]:
    """Return the bucket files of a folder's base, in order of buckets.

    Raises:
        PipelineError: if there are none.
    """
    files = sorted(folder.glob("bucket=*.parquet"))
    if not files:
        raise PipelineError(f"There are no sequences in {folder}.", "Tokenize that cutoff first.")
    return files


def touched_files(file: Path) -> list[Path]:
    """Return the files of touched users of a bucket, from old to new."""
    return sorted((file.parent / TOUCHED_FOLDER).glob(f"{file.stem}.*.parquet"))


def count_users(folder: Path) -> int:
    """Count the users of a folder, from what was recorded when it was written."""
    manifest = folder / MANIFEST
    if manifest.is_file():
        return int(read_json(manifest)["num_users"])
    return sum(pq.read_metadata(file).num_rows for file in sequence_files(folder))


def latest_event_at(folder: Path) -> datetime | None:
    """Return the time of the latest event behind a folder's tokens, None without any.

    Rows of users who were tokenized anew do not count: a later night may have left them.

    Raises:
        PipelineError: if there are no files.
    """
    latest: datetime | None = None
    for file in sequence_files(folder):
        for chunk in read_bucket(file, _MANY_USERS, ("user_id", "num_events", "last_event_at")):
            times = [pc.max(chunk["last_event_at"]).as_py(), latest]
            latest = max((time for time in times if time is not None), default=None)
    return latest


_MANY_USERS: Final = 1_000_000  # rows without lists are small


def read_bucket(
    file: Path, chunk_users: int, columns: Sequence[str] | None = None
) -> Iterator[pa.Table]:
    """Yield a bucket's users in order of `user_id`, so many of the base at a time.

    Every row is as of the folder's cutoff, also those that were tokenized at an earlier one and
    have no event since. All columns, or some with `user_id` and `num_events` among them.
    """
    cutoff = _cutoff(file.parent)
    touched = _newest(touched_files(file), columns)
    for chunk in _merged(file, touched, chunk_users, columns):
        table = chunk.filter(pc.field("num_events") >= 0) if touched is not None else chunk
        if len(table):
            yield _as_of(table, cutoff)


def _merged(
    file: Path, touched: pa.Table | None, chunk_users: int, columns: Sequence[str] | None
) -> Iterator[pa.Table]:
    """Yield the base with the touched users in place of theirs; both are in order of users."""
    taken = 0
    with pq.ParquetFile(file) as source:
        for batch in source.iter_batches(batch_size=chunk_users, columns=columns):
            chunk = pa.Table.from_batches([batch])
            if touched is None:
                yield chunk
                continue
            users = touched["user_id"]
            kept = chunk.filter(pc.invert(pc.is_in(chunk["user_id"], value_set=users)))
            last = chunk["user_id"][-1].as_py()
            end = taken + int(pc.sum(pc.less_equal(users.slice(taken), last)).as_py() or 0)
            yield pa.concat_tables([kept, touched.slice(taken, end - taken)]).sort_by("user_id")
            taken = end
    if touched is not None and taken < len(touched):
        yield touched.slice(taken)


def _newest(files: list[Path], columns: Sequence[str] | None) -> pa.Table | None:
    """Return the touched users of a bucket in order, each from the newest file that has it."""
    newest: pa.Table | None = None
    for file in files:
        table = pq.ParquetFile(file).read(columns)
        if newest is not None:
            older = newest.filter(
                pc.invert(pc.is_in(newest["user_id"], value_set=table["user_id"]))
            )
            table = pa.concat_tables([older, table])
        newest = table
    return None if newest is None else newest.sort_by("user_id").combine_chunks()


def _cutoff(folder: Path) -> datetime | None:
    """Return the cutoff of a folder, None if nothing is recorded of it."""
    manifest = folder / MANIFEST
    return datetime.fromisoformat(read_json(manifest)["cutoff"]) if manifest.is_file() else None


def _as_of(table: pa.Table, cutoff: datetime | None) -> pa.Table:
    """Put the cutoff into every row."""
    place = table.schema.get_field_index("observation_cutoff")
    if cutoff is None or place < 0:
        return table
    type_ = SEQUENCES.schema.field("observation_cutoff").type
    column = pa.repeat(pa.scalar(cutoff, type_), len(table))
    return table.set_column(place, SEQUENCES.schema.field("observation_cutoff"), column)
