"""Which online store a home is served from: one file of `feature_repo/` per kind.

Addresses and passwords of servers are environment variables that the file names, for Feast itself
reads them so; none of them is ever written to disk.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from string import Template
from typing import Any, Final

import yaml

from behavior_pipeline.errors import PipelineError
from behavior_pipeline.settings import load_settings

DEFAULT: Final = "sqlite"
PLACES: Final = ("HOST", "PORT", "DATABASE")
"""Variables of a server that decide where a view's table is; Redis has no tables."""

_SERVERS: Final = {"redis": "Redis", "psycopg": "PostgreSQL", "psycopg_pool": "PostgreSQL"}


def configuration_file(folder: Path) -> Path:
    """Return the file of the online store that the setting `online_store` chooses."""
    kind = load_settings().online_store
    return folder / ("feature_store.yaml" if kind == DEFAULT else f"feature_store.{kind}.yaml")


def has_online_file() -> bool:
    """Say whether the chosen online store is a file of the home."""
    return load_settings().online_store == DEFAULT


def online_place() -> str:
    """Return what tells one server's tables from another's; nothing secret."""
    kind = load_settings().online_store.upper()
    places = [os.environ.get(f"BEHAVIOR_{kind}_{place}", "") for place in PLACES]
    return "\n".join([kind, *places])


def read_configuration(file: Path, variables: Mapping[str, str]) -> dict[str, Any]:
    """Read one of Feast's configuration files, with its variables filled in.

    Raises:
        PipelineError: if a variable is missing.
    """
    text = file.read_text()
    missing = [name for name in Template(text).get_identifiers() if not variables.get(name)]
    if missing:
        raise PipelineError(
            f"The online store needs the environment variable {missing[0]}, which is not set.",
            f"See the head of {file}.",
        )
    content: dict[str, Any] = _filled_in(yaml.safe_load(text), variables)
    return content


def _filled_in(content: Any, variables: Mapping[str, str]) -> Any:
    """Fill variables in after YAML was read: a password may hold any character."""
    if isinstance(content, dict):
        return {name: _filled_in(value, variables) for name, value in content.items()}
    return Template(content).substitute(variables) if isinstance(content, str) else content


@contextmanager
def speaking_to_server() -> Iterator[None]:
    """Say in words what goes wrong between Feast and a server.

    Raises:
        PipelineError: for whatever the clients of Redis and PostgreSQL raise.
    """
    try:
        yield
    except Exception as error:
        library = type(error).__module__.partition(".")[0]
        if library in _SERVERS:
            raise PipelineError(
                f"The online store in {_SERVERS[library]} answers: {error}",
                "See that the server runs, lets this user in, and has room.",
            ) from None
        if library == "feast" and "ImportError" in type(error).__name__:
            raise PipelineError(
                f"A package of the online store is missing: {error}",
                "Install behavior-pipeline[redis] or behavior-pipeline[postgres-online].",
            ) from None
        raise
