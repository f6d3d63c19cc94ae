"""Reading labels, a chunk at a time, into the two columns that a point-in-time join needs.

Parquet or CSV with a column `user_id`, a column of moments and any others, which pass through.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pc_csv
import pyarrow.parquet as pq

from behavior_pipeline.contracts import TIMESTAMP
from behavior_pipeline.errors import PipelineError

USER: Final = "user_id"
CSV_ENDINGS: Final = (".csv", ".csv.gz")
CSV_BLOCK_BYTES: Final = 8 << 20  # the types of a CSV's columns are guessed from the first block
EARLIEST: Final = datetime(1678, 1, 1, tzinfo=UTC)
LATEST: Final = datetime(2262, 1, 1, tzinfo=UTC)
"""Moments lie in [EARLIEST, LATEST): beyond, Feast's nanoseconds overflow."""

_ZONE: Final = r"\d\d:\d\d.*(Z|[+-]\d\d(:?\d\d)?)$"
_TIME_HELP: Final = (
    "Write times as ISO 8601, such as 2011-11-09, 2011-11-09 08:00:00 or "
    "2011-11-09T08:00:00+01:00; without a zone they are UTC."
)


@dataclass(frozen=True)
class LabelFile:
    """A file of labels whose columns were looked at.

    Attributes:
        path: the file.
        time_column: holds the moments.
        columns: all columns, in order.
    """

    path: Path
    time_column: str
    columns: tuple[str, ...]

    @classmethod
    def open(cls, path: Path, time_column: str) -> LabelFile:
        """Look at a file's columns.

        Raises:
            PipelineError: if the file cannot be read, or lacks a column or has one twice.
        """
        if not path.is_file():
            raise PipelineError(f"There is no file {path}.", "Name a Parquet or CSV file.")
        with _readable(path):
            names = tuple(_schema(path, time_column).names)
        for needed in (USER, time_column):
            if needed not in names:
                raise PipelineError(
                    f"{path} lacks the column '{needed}'; it has {', '.join(names)}.",
                    "Name the column of moments with --time-column."
                    if needed == time_column
                    else "Rename the column that says who: it must be called user_id.",
                )
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise PipelineError(f"{path} has the column '{twice[0]}' twice.", "Rename one of them.")
        return cls(path, time_column, names)

    def chunks(self, num_rows: int) -> Iterator[pa.Table]:
        """Yield the file's rows in order, `num_rows` at a time; user and moment in our types.

        Raises:
            PipelineError: if a user is missing, or a moment is missing, unreadable or out of range;
                names file, row (1 for the first of the data) and column.
        """
        first_row = 1
        for chunk in _rechunked(self._batches(num_rows), num_rows):
            users = self._users(chunk[USER], first_row)
            moments = self._moments(chunk[self.time_column], first_row)
            yield _replaced(_replaced(chunk, USER, users), self.time_column, moments)
            first_row += chunk.num_rows

    def _batches(self, num_rows: int) -> Iterator[pa.RecordBatch]:
        with _readable(self.path):
            if _is_csv(self.path):
                with _open_csv(self.path, self.time_column) as reader:
                    yield from reader
            else:
                with pq.ParquetFile(self.path) as file:
                    yield from file.iter_batches(num_rows)

    def _users(self, column: pa.ChunkedArray, first_row: int) -> pa.ChunkedArray:
        """Return users as strings."""
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if not (_is_text(column.type) or pa.types.is_integer(column.type)):
            raise PipelineError(
                f"{self.path}: the column '{USER}' holds {column.type}, which is no id.",
                "Write user ids as text, exactly as in the events.",
            )
        users = column.cast(pa.string())
        self._refuse(pc.equal(pc.fill_null(users, ""), ""), first_row, USER, "there is no user")
        return users

    def _moments(self, column: pa.ChunkedArray, first_row: int) -> pa.ChunkedArray:
        """Return moments in the contract's type; what is finer than a microsecond is cut off."""
        name, missing = self.time_column, column.is_null()
        if _is_text(column.type):
            missing = pc.or_(missing, pc.equal(pc.fill_null(column, ""), ""))
        self._refuse(missing, first_row, name, "there is no time")
        if _is_text(column.type):
            moments = self._parsed(column, first_row)
        elif pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
            moments = self._cast(column, first_row)
        else:
            raise PipelineError(
                f"{self.path}: the column '{name}' holds {column.type}, which is no time.",
                _TIME_HELP,
            )
        is_outside = pc.or_(pc.less(moments, EARLIEST), pc.greater_equal(moments, LATEST))
        self._refuse(is_outside, first_row, name, f"the time lies outside {EARLIEST.year} to 2261")
        return moments

    def _cast(self, column: pa.ChunkedArray, first_row: int) -> pa.ChunkedArray:
        """Return timestamps or dates of any unit and zone as ours."""
        if pa.types.is_timestamp(column.type) and column.type.unit == "ns":
            column = pc.floor_temporal(column, unit="microsecond")
        try:
            return column.cast(TIMESTAMP)
        except pa.ArrowInvalid:
            row = first_row + (_first_failing(column, TIMESTAMP) or 0)
            raise self._mistake(row, self.time_column, "the time is out of range") from None

    def _parsed(self, column: pa.ChunkedArray, first_row: int) -> pa.ChunkedArray:
        """Return texts as moments: with their zone, or in UTC."""
        column = pc.utf8_trim_whitespace(column.cast(pa.string()))
        has_zone = pc.match_substring_regex(column, _ZONE)
        null = pa.scalar(None, pa.string())
        parts = (
            (pc.if_else(has_zone, column, null), TIMESTAMP),
            (pc.if_else(has_zone, null, column), pa.timestamp("us")),
        )
        try:
            zoned, plain = (part.cast(type_) for part, type_ in parts)
        except pa.ArrowInvalid:
            failing = [_first_failing(*part) for part in parts]
            row = min(row for row in failing if row is not None)
            value = column[row].as_py()
            raise self._mistake(
                first_row + row, self.time_column, f"'{value}' is no time"
            ) from None
        return pc.coalesce(zoned, plain.cast(TIMESTAMP))

    def _refuse(self, is_wrong: pa.ChunkedArray, first_row: int, column: str, what: str) -> None:
        """Name the first row that is wrong."""
        row = pc.index(is_wrong, value=True).as_py()
        if row >= 0:
            raise self._mistake(first_row + row, column, what)

    def _mistake(self, row: int, column: str, what: str) -> PipelineError:
        way_out = _TIME_HELP if column == self.time_column else "Fill it in, or drop the row."
        return PipelineError(f"{self.path}, row {row:,}, column '{column}': {what}.", way_out)


def _replaced(table: pa.Table, name: str, column: pa.ChunkedArray) -> pa.Table:
    """Return a table with another column under a name."""
    return table.set_column(table.column_names.index(name), name, column)


def _is_csv(path: Path) -> bool:
    return path.name.lower().endswith(CSV_ENDINGS)


def _is_text(type_: pa.DataType) -> bool:
    return bool(pa.types.is_string(type_) or pa.types.is_large_string(type_))


def _schema(path: Path, time_column: str) -> pa.Schema:
    if not _is_csv(path):
        return pq.read_schema(path)
    with _open_csv(path, time_column) as reader:
        return reader.schema


def _open_csv(path: Path, time_column: str) -> pc_csv.CSVStreamingReader:
    """Open a CSV; ids and times stay the texts that they are: 007 is not 7."""
    return pc_csv.open_csv(
        path,
        read_options=pc_csv.ReadOptions(block_size=CSV_BLOCK_BYTES, use_threads=False),
        convert_options=pc_csv.ConvertOptions(
            column_types={USER: pa.string(), time_column: pa.string()}
        ),
    )


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what Arrow says about a broken file into a message for its owner."""
    try:
        yield
    except pa.ArrowInvalid as error:
        kind = "CSV" if _is_csv(path) else "Parquet"
        raise PipelineError(
            f"{path} cannot be read as {kind}: {error}",
            "Mend the file; the types of a CSV's columns follow from its first rows, in Parquet "
            "they are certain."
            if _is_csv(path)
            else "Labels are Parquet, or CSV in a file that ends in .csv or .csv.gz.",
        ) from None


def _rechunked(batches: Iterable[pa.RecordBatch], num_rows: int) -> Iterator[pa.Table]:
    """Yield the rows of batches as tables of `num_rows`, the last of fewer."""
    waiting: list[pa.RecordBatch] = []
    for batch in batches:
        waiting.append(batch)
        if sum(part.num_rows for part in waiting) < num_rows:
            continue
        table = pa.Table.from_batches(waiting)
        whole = table.num_rows - table.num_rows % num_rows
        for start in range(0, whole, num_rows):
            yield table.slice(start, num_rows)
        waiting = table.slice(whole).to_batches()
    if any(part.num_rows for part in waiting):
        yield pa.Table.from_batches(waiting)


def _first_failing(column: pa.ChunkedArray, type_: pa.DataType) -> int | None:
    """Return the first row whose value does not become the type; None if all do."""
    for row, value in enumerate(column):
        try:
            value.cast(type_)
        except pa.ArrowInvalid:
            return row
    return None
