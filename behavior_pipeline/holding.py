"""One run at a time works in a source's home, whoever started it."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from behavior_pipeline.errors import PipelineError
from behavior_pipeline.storage import Storage, make_private_folder, remove_leftovers

POLL_SECONDS = 0.5

_held: set[Path] = set()  # homes that this process holds: a run may execute several jobs in turn


@contextmanager
def holding(storage: Storage, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold a home for one run, after clearing what killed runs left in it.

    The lock goes with the process, however it ends. Holding a home that this process holds already
    changes nothing.

    Args:
        storage: the home.
        waiting: called once if another process holds the home, which is then waited for; without
            it nobody waits.

    Raises:
        PipelineError: if another process holds the home and nobody waits.
    """
    home = storage.home.resolve()
    if home in _held:
        yield
        return
    make_private_folder(home)
    with (home / ".lock").open("w") as handle:
        while not _is_taken(handle.fileno()):
            if waiting is None:
                raise PipelineError(
                    f"Another run is at work in {storage.home}.", "Wait for it, or stop it."
                )
            waiting()
            waiting = _wait_on
            time.sleep(POLL_SECONDS)  # no blocking call: a run that waits can be cancelled
        _held.add(home)
        try:
            remove_leftovers(home)
            yield
        finally:
            _held.discard(home)


def _is_taken(handle: int) -> bool:
    """Try to take the lock; tell whether it is ours now."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _wait_on() -> None:
    """Say nothing more: waiting was told once."""
