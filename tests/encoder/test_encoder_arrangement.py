from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from behavior_pipeline.encoder.arrangement import arranged


def straddling(lengths: np.ndarray, block: int) -> int:
    """Count the runs of at most a block that lie in two."""
    ends = np.cumsum(lengths)
    starts = ends - lengths
    return int(
        ((starts // block != (ends - 1) // block) & (lengths <= block) & (lengths > 0)).sum()
    )


@given(st.lists(st.integers(0, 40), max_size=60), st.integers(1, 16))
def test_an_arrangement_holds_every_run_once_and_empty_ones_last(lengths, block):
    lengths = np.array(lengths, np.int64)
    order = arranged(lengths, block)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    rest = lengths[order]
    assert not rest[np.count_nonzero(lengths) :].any()


def test_an_arrangement_by_hand():
    # 9 fills a block of 6 and half of the next, which 3 completes; then 5 and 1, then 4 and 2.
    lengths = np.array([1, 2, 3, 4, 5, 0, 9])
    assert lengths[arranged(lengths, 6)].tolist() == [9, 3, 5, 1, 4, 2, 0]


def test_hardly_a_run_straddles_where_lengths_are_those_of_real_logs():
    random = np.random.default_rng(0)
    lengths = np.minimum(np.exp(random.normal(2.2, 1.1, 5000)), 256).astype(np.int64)
    assert straddling(lengths, 128) > 300
    assert straddling(lengths[arranged(lengths, 128)], 128) < 10
