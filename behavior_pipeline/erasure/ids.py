"""Files that list users."""

from __future__ import annotations

import csv
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from behavior_pipeline.errors import PipelineError

COLUMN = "user_id"


def read_ids(path: Path) -> list[str]:
    """Return the ids that a file lists: one a line, or in the column `user_id` of CSV or Parquet.

    Raises:
        PipelineError: if it cannot be read or has no such column.
    """
    try:
        if path.suffix == ".parquet":
            return _of_parquet(path)
        if path.suffix == ".csv":
            return _of_csv(path)
        return [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise PipelineError(f"The ids in '{path}' cannot be read: {error}.") from None


def _of_parquet(path: Path) -> list[str]:
    if COLUMN not in pq.read_schema(path).names:
        raise _no_column(path)
    column = pq.read_table(path, columns=[COLUMN])[COLUMN]
    return [value for value in column.cast(pa.string()).to_pylist() if value]


def _of_csv(path: Path) -> list[str]:
    with path.open(newline="") as lines:
        rows = csv.DictReader(lines)
        if COLUMN not in (rows.fieldnames or ()):
            raise _no_column(path)
        return [row[COLUMN] for row in rows if row[COLUMN]]


def _no_column(path: Path) -> PipelineError:
    return PipelineError(
        f"'{path}' has no column '{COLUMN}'.", "Name it so, or list one id a line in a .txt file."
    )
