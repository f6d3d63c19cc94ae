"""How often figures without a change alarm, and what a series learns from."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import poisson

from behavior_pipeline.downstream.drift.calibration import (
    MIN_LEVEL_NIGHTS,
    Series,
    as_normal,
    as_student,
    nightly_limit,
    tail_quantile,
)

CALM_NIGHTS = 28
NUM_FIGURES = 8
NUM_NIGHTS = 28 + 365
FLOOR = 1e-9
PER_YEAR = 2.0

Draw = Callable[[np.random.Generator], np.ndarray]


def run(values: np.ndarray, per_year: float = PER_YEAR) -> np.ndarray:
    """Return whether each figure alarms on each night, for values (nights, figures)."""
    series = [Series(FLOOR, CALM_NIGHTS) for _ in range(values.shape[1])]
    alarms = np.zeros(values.shape, np.bool_)
    for night, row in enumerate(values):
        limit = nightly_limit(series, per_year)
        for place, value in enumerate(row):
            found = series[place].score(value, night % 7, limit)
            is_alarm = found is not None and found.score is not None and abs(found.score) > limit
            series[place].settle(value, night % 7, found, is_alarm=is_alarm)
            alarms[night, place] = is_alarm
    return alarms


def independent(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(NUM_NIGHTS, NUM_FIGURES))


def weekly(rng: np.random.Generator) -> np.ndarray:
    weekdays = 4.0 * rng.normal(size=(7, NUM_FIGURES))
    return independent(rng) + weekdays[np.arange(NUM_NIGHTS) % 7]


def together(rng: np.random.Generator) -> np.ndarray:
    return independent(rng) + 2.0 * rng.normal(size=(NUM_NIGHTS, 1))


def wandering(rng: np.random.Generator) -> np.ndarray:
    return independent(rng) + 0.1 * np.cumsum(independent(rng), axis=0)


@pytest.mark.parametrize("draw", [independent, weekly, together, wandering])
def test_a_year_without_a_change_has_no_more_false_alarms_than_stated(draw: Draw) -> None:
    years = 2
    found = sum(run(draw(np.random.default_rng(year))).any(axis=1).sum() for year in range(years))
    assert found <= poisson.ppf(0.99, PER_YEAR * years)


def test_the_more_false_alarms_are_allowed_the_sooner_it_alarms() -> None:
    values = independent(np.random.default_rng(5))
    rare, often = (run(values, per_year).any(axis=1).sum() for per_year in (1.0, 50.0))
    assert rare < often


def test_nothing_alarms_before_enough_calm_nights() -> None:
    values = independent(np.random.default_rng(0))[: CALM_NIGHTS + 1]
    values[CALM_NIGHTS - 1 :] += 100.0
    alarms = run(values).any(axis=1)
    assert not alarms[:CALM_NIGHTS].any()
    values[CALM_NIGHTS - 1] -= 100.0
    assert run(values).any(axis=1)[CALM_NIGHTS]


def test_a_lasting_change_alarms_once() -> None:
    values = independent(np.random.default_rng(1))[:120]
    values[60:, 3] += 12.0
    alarms = run(values)
    assert alarms[60, 3]
    assert alarms[:, 3].sum() == 1


def test_a_change_of_one_night_alarms_once_and_passes() -> None:
    values = independent(np.random.default_rng(2))[:120]
    values[60, 3] += 12.0
    alarms = run(values)
    assert alarms[60, 3]
    assert alarms[:, 3].sum() == 1


def test_after_a_change_another_one_is_seen() -> None:
    values = independent(np.random.default_rng(3))[:120]
    values[60:, 3] += 12.0
    values[70:, 3] += 12.0
    assert np.flatnonzero(run(values)[:, 3]).tolist() == [60, 70]


def test_sundays_that_differ_are_expected_to() -> None:
    rng = np.random.default_rng(4)
    nights = np.arange(120)
    values = rng.normal(size=(120, 1)) + 30.0 * (nights % 7 == 6)[:, None]
    assert not run(values).any()
    values[91] += 30.0  # a Sunday's value on another day
    assert nights[91] % 7 != 6
    assert run(values)[91].any()


def test_what_a_night_is_expected_to_be_does_not_depend_on_it() -> None:
    rng = np.random.default_rng(6)
    series = Series(FLOOR, CALM_NIGHTS)
    for night in range(40):
        value = float(rng.normal())
        found = series.score(value, night % 7, 4.0)
        series.settle(value, night % 7, found, is_alarm=False)
    one, other = series.score(0.5, 5, 4.0), series.score(1.5, 5, 4.0)
    assert one is not None
    assert other is not None
    assert (one.expected, one.width) == (other.expected, other.width)


def test_a_constant_figure_alarms_only_beyond_its_floor() -> None:
    series = Series(0.1, CALM_NIGHTS)
    for night in range(CALM_NIGHTS + 1):
        series.settle(1.0, night % 7, series.score(1.0, night % 7, 3.0), is_alarm=False)
    near, far = series.score(1.1, 0, 3.0), series.score(3.0, 0, 3.0)
    assert near is not None
    assert near.score is not None
    assert abs(near.score) < 3.0
    assert far is not None
    assert far.score is not None
    assert far.score > 3.0


def test_a_level_begun_anew_expects_nothing_for_a_night() -> None:
    series = Series(FLOOR, CALM_NIGHTS)
    for night in range(MIN_LEVEL_NIGHTS + 1):
        series.settle(1.0, night % 7, series.score(1.0, night % 7, 3.0), is_alarm=False)
    series.begin_level()
    assert series.score(5.0, 0, 3.0) is None
    series.settle(5.0, 0, None, is_alarm=False)
    found = series.score(5.0, 1, 3.0)
    assert found is not None
    assert found.expected == pytest.approx(5.0)


@given(score=st.floats(0.1, 6.0), freedom=st.integers(5, 200))
def test_normal_and_student_scores_are_each_others_inverse(score: float, freedom: int) -> None:
    assert as_normal(as_student(score, freedom), freedom) == pytest.approx(score, rel=1e-6)
    assert as_student(score, freedom) >= score * 0.999  # fewer nights, wider limits


def test_the_tail_of_exponential_errors_is_that_of_the_exponential_law() -> None:
    errors = np.random.default_rng(7).exponential(size=20_000)
    assert tail_quantile(errors, 1e-4) == pytest.approx(-np.log(1e-4), rel=0.15)


def test_a_heavier_tail_sets_a_higher_limit() -> None:
    rng = np.random.default_rng(8)
    light, heavy = rng.normal(size=5000), rng.standard_t(4, size=5000) / np.sqrt(2.0)
    assert tail_quantile(heavy, 1e-4) > tail_quantile(light, 1e-4)


def test_too_few_errors_have_no_tail() -> None:
    assert tail_quantile(np.ones(50), 1e-4) == 0.0


def test_equal_errors_are_their_own_tail() -> None:
    assert tail_quantile(np.ones(500), 1e-4) == pytest.approx(1.0)
