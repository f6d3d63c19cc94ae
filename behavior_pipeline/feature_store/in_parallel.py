"""Work on batches in several threads, with few of them in memory at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Batch = TypeVar("Batch")
Result = TypeVar("Result")


def in_parallel(
    work: Callable[[Batch], Result], batches: Iterable[Batch], num_threads: int
) -> Iterator[Result]:
    """Yield the results of the batches in their order.

    A batch is taken when a thread is free for it, or will be next. What fails first is raised, and
    what has not begun by then never begins.
    """
    pending: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(num_threads)
    try:
        for batch in batches:
            pending.append(pool.submit(work, batch))
            if len(pending) >= num_threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def ahead(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield batches while a thread makes the next one; what fails there is raised here."""
    source: Iterator[Batch | None] = iter(batches)
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(next, source, None)
        while (batch := pending.result()) is not None:
            pending = pool.submit(next, source, None)
            yield batch
