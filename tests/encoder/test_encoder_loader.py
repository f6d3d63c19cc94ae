from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator

import pytest

from behavior_pipeline.encoder.loader import made_ahead


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_the_order_is_that_of_the_source(prefetch):
    with made_ahead(iter(range(20)), prefetch, lambda number: number * 2) as batches:
        assert list(batches) == list(range(0, 40, 2))


def test_a_source_without_end_is_left_and_its_thread_ends():
    before = threading.active_count()
    with made_ahead(itertools.count(), 2, lambda number: number) as batches:
        assert [next(batches) for _ in range(5)] == list(range(5))
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


def test_an_error_comes_where_the_batch_would_have_come():
    def broken() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    with made_ahead(broken(), 2, lambda number: number) as batches:
        assert next(batches) == 1
        with pytest.raises(ValueError, match="broken"):
            next(batches)
