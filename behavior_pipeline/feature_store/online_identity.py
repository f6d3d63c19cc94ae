"""Which online store holds what was published: only there are the changes of a night enough.

Another kind of store, another server and a file that was lost or came back from a copy hold none of
what was published, or something older.
"""

from __future__ import annotations

import os

from behavior_pipeline.feature_store.configuration import has_online_file, online_place
from behavior_pipeline.storage import Storage, read_json, write_json


def is_same_store(storage: Storage, version: int) -> bool:
    """Say whether the online store is the one that a version's embeddings were last written to."""
    path = storage.feature_store / "online_stores.json"
    known = read_json(path) if path.exists() else {}
    return bool(known.get(f"v{version}") == _identity(storage))


def remember_store(storage: Storage, version: int) -> None:
    """Note that a version's embeddings were written; the caller holds `exclusive(storage)`."""
    path = storage.feature_store / "online_stores.json"
    known = read_json(path) if path.exists() else {}
    if not is_same_store(storage, version):
        write_json(path, known | {f"v{version}": _identity(storage)})


def _identity(storage: Storage) -> str:
    """Return what tells one online store from another; nothing secret."""
    if has_online_file():
        return f"sqlite {(storage.feature_store / 'online.db').stat().st_ino}"
    redis = os.environ.get("BEHAVIOR_REDIS", "").split(",")
    shown = [part for part in redis if not part.startswith(("password=", "username="))]
    return " ".join([*online_place().split(), *shown])
