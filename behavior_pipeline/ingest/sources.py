"""What raw files look like to the rest of the room: one DuckDB relation, whatever their kind.

A relation has `source_file`, `row_number`, `is_broken` (a JSON line that is no object) and the
source's columns as `v0`, `v1`, …: so no name in a file can clash with another or be read as SQL.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

import duckdb

from behavior_pipeline.errors import NothingArrivedError, PipelineError
from behavior_pipeline.sql import quote_text

MALFORMED_LINES: Final = "malformed_lines"
"""Temporary table of lines that are no rows: source_file, row_number, reason, raw_row (JSON)."""


@dataclass(frozen=True)
class SourceColumn:
    """A column of the source: its SQL expression in the relation and its DuckDB type."""

    expression: str
    type: str


@dataclass(frozen=True)
class Source:
    """Raw files that were found readable.

    Attributes:
        path: what the user gave.
        columns: by name in the file, in the file's order.
        num_rows: well-formed rows, counted apart from loading.
        num_malformed: lines that are no rows, in the table `malformed_lines`.
        raw_row: SQL over the relation: the whole row as JSON. Apart, because it costs more than all
            else and only quarantined rows need it.
        plain_rows: SQL of the relation without row numbers, for parallel reading; `source_file` is
            then the file that is read, which may be a copy.
        numbered_rows: the same with row numbers; CSV and JSON are then read in order.
    """

    path: str
    columns: dict[str, SourceColumn]
    num_rows: int
    num_malformed: int
    raw_row: str
    plain_rows: str
    numbered_rows: str


def number_columns(types: dict[str, str]) -> dict[str, SourceColumn]:
    """Name the columns of the relation `v0`, `v1`, … in the file's order."""
    return {name: SourceColumn(f"v{i}", type_) for i, (name, type_) in enumerate(types.items())}


def raw_object(columns: dict[str, SourceColumn]) -> str:
    """Return SQL for a whole row as a JSON object."""
    arguments = ", ".join(
        f"{quote_text(name)}, {column.expression}" for name, column in columns.items()
    )
    return f"json_object({arguments})::VARCHAR"


def fetch_int(
    connection: duckdb.DuckDBPyConnection, query: str, values: list[object] | None = None
) -> int:
    """Return the one number that a query answers."""
    ((number,),) = connection.execute(query, values or []).fetchall()
    return int(number)


def sql_list(files: list[str]) -> str:
    """Return a SQL list of paths; glob characters in a file's own name stay characters."""
    literal = (re.sub(r"([*?\[])", r"[\1]", file) for file in files)
    return "[" + ", ".join(quote_text(file) for file in literal) + "]"


def unreadable(file: str, error: BaseException) -> PipelineError:
    """Return the error for a file that is corrupt."""
    reason = str(error).strip().splitlines()
    return PipelineError(
        f"'{file}' cannot be read: {reason[0] if reason else type(error).__name__}",
        "Check that the file is complete and of the kind that its name says.",
    )


def no_data(path: str) -> NothingArrivedError:
    """Return the error for a source without a data row."""
    return NothingArrivedError(
        f"'{path}' is empty: it holds no data rows.", "Check how it was exported."
    )
