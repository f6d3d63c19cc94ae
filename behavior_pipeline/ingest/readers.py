"""Raw files are opened here, each kind by its own reader; never whole in Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import duckdb

from behavior_pipeline.ingest.files import RawFiles
from behavior_pipeline.ingest.sources import (
    MALFORMED_LINES,
    Source,
    fetch_int,
    no_data,
    number_columns,
    raw_object,
    sql_list,
    unreadable,
)
from behavior_pipeline.ingest.text_readers import open_csv, open_jsonl
from behavior_pipeline.sql import quote_identifier


def open_source(connection: duckdb.DuckDBPyConnection, found: RawFiles, scratch: Path) -> Source:
    """Check that files can be read and return them as one relation.

    Args:
        connection: gets the temporary table `malformed_lines`.
        found: files of one kind.
        scratch: an existing folder for mended copies; keep it until loading is over.

    Raises:
        PipelineError: if a file is corrupt, or there is no data row at all.
    """
    connection.execute(
        f"CREATE OR REPLACE TEMP TABLE {MALFORMED_LINES} "
        "(source_file VARCHAR, row_number BIGINT, reason VARCHAR, raw_row VARCHAR)"
    )
    files = [file for file in found.files if Path(file).stat().st_size > 0]
    if not files:
        raise no_data(found.path)
    read = {"parquet": _open_parquet, "csv": open_csv, "jsonl": open_jsonl}[found.kind]
    source = read(connection, found.path, files, scratch)
    if source.num_rows + source.num_malformed == 0:
        raise no_data(found.path)
    return _known_by_name(connection, source, found.names) if found.names else source


def _known_by_name(
    connection: duckdb.DuckDBPyConnection, source: Source, names: Mapping[str, str]
) -> Source:
    """Let rows and malformed lines of copies name what was copied."""
    copies, addresses = list(names), list(names.values())
    connection.execute(
        "CREATE OR REPLACE TEMP TABLE addresses AS "
        "SELECT unnest(?::VARCHAR[]) AS copy, unnest(?::VARCHAR[]) AS address",
        [copies, addresses],
    )
    connection.execute(
        f"UPDATE {MALFORMED_LINES} SET source_file = address FROM addresses "
        "WHERE copy = source_file"
    )
    rows = (
        f"SELECT numbered.* REPLACE (address AS source_file) FROM ({source.numbered_rows}) "
        "AS numbered JOIN addresses ON copy = source_file"
    )
    return replace(source, numbered_rows=rows)


def _open_parquet(
    connection: duckdb.DuckDBPyConnection, path: str, files: list[str], _scratch: Path
) -> Source:
    """Describe Parquet files; columns that some files lack are null there."""
    num_rows = 0
    for file in files:
        try:
            query = "SELECT num_rows FROM parquet_file_metadata(?)"
            num_rows += fetch_int(connection, query, [file])
        except duckdb.Error as error:
            raise unreadable(file, error) from None
    reader = (
        f"read_parquet({sql_list(files)}, filename = 'source file', union_by_name = true, "
        "hive_partitioning = false)"
    )
    try:
        described = connection.execute(f"DESCRIBE SELECT * FROM {reader}").fetchall()
    except duckdb.Error as error:
        raise unreadable(path, error) from None
    types = {name: type_ for name, type_, *_ in described if name != "source file"}
    columns = number_columns(types)
    values = ", ".join(f"{quote_identifier(name)} AS v{i}" for i, name in enumerate(types))
    # a column of the file would hide DuckDB's own number of that name
    number = "NULL::BIGINT" if "file_row_number" in types else "file_row_number + 1"
    rows = (
        f'SELECT "source file" AS source_file, {number} AS row_number, '
        f"false AS is_broken, {values} FROM {reader}"
    )
    return Source(path, columns, num_rows, 0, raw_object(columns), rows, rows)
