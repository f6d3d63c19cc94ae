"""CSV files and JSON lines, plain or gzip, as a relation of texts.

Values arrive as text, so that a broken one is quarantined by validation, not a crash. A file that
DuckDB refuses a line of is mended first (`mending.py`). DuckDB numbers no rows of a text, so where
numbers are needed the files are read in order and counted.
"""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

import duckdb
import pyarrow as pa

from behavior_pipeline.errors import PipelineError
from behavior_pipeline.ingest.mending import (
    LINE_DELIMITER,
    MalformedLine,
    mend_csv,
    mend_lines,
    open_text,
    printable,
)
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
from behavior_pipeline.sql import quote_text

_NO_ROW_NUMBER: Final = "NULL::BIGINT"
_DELIMITERS: Final = (",", ";", "\t", "|")
_QUOTE: Final = '"'
_GZIP_CHUNK: Final = 2**20
_CHUNK: Final = 10_000  # malformed lines held in Python at once
_READ_ERRORS: Final = (OSError, EOFError, zlib.error, csv.Error)
_HAS_CONTENT: Final = "trim(line, ' \t\r') <> ''"
_IS_OBJECT: Final = "CASE WHEN json_valid(line) THEN json_type(line) = 'OBJECT' ELSE false END"


@dataclass(frozen=True)
class _TextFile:
    """A CSV or JSON file as DuckDB can read it.

    Attributes:
        source_file: the user's file.
        read_path: the same, or its mended copy.
        header: names of the columns, empty for JSON.
        delimiter: between values.
        num_lines: rows to skip when numbering the file after this one (blank JSON lines count).
        num_rows: rows with content.
    """

    source_file: str
    read_path: str
    header: tuple[str, ...]
    delimiter: str
    num_lines: int
    num_rows: int

    @property
    def is_mended(self) -> bool:
        """Whether this is a copy without malformed lines."""
        return self.read_path != self.source_file


def open_csv(
    connection: duckdb.DuckDBPyConnection, path: str, files: list[str], scratch: Path
) -> Source:
    """Describe CSV files; files with unlike headers are read apart and joined by name."""
    texts = [_probe_csv(connection, file, scratch) for file in files]
    names = list(dict.fromkeys(name for text in texts for name in text.header))
    columns = number_columns(dict.fromkeys(names, "VARCHAR"))
    num_malformed = fetch_int(connection, f"SELECT count(*) FROM {MALFORMED_LINES}")
    groups: dict[tuple[tuple[str, ...], str, bool], list[_TextFile]] = {}
    for text in texts:
        groups.setdefault((text.header, text.delimiter, text.is_mended), []).append(text)
    plain, numbered = (
        " UNION ALL ".join(_csv_rows(group, names, is_numbered) for group in groups.values())
        for is_numbered in (False, True)
    )
    num_rows = sum(text.num_rows for text in texts)
    return Source(path, columns, num_rows, num_malformed, raw_object(columns), plain, numbered)


def _probe_csv(connection: duckdb.DuckDBPyConnection, file: str, scratch: Path) -> _TextFile:
    """Read a CSV file once: count its rows, or mend it where DuckDB refuses a line."""
    _check_gzip(file)
    header, delimiter, is_header_first = _csv_header(file)
    if is_header_first:
        try:
            num_rows = _count_csv(connection, file, len(header), delimiter)
            return _TextFile(file, file, header, delimiter, num_rows, num_rows)
        except duckdb.Error:  # some line is malformed: found, one by one, by mending
            pass
    copy = _copy_name(scratch, ".csv")
    lines = mend_csv(file, delimiter, len(header), copy)
    _keep_malformed(connection, file, lines)
    try:
        num_rows = _count_csv(connection, str(copy), len(header) + 1, ",")
    except duckdb.Error as error:
        raise unreadable(file, error) from None
    return _TextFile(file, str(copy), header, ",", num_rows, num_rows)


def _csv_header(file: str) -> tuple[tuple[str, ...], str, bool]:
    """Return a CSV file's column names, its delimiter, and whether they are its first line.

    The delimiter is the one, of comma, semicolon, tab and bar, that the header has most of.
    """
    try:
        with open_text(file) as text:
            blank, first = 0, text.readline()
            while first and not first.strip("\r\n"):
                blank, first = blank + 1, text.readline()
            delimiter = max(_DELIMITERS, key=first.count)
            rows = csv.reader([first, *islice(text, 20)], delimiter=delimiter)
            header = tuple(printable(name) for name in next(rows, []))
    except _READ_ERRORS as error:
        raise unreadable(file, error) from None
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise PipelineError(
            f"'{file}' has more than one column '{twice[0]}'.", "Rename one of them in the header."
        )
    if not header:
        raise no_data(file)
    return header, delimiter, blank == 0


def _csv_reader(files: list[str], num_columns: int, delimiter: str) -> str:
    """Return the SQL call that reads CSV files as the text columns `c0`, `c1` and so on."""
    columns = ", ".join(f"'c{index}': 'VARCHAR'" for index in range(num_columns))
    return (
        f"read_csv({sql_list(files)}, delim = {quote_text(delimiter)}, header = true, "
        f"quote = '{_QUOTE}', escape = '{_QUOTE}', auto_detect = false, "
        f"filename = 'source file', columns = {{{columns}}})"
    )


def _csv_rows(group: list[_TextFile], names: list[str], is_numbered: bool) -> str:
    """Return the relation of CSV files that share header and delimiter; mended ones are apart."""
    header, is_mended = group[0].header, group[0].is_mended
    place = {name: f"c{index + is_mended}" for index, name in enumerate(header)}
    reader = _csv_reader(
        [text.read_path for text in group], len(header) + is_mended, group[0].delimiter
    )
    values = ", ".join(
        f"{place.get(name, 'NULL::VARCHAR')} AS v{i}" for i, name in enumerate(names)
    )
    row_number = "c0::BIGINT" if is_mended else _NO_ROW_NUMBER
    rows = (
        f"SELECT {{file}} AS source_file, {{number}} AS row_number, false AS is_broken, "
        f"{values} FROM {{reader}}"
    )
    if not is_numbered:
        return rows.format(file='"source file"', number=row_number, reader=reader)
    number = row_number if is_mended else "place - num_before"
    return rows.format(file="original", number=number, reader=_in_order(reader, group))


def open_jsonl(
    connection: duckdb.DuckDBPyConnection, path: str, files: list[str], scratch: Path
) -> Source:
    """Describe files of JSON lines: their columns are all keys of all lines."""
    texts = [_probe_lines(connection, file, scratch) for file in files]
    reader = _line_reader([text.read_path for text in texts])
    keys = (
        f"SELECT DISTINCT unnest(CASE WHEN {_IS_OBJECT} THEN json_keys(line) END) AS key "
        f"FROM {reader} WHERE {_HAS_CONTENT} ORDER BY key"
    )
    names = [name for (name,) in connection.execute(keys).fetchall()]
    num_malformed = fetch_int(connection, f"SELECT count(*) FROM {MALFORMED_LINES}")
    plain, numbered = (
        _json_rows(texts, reader, names, is_numbered) for is_numbered in (False, True)
    )
    columns = number_columns(dict.fromkeys(names, "VARCHAR"))
    raw_row = "CASE WHEN is_broken THEN to_json(line)::VARCHAR ELSE line END"
    num_rows = sum(text.num_rows for text in texts)
    return Source(path, columns, num_rows, num_malformed, raw_row, plain, numbered)


def _probe_lines(connection: duckdb.DuckDBPyConnection, file: str, scratch: Path) -> _TextFile:
    """Read a text file once: count its lines, or mend it where DuckDB refuses one."""
    _check_gzip(file)
    query = f"SELECT count(*), count(*) FILTER ({_HAS_CONTENT}) FROM {{}}"
    try:
        counts = connection.execute(query.format(_line_reader([file]))).fetchone()
        return _TextFile(file, file, (), "", *(counts or (0, 0)))
    except duckdb.Error:  # a line that is no text: found by mending
        pass
    copy = _copy_name(scratch, ".jsonl")
    _keep_malformed(connection, file, mend_lines(file, copy))
    try:
        counts = connection.execute(query.format(_line_reader([str(copy)]))).fetchone()
    except duckdb.Error as error:
        raise unreadable(file, error) from None
    return _TextFile(file, str(copy), (), "", *(counts or (0, 0)))


def _line_reader(files: list[str]) -> str:
    """Return the SQL call that reads texts as one column `line`."""
    return (
        f"read_csv({sql_list(files)}, delim = {quote_text(LINE_DELIMITER)}, quote = '', "
        "escape = '', header = false, auto_detect = false, filename = 'source file', "
        "columns = {'line': 'VARCHAR'})"
    )


def _json_rows(texts: list[_TextFile], reader: str, names: list[str], is_numbered: bool) -> str:
    """Return the relation of JSON lines; a line that is no object has null values only."""
    pointers = ", ".join(quote_text(_pointer(name)) for name in names)
    values = "".join(f", fields[{i + 1}] AS v{i}" for i in range(len(names)))
    file, number = (
        ("original", "place - num_before") if is_numbered else ('"source file"', _NO_ROW_NUMBER)
    )
    lines = (
        f"SELECT {file} AS source_file, {number} AS row_number, line, {_IS_OBJECT} AS is_object "
        f"FROM {_in_order(reader, texts) if is_numbered else reader} WHERE {_HAS_CONTENT}"
    )
    fields = f"CASE WHEN is_object THEN json_extract_string(line, [{pointers}]::VARCHAR[]) END"
    return (
        f"SELECT source_file, row_number, NOT is_object AS is_broken, "
        f"line{values} "
        f"FROM (SELECT *, {fields} AS fields FROM ({lines}))"
    )


def _pointer(key: str) -> str:
    """Return the JSON pointer (RFC 6901) of a top-level key."""
    return "/" + key.replace("~", "~0").replace("/", "~1")


def _in_order(reader: str, texts: list[_TextFile]) -> str:
    """Return files read in order, with each row's place overall and the rows before its file.

    A window without an order numbers rows as they come and makes DuckDB read them one by one.
    """
    num_before, before = 0, []
    for text in texts:
        before.append(
            f"({quote_text(text.read_path)}, {quote_text(text.source_file)}, {num_before})"
        )
        num_before += text.num_lines
    return (
        f"(SELECT row_number() OVER () AS place, * FROM {reader}) AS counted "
        f"JOIN (VALUES {', '.join(before)}) AS files(read_path, original, num_before) "
        'ON counted."source file" = files.read_path'
    )


def _keep_malformed(
    connection: duckdb.DuckDBPyConnection, file: str, lines: Iterator[MalformedLine]
) -> None:
    """Put malformed lines into their table, a chunk at a time."""
    try:
        while chunk := list(islice(lines, _CHUNK)):
            _insert_malformed(connection, file, chunk)
    except _READ_ERRORS as error:
        raise unreadable(file, error) from None


def _insert_malformed(
    connection: duckdb.DuckDBPyConnection, file: str, lines: Iterable[MalformedLine]
) -> None:
    """Insert lines through Arrow; the raw text becomes a JSON string."""
    rows = [(line.row_number, line.reason, line.text) for line in lines]
    numbers, reasons, texts = (pa.array(values) for values in zip(*rows, strict=True))
    connection.register(
        "malformed_chunk", pa.table([numbers, reasons, texts], ["n", "reason", "t"])
    )
    connection.execute(
        f"INSERT INTO {MALFORMED_LINES} "
        "SELECT ?, n, reason, to_json(t)::VARCHAR FROM malformed_chunk",
        [file],
    )
    connection.unregister("malformed_chunk")


def _count_csv(
    connection: duckdb.DuckDBPyConnection, file: str, num_columns: int, delimiter: str
) -> int:
    """Count a CSV file's rows; every value is looked at, else DuckDB skips over bad UTF-8."""
    reader = _csv_reader([file], num_columns, delimiter)
    counts = connection.execute(f"SELECT count(*), count(COLUMNS(*)) FROM {reader}").fetchall()
    return int(counts[0][0])


def _check_gzip(file: str) -> None:
    """Read a gzip file to its checksum: DuckDB takes a truncated one for a shorter one."""
    if not file.lower().endswith(".gz"):
        return
    try:
        with gzip.open(file) as content:
            while content.read(_GZIP_CHUNK):
                pass
    except _READ_ERRORS as error:
        raise unreadable(file, error) from None


def _copy_name(scratch: Path, suffix: str) -> Path:
    """Return an unused name for a mended copy."""
    return scratch / f"{len(list(scratch.iterdir())):06}{suffix}"
