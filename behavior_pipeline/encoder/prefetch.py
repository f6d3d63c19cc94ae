"""Batches made ahead of their use: by a thread, in pinned memory, copied while the GPU works."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any, Final, Protocol, Self, TypeVar

import torch

_END: Final = object()
_POLL_SECONDS: Final = 0.1


class Movable(Protocol):
    """What can be moved to a device."""

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Self:
        """Return it on a device."""

    def pin_memory(self) -> Self:
        """Return it in pinned memory."""


Item = TypeVar("Item")
Batch = TypeVar("Batch", bound=Movable)


def prefetched(batches: Iterator[Batch], device: torch.device, depth: int = 3) -> Iterator[Batch]:
    """Yield batches on a device, the next `depth` of them already made.

    On a CPU nothing is gained by a thread, and none is started. An error in making a batch is
    raised where the batch would have been yielded.

    Args:
        batches: on the CPU.
        device: where they are wanted.
        depth: how many wait at the most.
    """
    if device.type != "cuda":
        yield from (batch.to(device) for batch in batches)
        return
    for batch in _from_thread((batch.pin_memory() for batch in batches), depth):
        yield batch.to(device, non_blocking=True)


def _from_thread(batches: Iterator[Item], depth: int) -> Iterator[Item]:
    """Yield what a thread makes ahead; the thread ends when the caller stops."""
    made: queue.Queue[Any] = queue.Queue(depth)
    is_over = threading.Event()
    thread = threading.Thread(target=_make, args=(batches, made, is_over), daemon=True)
    thread.start()
    try:
        while (item := made.get()) is not _END:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        is_over.set()
        thread.join()


def _make(batches: Iterator[Any], made: queue.Queue[Any], is_over: threading.Event) -> None:
    """Put batches, then an error or the end, into the queue until somebody says stop."""
    try:
        for batch in batches:
            if not _put(made, batch, is_over):
                return
        _put(made, _END, is_over)
    except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
        _put(made, error, is_over)


def _put(made: queue.Queue[Any], item: Any, is_over: threading.Event) -> bool:
    """Wait for room in the queue; tell whether the item went in before somebody said stop."""
    while not is_over.is_set():
        try:
            made.put(item, timeout=_POLL_SECONDS)
        except queue.Full:
            continue
        return True
    return False
