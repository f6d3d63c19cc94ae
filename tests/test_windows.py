"""Cutoffs, label windows and the choice of train and test cutoffs."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from behavior_pipeline.errors import PipelineError
from behavior_pipeline.windows import (
    cutoff_of,
    default_cutoff,
    parse_cutoff,
    partition_of,
    plan_evaluation,
)

FIRST = datetime(2009, 12, 1, 7, 45, tzinfo=UTC)
LAST = datetime(2011, 12, 9, 12, 50, tzinfo=UTC)


def test_a_partition_ends_at_its_cutoff() -> None:
    cutoff = parse_cutoff("2011-11-09")
    assert partition_of(cutoff) == "2011-11-08"
    assert cutoff_of("2011-11-08") == cutoff


def test_a_historical_night_is_tested_at_its_own_cutoff() -> None:
    windows = plan_evaluation(parse_cutoff("2011-11-09"), FIRST, LAST, 30, 180)
    assert windows.test_cutoff == windows.cutoff == parse_cutoff("2011-11-09")
    assert windows.train_cutoff == parse_cutoff("2011-10-10")
    assert windows.cutoffs == (windows.train_cutoff, windows.cutoff)


def test_a_live_night_is_tested_one_horizon_earlier() -> None:
    windows = plan_evaluation(parse_cutoff("2011-12-10"), FIRST, LAST, 30, 180)
    assert windows.test_cutoff == parse_cutoff("2011-11-10")
    assert windows.train_cutoff == parse_cutoff("2011-10-11")
    assert len(windows.cutoffs) == 3


def test_the_default_cutoff_has_its_whole_label_window() -> None:
    assert default_cutoff(LAST, 30) == parse_cutoff("2011-11-09")


@pytest.mark.parametrize("cutoff", ["2009-12-01", "2011-12-11", "1999-01-01"])
def test_a_cutoff_outside_the_data_is_refused(cutoff: str) -> None:
    with pytest.raises(PipelineError, match="outside the data"):
        plan_evaluation(parse_cutoff(cutoff), FIRST, LAST, 30, 180)


def test_too_little_history_is_refused() -> None:
    with pytest.raises(PipelineError, match="before the first event"):
        plan_evaluation(parse_cutoff("2009-12-20"), FIRST, LAST, 30, 180)


@pytest.mark.parametrize(
    ("horizon", "lookback", "name"), [(-1, 180, "horizon"), (30, 0, "lookback")]
)
def test_windows_without_a_length_are_refused(horizon: int, lookback: int, name: str) -> None:
    with pytest.raises(PipelineError, match=name):
        plan_evaluation(parse_cutoff("2011-11-09"), FIRST, LAST, horizon, lookback)


def test_a_date_that_is_none_is_refused() -> None:
    with pytest.raises(PipelineError, match="'yesterday' is not a date"):
        parse_cutoff("yesterday")


@given(st.integers(0, 3000), st.integers(1, 400), st.integers(1, 4000), st.integers(1, 86_399))
def test_no_label_window_reaches_past_the_data_or_into_training(
    day: int, horizon: int, length: int, second: int
) -> None:
    first = datetime(2010, 1, 1, tzinfo=UTC)
    last = first + timedelta(days=length, seconds=second)
    try:
        windows = plan_evaluation(first + timedelta(days=day), first, last, horizon, 90)
    except PipelineError:
        assume(False)
    assert windows.train_cutoff + windows.horizon == windows.test_cutoff
    assert first < windows.train_cutoff
    assert windows.test_cutoff <= windows.cutoff
    is_live = windows.test_cutoff < windows.cutoff
    known_until = windows.cutoff if is_live else last
    assert windows.test_cutoff + windows.horizon <= known_until
