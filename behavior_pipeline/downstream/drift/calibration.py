"""When a figure of a night is further off than chance takes it, as past nights tell.

A figure is expected at its level (the median of its last nights, weekdays evened out) plus its
weekday's effect. How far it falls from that is held against how far calm nights fell, each judged
by the nights before it alone. See docs/drift.md for the rule and what it assumes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

import numpy as np
from scipy.special import ndtr, ndtri, stdtr, stdtrit

MIN_LEVEL_NIGHTS: Final = 14  # before anything is expected of a figure: every weekday twice
LEVEL_NIGHTS: Final = 14  # whose median is the level
SEASON_NIGHTS: Final = 56  # from which weekdays are learnt
MIN_SEASON_NIGHTS: Final = 14
SCALE_NIGHTS: Final = 91  # whose errors say how far chance goes
RETURN_NIGHTS: Final = 3  # for so many nights after an alarm a figure may still turn back
PASSING_WIDTHS: Final = 1.5  # an alarm that passed is learnt from as an error of so many widths
MEDIAN_COST: Final = np.pi / 2  # variance of the median over that of the mean, Gaussian
DAYS_OF_A_YEAR: Final = 365
DAYS_OF_A_WEEK: Final = 7
TAIL_SHARE: Final = 0.05  # of the errors, from which the tail is learnt
MIN_TAIL_ERRORS: Final = 10
MOST_SHAPE: Final = 0.5  # of the Pareto tail: a heavier one has no variance
_MOST: Final = 30.0  # a score beyond which nothing more is to be said


@dataclass(frozen=True)
class Score:
    """What was to be expected of a figure on a night, and how it came.

    Attributes:
        value: of the figure, in the units in which it is judged.
        expected: before the night was seen.
        width: distance from `expected` at which the alarm begins; infinite while uncalibrated.
        score: the error in normal units: a score of 2 is as rare as two standard deviations of a
            normal variable; None while uncalibrated.
    """

    value: float
    expected: float
    width: float = np.inf
    score: float | None = None

    @property
    def is_high(self) -> bool:
        """Whether the value lies above what was expected."""
        return self.value > self.expected


@dataclass
class Series:
    """A figure, night after night.

    Attributes:
        floor: least scale of its errors: what is smaller is of no interest however rare.
        calm_nights: nights without an alarm that it takes until the first alarm.
    """

    floor: float
    calm_nights: int
    values: list[float] = field(default_factory=list)
    weekdays: list[int] = field(default_factory=list)
    levels: list[int] = field(default_factory=list)  # number of the level that each night is of
    errors: list[float] = field(default_factory=list)  # of the calm nights that were expected
    level: int = 0
    former: int | None = None  # the level before the last alarm, while it may come back
    nights_of_level: int = 0
    passing: list[float] = field(default_factory=list)  # errors of alarms that may yet pass

    @property
    def is_ready(self) -> bool:
        """Whether enough calm nights were seen to alarm."""
        return len(self.errors) >= self.calm_nights - MIN_LEVEL_NIGHTS

    def standard_errors(self) -> np.ndarray:
        """Return the errors of the last calm nights over their scale."""
        errors = np.array(self.errors[-SCALE_NIGHTS:])
        return errors / max(float(np.sqrt(np.mean(errors**2))), self.floor)

    def score(self, value: float, weekday: int, limit: float) -> Score | None:
        """Judge a night by those before it; None if nothing is to be expected yet.

        Soon after an alarm, a value nearer to the level before it, and inside its limit, takes the
        figure back there: the alarm passed by itself, and counts as an error like any, cut short.
        """
        effects = self._weekday_effects()
        now = self._score(value, weekday, self.level, effects, limit)
        if self.former is None or now is None:
            return now
        back = self._score(value, weekday, self.former, effects, limit)
        is_inside = back is not None and abs(back.value - back.expected) <= back.width
        if back is None or not is_inside or _distance(back) >= _distance(now):
            return now
        self.level, self.former = self.former, None
        self.errors += self.passing
        self.passing = []
        return back

    def settle(self, value: float, weekday: int, found: Score | None, *, is_alarm: bool) -> None:
        """Take a judged night in: an alarm begins a new level, a calm night is learnt from."""
        error = (found.value - found.expected) if found else 0.0
        if is_alarm and found is not None:
            if self.former is None:
                self.former = self.level
            most = PASSING_WIDTHS * found.width
            self.passing.append(float(np.clip(error, -most, most)) / self._inflation(self.level))
            self.level = max(self.levels, default=0) + 1
            self.nights_of_level = 0
        elif found is not None:
            self.errors.append(error / self._inflation(self.level))
        self.nights_of_level += 1
        if self.nights_of_level > RETURN_NIGHTS:
            self.former, self.passing = None, []
        self.values.append(value)
        self.weekdays.append(weekday)
        self.levels.append(self.level)

    def begin_level(self) -> None:
        """Expect nothing of the nights before any more, but how weekdays and chance go."""
        self.level = max(self.levels, default=0) + 1
        self.nights_of_level, self.former, self.passing = 0, None, []

    def _score(
        self, value: float, weekday: int, level: int, effects: np.ndarray, limit: float
    ) -> Score | None:
        """Judge a value by one level."""
        places = self._places(level)
        if not places or (len(self.values) < MIN_LEVEL_NIGHTS):
            return None
        evened = [self.values[place] - effects[self.weekdays[place]] for place in places]
        expected = float(np.median(evened) + effects[weekday])
        if not self.is_ready:
            return Score(value, expected)
        errors = np.array(self.errors[-SCALE_NIGHTS:])
        scale = max(float(np.sqrt(np.mean(errors**2))), self.floor)
        scale *= self._inflation(level)
        student = (value - expected) / scale
        width = scale * as_student(limit, len(errors))
        return Score(value, expected, width, as_normal(student, len(errors)))

    def _places(self, level: int) -> list[int]:
        """Return the last nights of a level, if it is not long gone."""
        last = len(self.levels) - 1
        recent = range(last, max(last - SCALE_NIGHTS, -1), -1)
        nights = (place for place in recent if self.levels[place] == level)
        return list(islice(nights, LEVEL_NIGHTS))

    def _inflation(self, level: int) -> float:
        """Return by how much an error exceeds the spread of nights: a level of few is uncertain."""
        return float(np.sqrt(1.0 + MEDIAN_COST / max(len(self._places(level)), 1)))

    def _weekday_effects(self) -> np.ndarray:
        """Return what each weekday adds to the level (7,), shrunk towards nothing.

        Empirical Bayes (Efron and Morris, "Stein's estimation rule and its competitors", JASA
        1973): the mean of a weekday's nights counts as far as weekdays differ by more than their
        nights do by chance.
        """
        away, weekdays = self._evened_by_level()
        counts = np.bincount(weekdays, minlength=DAYS_OF_A_WEEK)
        if len(away) < MIN_SEASON_NIGHTS or counts.min() < 1:
            return np.zeros(DAYS_OF_A_WEEK)
        means = np.bincount(weekdays, away, DAYS_OF_A_WEEK) / counts
        freedom = max(len(away) - DAYS_OF_A_WEEK, 1)
        by_chance = float(np.sum((away - means[weekdays]) ** 2)) / freedom / counts
        between = max(0.0, float(np.var(means, ddof=1) - by_chance.mean()))
        kept = between / (between + by_chance) if between > 0 else np.zeros(DAYS_OF_A_WEEK)
        effects: np.ndarray = (means - means.mean()) * kept
        return effects

    def _evened_by_level(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the last nights less the median of their level, and their weekdays."""
        values = np.array(self.values[-SEASON_NIGHTS:])
        levels = np.array(self.levels[-SEASON_NIGHTS:])
        weekdays = np.array(self.weekdays[-SEASON_NIGHTS:], np.int64)
        away = np.full(len(values), np.nan)
        for level in np.unique(levels):
            places = np.flatnonzero(levels == level)
            if len(places) >= DAYS_OF_A_WEEK:
                away[places] = values[places] - np.median(values[places])
        is_known = np.isfinite(away)
        return away[is_known], weekdays[is_known]


def nightly_limit(series: Sequence[Series], per_year: float) -> float:
    """Return the score beyond which any figure of a night alarms.

    A night is to alarm by chance with a probability of `per_year` / 365 at the most, whatever
    figure it is by, so each of J figures gets a J-th of that (Bonferroni: it holds however figures
    depend on each other). The score so rare is the higher of two: the normal one, and the one of
    the Pareto tail of the errors of all figures together, each over its own scale.

    Args:
        series: the figures that are judged.
        per_year: false alarms.
    """
    ready = [each for each in series if each.is_ready]
    rarity = min(per_year / DAYS_OF_A_YEAR, 0.5) / max(len(ready), 1)
    normal = float(-ndtri(rarity / 2.0))
    pooled = [each.standard_errors() for each in ready]
    return max(normal, tail_quantile(np.concatenate(pooled), rarity)) if pooled else normal


def tail_quantile(errors: np.ndarray, rarity: float) -> float:
    """Return what the size of an error exceeds with a small probability; 0 of too few errors.

    Peaks over a threshold: the errors beyond the largest 5 % follow a generalised Pareto law
    (Coles, "An Introduction to Statistical Modeling of Extreme Values", 2001, section 4.2), fitted
    by probability-weighted moments (Hosking and Wallis, "Parameter and quantile estimation for the
    generalized Pareto distribution", Technometrics 1987); tails that end are taken as exponential.
    """
    sizes = np.sort(np.abs(errors))
    count = int(len(sizes) * TAIL_SHARE)
    if count < MIN_TAIL_ERRORS:
        return 0.0
    threshold = sizes[-count - 1]
    beyond = sizes[-count:] - threshold
    first = float(beyond.mean())
    places = (np.arange(1, count + 1) - 0.35) / count
    second = float(np.mean((1.0 - places) * beyond))
    if first <= 2.0 * second:  # no spread at all
        return float(sizes[-1])
    shape = min(max(2.0 - first / (first - 2.0 * second), 0.0), MOST_SHAPE)
    scale = first * (1.0 - shape)
    times = max(count / len(sizes) / rarity, 1.0)
    growth = np.log(times) if shape == 0 else (times**shape - 1.0) / shape
    return float(threshold + scale * growth)


def as_normal(student: float, freedom: int) -> float:
    """Return the normal score that is as rare as a Student score of so many degrees of freedom."""
    tail = float(stdtr(freedom, -abs(student)))
    score = _MOST if tail <= 0 else min(float(-ndtri(tail)), _MOST)
    return float(np.copysign(score, student))


def as_student(normal: float, freedom: int) -> float:
    """Return the Student score that is as rare as a normal one; undoes `as_normal`."""
    return float(-stdtrit(freedom, ndtr(-normal)))


def _distance(score: Score) -> float:
    """Return how far a value is from what was expected."""
    return abs(score.value - score.expected)
