"""Batches made ahead by a thread, so that the model never waits for them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any, Final

_POLL_SECONDS: Final = 0.1
"""How often a waiting thread looks whether it is still wanted."""


@contextmanager
def made_ahead(
    batches: Iterator[Any], prefetch: int, prepare: Callable[[Any], Any]
) -> Iterator[Iterator[Any]]:
    """Yield an iterator over prepared batches, in their order, made by a thread.

    The thread ends with the context. An error in it is raised where the batch would have come.

    Args:
        batches: what to make.
        prefetch: batches that may wait at the most; 0 makes them when asked for.
        prepare: applied to each, in the thread.
    """
    if prefetch < 1:
        yield map(prepare, batches)
        return
    ahead = _Ahead(batches, prefetch, prepare)
    with closing(ahead):
        yield iter(ahead)


class _Ahead:
    """The thread and the queue between it and who asks."""

    def __init__(
        self, batches: Iterator[Any], prefetch: int, prepare: Callable[[Any], Any]
    ) -> None:
        self.batches = batches
        self.prepare = prepare
        self.waiting: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(prefetch)
        self.is_over = threading.Event()
        self.thread = threading.Thread(target=self._work, name="batches", daemon=True)
        self.thread.start()

    def _work(self) -> None:
        try:
            for batch in self.batches:
                if not self._put((self.prepare(batch), None)):
                    return
            self._put((None, StopIteration()))
        except BaseException as error:  # noqa: BLE001 - raised again where the batch is asked for
            self._put((None, error))

    def _put(self, item: tuple[Any, BaseException | None]) -> bool:
        """Offer an item until it is taken; return whether it was."""
        while not self.is_over.is_set():
            try:
                self.waiting.put(item, timeout=_POLL_SECONDS)
            except queue.Full:
                continue
            return True
        return False

    def __iter__(self) -> Iterator[Any]:
        while True:
            batch, error = self.waiting.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield batch

    def close(self) -> None:
        """End the thread."""
        self.is_over.set()
        self.thread.join()
