"""One writer at a time: Feast's registry and SQLite file are both rewritten in place."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager

from behavior_pipeline.storage import Storage, make_private_folder


@contextmanager
def exclusive(storage: Storage) -> Iterator[None]:
    """Hold the feature store of a home; other threads and processes wait for their turn.

    The operating system lets go of the lock when its holder dies, so a kill blocks nobody.
    """
    folder = make_private_folder(storage.feature_store)
    with (folder / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
