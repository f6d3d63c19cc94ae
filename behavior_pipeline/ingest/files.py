"""Which raw files a path means: a file, a folder or a glob, all of one kind, in sorted order."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Final, Literal

from behavior_pipeline.errors import NothingArrivedError, PipelineError

Kind = Literal["parquet", "csv", "jsonl"]

DATE_PLACE: Final = "{date}"
_SUFFIXES: Final[dict[str, Kind]] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "jsonl",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
}
_SUPPORTED: Final = (
    "Supported are .parquet, .csv, .tsv, .jsonl, .ndjson and .json, the texts also as .gz."
)
_HIDDEN_PREFIXES: Final = (".", "_")  # editors' leftovers, and markers such as _SUCCESS


@dataclass(frozen=True)
class RawFiles:
    """Files of one kind, sorted by path.

    Attributes:
        path: what the user gave, with the day put in.
        kind: how they are written.
        files: at least one.
        names: what people call a file that is a copy: its address elsewhere, by the file.
    """

    path: str
    kind: Kind
    files: tuple[str, ...]
    names: Mapping[str, str] = field(default_factory=dict)


def find_files(path: str, day: date | None = None) -> RawFiles:
    """Return the raw files that a file, a folder (searched recursively) or a glob stands for.

    `{date}` in the path becomes the day, or any text when there is no day (a bulk load).

    Raises:
        PipelineError: if nothing is there, a kind is not supported, or kinds are mixed.
    """
    pattern = put_day(path, day)
    candidates = _candidates(pattern)
    if not candidates:
        raise NothingArrivedError(
            f"There is no file, folder or match for '{pattern}'.",
            "Give --path the raw events: a file, a folder or a glob in quotes.",
            is_missing=True,
        )
    kind, files = of_one_kind(pattern, [str(file) for file in candidates])
    return RawFiles(pattern, kind, files)


def put_day(path: str, day: date | None) -> str:
    """Return a path with the day in the place of `{date}`, or any text when there is no day."""
    return path.replace(DATE_PLACE, f"{day:%Y-%m-%d}" if day else "*")


def of_one_kind(path: str, names: Iterable[str]) -> tuple[Kind, tuple[str, ...]]:
    """Return the kind of files and those that are of it, sorted; others are left out.

    Args:
        path: what the user gave, for messages.
        names: paths or addresses, at least one.

    Raises:
        PipelineError: if none is of a supported kind, or kinds are mixed.
    """
    kinds = {name: kind for name in names if (kind := _kind_of(name))}
    if not kinds:
        raise PipelineError(f"'{next(iter(names))}' is not of a supported kind.", _SUPPORTED)
    _refuse_mixed(path, kinds)
    return next(iter(kinds.values())), tuple(sorted(kinds))


def is_hidden(name: str) -> bool:
    """Tell what editors and engines leave beside the data."""
    return name.startswith(_HIDDEN_PREFIXES)


def _kind_of(path: str) -> Kind | None:
    """Return the kind that a file's name says, or None where it is not supported."""
    name = Path(path).name.lower()
    plain = name.removesuffix(".gz")
    kind = _SUFFIXES.get(Path(plain).suffix)
    return None if kind == "parquet" and plain != name else kind


def _candidates(pattern: str) -> list[Path]:
    """Return all files behind a pattern; folders in it are searched, hidden files left out."""
    matches = [Path(pattern)] if Path(pattern).exists() else _glob(pattern)
    files: list[Path] = []
    for match in matches:
        if match.is_dir():
            files += [found for found in match.rglob("*") if _is_visible_file(found, match)]
        else:
            files.append(match)
    if matches and not files:
        raise PipelineError(f"The folder '{pattern}' holds no files.", _SUPPORTED)
    return files


def _glob(pattern: str) -> list[Path]:
    """Return what matches a glob, `**` included."""
    # pathlib cannot glob an absolute pattern, nor match a pattern without naming its root
    names = glob.glob(pattern, recursive=True)  # noqa: PTH207 - see above
    return [Path(name) for name in sorted(names)]


def _is_visible_file(file: Path, folder: Path) -> bool:
    """Tell data from what editors and engines leave beside it."""
    parts = file.relative_to(folder).parts
    return file.is_file() and not any(is_hidden(part) for part in parts)


def _refuse_mixed(pattern: str, kinds: dict[str, Kind]) -> None:
    """Refuse a folder that holds, say, the same events once as CSV and once as Parquet."""
    names = sorted(set(kinds.values()))
    if len(names) > 1:
        examples = ", ".join(
            f"{name} (such as {next(file for file, kind in sorted(kinds.items()) if kind == name)})"
            for name in names
        )
        raise PipelineError(
            f"'{pattern}' mixes kinds of files: {examples}.",
            "Load one kind at a time, for instance with a glob such as 'folder/*.parquet'.",
        )
