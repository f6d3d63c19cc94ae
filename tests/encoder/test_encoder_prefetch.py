from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from itertools import count, islice

import pytest
import torch

from behavior_pipeline.encoder.prefetch import (
    _from_thread,
    prefetched,
)


def test_a_thread_yields_everything_in_order():
    assert list(_from_thread(iter(range(20)), 2)) == list(range(20))


def test_an_error_is_raised_where_the_batch_would_have_been():
    def broken() -> Iterator[int]:
        yield 1
        raise OSError("no such file")

    made = _from_thread(broken(), 2)
    assert next(made) == 1
    with pytest.raises(OSError, match="no such file"):
        next(made)


def test_the_thread_ends_with_its_user_and_works_no_further_than_asked():
    seen: list[int] = []

    def endless() -> Iterator[int]:
        for number in count():
            seen.append(number)
            yield number

    before = threading.active_count()
    made = _from_thread(endless(), 2)
    assert list(islice(made, 3)) == [0, 1, 2]
    time.sleep(0.3)
    assert len(seen) <= 3 + 2 + 1
    made.close()
    assert threading.active_count() == before


def test_on_a_cpu_batches_pass_through():
    batches = [torch.ones(2), torch.zeros(2)]
    assert [b.sum().item() for b in prefetched(iter(batches), torch.device("cpu"))] == [2, 0]
