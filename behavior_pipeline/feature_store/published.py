"""What has been published so far: `feature_store/published.json`.

It holds no clock times, so publishing the same cutoff twice leaves the same bytes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from behavior_pipeline.feature_store.versions import VERSIONED, read_versions
from behavior_pipeline.storage import Storage, read_json, write_json
from behavior_pipeline.windows import parse_cutoff


@dataclass(frozen=True)
class PublishedCutoff:
    """One cutoff of a view in the offline store.

    Attributes:
        num_rows: users in the partition.
        checkpoint_id: the one checkpoint behind its rows, null for views without an encoder.
        is_partial: only users whose row changed; everyone else's lies in an earlier partition.
    """

    num_rows: int
    checkpoint_id: str | None
    is_partial: bool = False


@dataclass(frozen=True)
class PublishedView:
    """What both stores hold of one view.

    Attributes:
        cutoffs: the offline partitions by date, `YYYY-MM-DD`.
        online_cutoff: the newest cutoff whose rows were ever sent to the online store.
        is_online_complete: all of them arrived; False while a publication runs, or was killed.
    """

    cutoffs: dict[str, PublishedCutoff] = field(default_factory=dict)
    online_cutoff: str | None = None
    is_online_complete: bool = False


def _file(storage: Storage) -> Path:
    return storage.feature_store / "published.json"


def read_published(storage: Storage, version: int | None = None) -> dict[str, PublishedView]:
    """Return what is published under a version, by view; empty where nothing ever was.

    Args:
        storage: the home.
        version: default the live one.
    """
    suffix = _suffix(version or read_versions(storage).live)
    return {
        name.removesuffix(suffix): _view(content)
        for name, content in _read(storage).items()
        if name.endswith(suffix) or "@" not in name
    }


def write_published(
    storage: Storage, view: str, state: PublishedView, version: int | None = None
) -> None:
    """Record a view's state, atomically; the caller holds `exclusive(storage)`."""
    name = view
    if view in VERSIONED:
        name += _suffix(version or read_versions(storage).live)
    write_json(_file(storage), _read(storage) | {name: asdict(state)})


def _read(storage: Storage) -> dict[str, Any]:
    """Return the content of the file; a versioned view's state is under `view@vN`."""
    path = _file(storage)
    content: dict[str, Any] = read_json(path) if path.exists() else {}
    return content


def _suffix(version: int) -> str:
    return f"@v{version}"


def _view(content: dict[str, Any]) -> PublishedView:
    cutoffs = {date: PublishedCutoff(**cutoff) for date, cutoff in content["cutoffs"].items()}
    return PublishedView(cutoffs, content["online_cutoff"], content["is_online_complete"])


def newest_cutoff(storage: Storage) -> datetime | None:
    """Return the newest cutoff that any view shows online; None if nothing was published."""
    dates = [state.online_cutoff for state in read_published(storage).values()]
    known = [date for date in dates if date is not None]
    return parse_cutoff(max(known)) if known else None
