"""Which place a path names, and what a message about it may say."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Final, Literal

from behavior_pipeline.errors import PipelineError

Place = Literal["files", "duckdb", "postgres", "s3"]

_SCHEMES: Final[dict[str, Place]] = {"postgresql": "postgres", "postgres": "postgres", "s3": "s3"}
_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
DUCKDB_FILE: Final = re.compile(
    r"(?P<file>.+\.(?:duckdb|ddb|db))(?:::(?P<table>.*))?", re.IGNORECASE | re.DOTALL
)
_NAME: Final = r'(?:"(?:[^"]|"")+"|[^".]+)'
_TABLE: Final = re.compile(rf"(?:(?P<schema>{_NAME})\.)?(?P<table>{_NAME})", re.DOTALL)
_SECRETS: Final = (
    "PGPASSWORD",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_ACCESS_KEY_ID",
)


@dataclass(frozen=True)
class TableName:
    """A table or a view, by names as the database has them."""

    schema: str
    table: str

    def __str__(self) -> str:
        """Return the name as people write it."""
        return f"{self.schema}.{self.table}"


def place_of(path: str) -> Place:
    """Return the place that a path names.

    Raises:
        PipelineError: for a scheme that is not known; the path is not repeated, for it may hold
            a password.
    """
    scheme = _SCHEME.match(path)
    if scheme is None:
        found = DUCKDB_FILE.fullmatch(path)
        is_folder = found is not None and found["table"] is None and Path(path).is_dir()
        return "duckdb" if found and not is_folder else "files"
    if scheme[1].lower() not in _SCHEMES:
        raise PipelineError(
            f"Events cannot be read from a place that begins with '{scheme[1]}://'.",
            "Known are local paths, file.duckdb::table, postgresql://… and s3://….",
        )
    return _SCHEMES[scheme[1].lower()]


def parse_table(text: str, default_schema: str) -> TableName | None:
    """Return the table of `schema.table` or `table`, or None where the text is neither.

    A name that holds a dot or a quote stands in double quotes, as in SQL.
    """
    found = _TABLE.fullmatch(text)
    if found is None:
        return None
    schema = found["schema"]
    return TableName(_unquoted(schema) if schema else default_schema, _unquoted(found["table"]))


def no_table(name: str, where: str, tables: Iterable[str]) -> PipelineError:
    """Return the error for a table that is not there, with the closest that are."""
    known = sorted(tables)
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"Did you mean '{close[0]}'? " if close else ""
    shown = ", ".join(known[:20]) + (", …" if len(known) > 20 else "")  # noqa: PLR2004 - one screen
    return PipelineError(
        f"There is no table or view '{name}' in '{where}'.",
        f"{hint}It shows: {shown or 'none'}.",
    )


def first_line(error: BaseException) -> str:
    """Return the first line of a library's message, without values of secrets."""
    lines = str(error).strip().splitlines()
    return without_secrets(lines[0] if lines else type(error).__name__)


def without_secrets(text: str) -> str:
    """Return a text in which no credential of the environment stands, whatever a server says."""
    for name in _SECRETS:
        if secret := os.environ.get(name):
            text = text.replace(secret, "***")
    return text


def is_disk_full(error: BaseException) -> bool:
    """Tell whether the copies found no room here, which is no fault of the place."""
    return isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}


def no_room(name: str, folder: Path) -> PipelineError:
    """Return the error for a disk that is too small for the copies."""
    return PipelineError(
        f"There is no room for a copy of '{name}' in '{folder}'.",
        "Free some, or choose another disk with --data-root.",
    )


def _unquoted(name: str) -> str:
    """Return a name without the double quotes around it."""
    return name[1:-1].replace('""', '"') if name.startswith('"') else name
