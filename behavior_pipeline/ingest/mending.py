"""Files with malformed lines: a clean copy for DuckDB, and the malformed lines for quarantine.

DuckDB stops at a malformed line, or swallows its neighbors (a quote that is never closed takes
everything after it). So a text file that it refuses is read once here, line by line: good rows go
to a copy with their row numbers, malformed ones are handed over with their text, and no
malformed line costs another row.
"""

from __future__ import annotations

import csv
import gzip
import io
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final, cast

LINE_DELIMITER: Final = "\x01"  # JSON forbids it inside a line, so each line is one column
MAX_LINES_PER_ROW: Final = 200  # a quoted value that spans more lines is an open quote
MAX_LINE_BYTES: Final = 2_000_000  # DuckDB reads no longer ones


@dataclass(frozen=True)
class MalformedLine:
    """A line that is no row.

    Attributes:
        row_number: its place among the file's rows, from 1.
        reason: what is wrong with it, in words.
        text: the line as it stands in the file.
    """

    row_number: int
    reason: str
    text: str


@dataclass(frozen=True)
class _Row:
    """A well-formed row of a CSV file."""

    row_number: int
    values: list[str]


@contextmanager
def open_text(path: str) -> Iterator[IO[str]]:
    """Open a plain or gzip text; bytes that are not UTF-8 become lone surrogates."""
    opened = gzip.open if path.lower().endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        yield cast("IO[str]", text)


def printable(text: str) -> str:
    """Replace bytes that were not UTF-8 by question marks in a diamond."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def mend_csv(path: str, delimiter: str, num_columns: int, copy: Path) -> Iterator[MalformedLine]:
    """Write a CSV file's good rows to `copy`, each behind its row number; yield the others.

    The copy has the row number as its first column, a header line, commas and line feeds.
    """
    csv.field_size_limit(MAX_LINE_BYTES)
    with open_text(path) as text, copy.open("w", encoding="utf-8", newline="") as target:
        writer = csv.writer(target, lineterminator="\n")
        writer.writerow(["row_number", *(f"c{index}" for index in range(num_columns))])
        for row in _csv_rows(text, delimiter, num_columns):
            if isinstance(row, MalformedLine):
                yield row
            else:
                writer.writerow([row.row_number, *row.values])


def mend_lines(path: str, copy: Path) -> Iterator[MalformedLine]:
    """Copy a text's lines that DuckDB can read, a blank line for each other; yield the others."""
    with open_text(path) as text, copy.open("w", encoding="utf-8", newline="") as target:
        for row_number, line in enumerate(text, 1):
            reason = _unreadable(line) or (
                "line holds a control character" if LINE_DELIMITER in line else None
            )
            if reason:
                yield MalformedLine(row_number, reason, printable(line.rstrip("\r\n")))
            target.write("\n" if reason else line.rstrip("\r\n") + "\n")


def _csv_rows(
    lines: Iterable[str], delimiter: str, num_columns: int
) -> Iterator[_Row | MalformedLine]:
    """Yield the rows behind the header; a malformed one takes one line, never its neighbors."""
    ahead: deque[str] = deque()
    source = iter(lines)
    row_number = -1  # the header becomes row 0
    while (line := _next_line(ahead, source)) is not None:
        if not line.strip("\r\n"):
            continue
        row_number += 1
        text = _with_continuation(line, ahead, source, delimiter, num_columns)
        values, reason = _parse_row(text, delimiter, num_columns)
        if row_number == 0:
            continue
        if reason:
            yield MalformedLine(row_number, reason, printable(text.rstrip("\r\n")))
        else:
            yield _Row(row_number, values)


def _next_line(ahead: deque[str], source: Iterator[str]) -> str | None:
    """Take a line that was looked at before, or a new one."""
    return ahead.popleft() if ahead else next(source, None)


def _with_continuation(
    line: str, ahead: deque[str], source: Iterator[str], delimiter: str, num_columns: int
) -> str:
    """Join the lines of a quoted value that holds line ends; else leave the line alone."""
    num_quotes = line.count('"')
    taken = [line]
    while num_quotes % 2 and len(taken) < MAX_LINES_PER_ROW:
        more = _next_line(ahead, source)
        if more is None:
            break
        taken.append(more)
        num_quotes += more.count('"')
    if len(taken) == 1 or _parse_row("".join(taken), delimiter, num_columns)[1] is None:
        return "".join(taken)
    ahead.extendleft(reversed(taken[1:]))
    return line


def _parse_row(text: str, delimiter: str, num_columns: int) -> tuple[list[str], str | None]:
    """Return a row's values, and what is wrong with it, if anything."""
    if reason := _unreadable(text):
        return [], reason
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except csv.Error:
        return [], "line has a broken quote"
    if len(rows) != 1 or len(rows[0]) != num_columns:
        return [], f"line has {len(rows[0])} values instead of {num_columns}"
    return rows[0], None


def _unreadable(text: str) -> str | None:
    """Say why a text cannot be read at all: length or encoding."""
    if len(text.encode("utf-8", "surrogateescape")) > MAX_LINE_BYTES:
        return "line is too long"
    return "line is not UTF-8" if printable(text) != text else None
