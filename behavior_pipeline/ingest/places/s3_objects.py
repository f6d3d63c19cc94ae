"""Objects of S3 and of what speaks its language, copied in chunks by Arrow's own client.

DuckDB would need an extension for this, which it cannot fetch where no network but the bucket is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, Final

import pyarrow as pa

from behavior_pipeline.errors import NothingArrivedError, PipelineError
from behavior_pipeline.ingest.files import RawFiles, is_hidden, of_one_kind, put_day
from behavior_pipeline.ingest.places.addresses import first_line, is_disk_full, no_room
from behavior_pipeline.progress import Report

_CHUNK_BYTES: Final = 8 * 2**20
_NUM_CONNECTIONS: Final = 4
_CONNECT_SECONDS: Final = 10
_REQUEST_SECONDS: Final = 60
_NUM_ATTEMPTS: Final = 3

_BUCKET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]+")
_CREDENTIAL: Final = re.compile(
    r"[?&][a-z_-]*(?:key|secret|token|signature|credential|password)[a-z_-]*=", re.IGNORECASE
)
_AWS_REASON: Final = re.compile(r"AWS Error (\S+).*? operation: (.*?)(?: \(Request ID.*)?$")
_WAY_OUT: Final = (
    "Check the path, AWS_ENDPOINT_URL and AWS_REGION, and that the credentials of the environment "
    "may list and read there."
)


@dataclass(frozen=True)
class Objects:
    """Where objects are: a bucket and a key, a folder of keys or a glob."""

    bucket: str
    key: str


def parse_objects(path: str) -> Objects:
    """Return the bucket and the key that a path names.

    Raises:
        PipelineError: if there is no bucket's name, or if credentials stand there. The path is
            not repeated then.
    """
    bucket, _, key = path[len("s3://") :].partition("/")
    if not _BUCKET.fullmatch(bucket) or _CREDENTIAL.search(path):
        raise PipelineError(
            "The s3:// path must begin with the name of a bucket and carry no credentials.",
            "Write s3://bucket/folder/*.parquet. The environment has the rest: AWS_ACCESS_KEY_ID "
            "and AWS_SECRET_ACCESS_KEY (or a profile or a role), AWS_REGION, AWS_ENDPOINT_URL.",
        )
    return Objects(bucket, key.strip("/"))


def fetch_objects(path: str, day: date | None, folder: Path, report: Report) -> RawFiles:
    """Copy the objects that a path names, a few at a time and each in chunks.

    Args:
        path: `s3://bucket/…`: an object, a folder or a glob; `{date}` in it stands for the day.
        day: the night's day, or None for all.
        folder: gets the copies.
        report: told of each object.

    Raises:
        PipelineError: if nothing is there, or it cannot be listed or read.
    """
    pattern = put_day(path, day)
    wanted = parse_objects(pattern)
    with _explaining(pattern, folder):
        store = _open_store(wanted.bucket)
        sizes = _list(store, wanted)
    if not sizes:
        raise NothingArrivedError(
            f"There is no object, folder or match for '{pattern}'.",
            "Give the path of an object or a folder, or a glob such as s3://bucket/folder/*.csv.",
            is_missing=True,
        )
    kind, chosen = of_one_kind(pattern, sizes)
    copies = {str(folder / f"{i:06}{_suffix(name)}"): name for i, name in enumerate(chosen)}
    _copy_all(store, copies, sizes, report)
    return RawFiles(pattern, kind, tuple(copies), copies)


def _open_store(bucket: str) -> Any:
    """Return the file system of the environment's endpoint, region and credentials."""
    try:
        from pyarrow import fs  # noqa: PLC0415 - not every build of Arrow has it

        make = fs.S3FileSystem
    except ImportError:
        raise PipelineError(
            "This build of pyarrow reads no S3.", "Install pyarrow's own wheel: pip install pyarrow"
        ) from None
    environment = os.environ
    endpoint = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL")
    region = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION")
    if region is None and endpoint is None:
        region = fs.resolve_s3_region(bucket)
    return make(
        region=region,
        endpoint_override=endpoint,
        connect_timeout=_CONNECT_SECONDS,
        request_timeout=_REQUEST_SECONDS,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=_NUM_ATTEMPTS),
    )


def _list(store: Any, wanted: Objects) -> dict[str, int]:
    """Return the sizes of the objects that are wanted, by address."""
    whole = f"{wanted.bucket}/{wanted.key}".rstrip("/")
    info = store.get_file_info(whole)
    if info.is_file:
        return {f"s3://{info.path}": info.size}
    patterns = wanted.key.split("/") if wanted.key else []
    num_plain = next(
        (i for i, part in enumerate(patterns) if re.search(r"[*?\[]", part)), len(patterns)
    )
    base = "/".join([wanted.bucket, *patterns[:num_plain]])
    return {
        f"s3://{info.path}": info.size
        for info in _infos(store, base)
        if info.is_file and _matches(info.path.split("/")[1:], patterns)
    }


def _infos(store: Any, base: str) -> list[Any]:
    """Return all that lies below a folder; a bucket that is not there is an OSError."""
    from pyarrow import fs  # noqa: PLC0415 - _open_store() found it

    try:
        return list(store.get_file_info(fs.FileSelector(base, recursive=True)))
    except FileNotFoundError:
        return []


def _matches(parts: list[str], patterns: list[str]) -> bool:
    """Tell whether a key, or a folder that it lies in, matches; hidden names match no wildcard."""
    if not patterns:
        return not any(is_hidden(part) for part in parts)
    if not parts:
        return False
    pattern, part = patterns[0], parts[0]
    if pattern == "**":
        below = not is_hidden(part) and _matches(parts[1:], patterns)
        return below or _matches(parts, patterns[1:])
    if is_hidden(part) and not is_hidden(pattern):
        return False
    is_match = part == pattern or fnmatchcase(part, pattern)
    return is_match and _matches(parts[1:], patterns[1:])


def _copy_all(store: Any, copies: dict[str, str], sizes: dict[str, int], report: Report) -> None:
    """Copy objects over a few connections; the first failure ends it."""

    def copy(item: tuple[str, str]) -> str:
        target, name = item
        with _explaining(name, Path(target).parent):
            _copy(store, name, Path(target), sizes[name])
        return name

    pool = ThreadPoolExecutor(_NUM_CONNECTIONS)
    try:
        for num_done, name in enumerate(pool.map(copy, copies.items()), 1):
            report(num_done, len(copies), f"fetched {name}")
    finally:
        pool.shutdown(cancel_futures=True)


def _copy(store: Any, name: str, target: Path, size: int) -> None:
    """Copy one object as it is, a chunk in memory at a time."""
    key = name.removeprefix("s3://")
    # no compression: Arrow would unpack what its name says is gzip
    with store.open_input_stream(key, compression=None) as source, target.open("wb") as copy:
        while chunk := source.read(_CHUNK_BYTES):
            copy.write(chunk)
    if target.stat().st_size != size:
        raise PipelineError(
            f"'{name}' changed while it was read.", "Load again when nothing writes there."
        )


@contextmanager
def _explaining(name: str, folder: Path) -> Iterator[None]:
    """Turn what the client complains of into one message."""
    try:
        yield
    except FileNotFoundError:
        raise PipelineError(f"'{name}' is not there any more.", _WAY_OUT) from None
    except (OSError, pa.ArrowException) as error:
        if is_disk_full(error):
            raise no_room(name, folder) from None
        raise PipelineError(f"'{name}' cannot be read: {_reason(error)}", _WAY_OUT) from None


def _reason(error: Exception) -> str:
    """Return what the server said, or the client where it did not get that far."""
    line = first_line(error)
    found = _AWS_REASON.search(line)
    return f"{found[2]} ({found[1]})" if found else line


def _suffix(name: str) -> str:
    """Return the end of a name that tells its kind, `.gz` included."""
    plain = name.lower().removesuffix(".gz")
    return PurePosixPath(plain).suffix + (".gz" if plain != name.lower() else "")
