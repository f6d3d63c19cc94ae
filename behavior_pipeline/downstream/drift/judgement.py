"""Judges every night of a history by those before it: which figures are further off than usual.

Nothing is stored: the same files give the same judgements, whatever the order in which they came.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np

from behavior_pipeline.downstream.drift.calibration import (
    MIN_LEVEL_NIGHTS,
    Score,
    Series,
    nightly_limit,
)
from behavior_pipeline.downstream.drift.history import NightFigures
from behavior_pipeline.downstream.drift.stability import mix_stability
from behavior_pipeline.ingest.drift import MIN_EXPECTED

Group = Literal["events", "users", "embeddings"]
MAX_EVENT_TYPES: Final = 20  # most frequent ones, each a figure; the mix as a whole has all
MIX_NIGHTS: Final = 28  # whose events together are the mix that a night's is compared with
TYPE_PREFIX: Final = "events of type "
SHARE_STEP: Final = 1e-3  # shares below it are hardly told apart


def _log(value: float) -> float:
    return float(np.log(max(value, 1e-9)))


def _exp(value: float) -> float:
    return float(np.exp(value))


def _root(value: float) -> float:
    """Wilson and Hilferty, "The distribution of chi-square", 1931: its cube root is near normal."""
    return float(np.cbrt(max(value, 0.0)))


def _cube(value: float) -> float:
    return float(max(value, 0.0) ** 3)


def _logit(share: float) -> float:
    return float(np.log((share + SHARE_STEP) / (1.0 - share + SHARE_STEP)))


def _share(logit: float) -> float:
    odds = np.exp(logit)
    return float(np.clip((odds * (1.0 + SHARE_STEP) - SHARE_STEP) / (1.0 + odds), 0.0, 1.0))


def _squared_sine(angle: float) -> float:
    return float(np.sin(np.clip(angle, 0.0, np.pi / 2)) ** 2)


@dataclass(frozen=True)
class Figure:
    """How a figure is judged.

    Attributes:
        group: what moves if it does.
        to: units in which nights spread alike whatever the level.
        back: from them.
        is_change: whether it is the change from the night before that is judged, since the figure
            itself wanders.
        floor: least spread in those units, see Series.
        is_one_sided: whether only a rise alarms.
    """

    group: Group
    to: Callable[[float], float]
    back: Callable[[float], float]
    is_change: bool = False
    floor: float = 0.005
    is_one_sided: bool = False


FIGURES: Final[Mapping[str, Figure]] = {
    "num_events": Figure("events", _log, _exp, floor=0.02),
    "event_mix_psi": Figure("events", _root, _cube, floor=0.01, is_one_sided=True),
    "unknown_event_share": Figure("events", _logit, _share, floor=0.2, is_one_sided=True),
    "num_users": Figure("users", _log, _exp, is_change=True, floor=0.001),
    "cold_start_share": Figure("users", _logit, _share, is_change=True, floor=0.05),
    "psi_recency_days": Figure("users", _root, _cube, floor=0.02, is_one_sided=True),
    "psi_frequency": Figure("users", _root, _cube, floor=0.02, is_one_sided=True),
    "psi_monetary": Figure("users", _root, _cube, floor=0.02, is_one_sided=True),
    "norm_p05": Figure("embeddings", _log, _exp, is_change=True),
    "norm_p50": Figure("embeddings", _log, _exp, is_change=True),
    "norm_p95": Figure("embeddings", _log, _exp, is_change=True),
    "effective_rank": Figure("embeddings", _log, _exp, is_change=True),
    "neighbour_overlap": Figure("embeddings", _logit, _share, floor=0.05),
    "moved": Figure("embeddings", _log, _exp, floor=0.05),
    "segment_churn": Figure("embeddings", _logit, _share, floor=0.1),
}
"""The figures that are judged; besides, the share of each frequent event type (TYPE)."""

TYPE: Final = Figure("events", lambda angle: angle, _squared_sine, floor=0.004)
_COMPARED: Final = frozenset(
    {
        "psi_recency_days", "psi_frequency", "psi_monetary", "neighbour_overlap", "moved",
        "segment_churn",
    }
)  # fmt: skip
"""Figures that compare a night with the night before: of no use after a gap."""


def is_type(name: str) -> bool:
    """Tell whether a figure is the share of an event type."""
    return name.startswith(TYPE_PREFIX)


def figure_of(name: str) -> Figure:
    """Return how a figure is judged."""
    return TYPE if is_type(name) else FIGURES[name]


@dataclass(frozen=True)
class Judged:
    """A figure of a night beside what was expected; `low` and `high` are the alarm's limits.

    Attributes:
        value: as measured.
        expected, low, high: in the same units; the limits are infinite while uncalibrated.
        score: see Score.
        is_alarm: whether the value lies beyond a limit that counts.
    """

    value: float
    expected: float
    low: float
    high: float
    score: float | None
    is_alarm: bool


@dataclass(frozen=True)
class Judgement:
    """A night beside those before it.

    Attributes:
        night: what was measured.
        figures: of those of which something was expected.
        limit: the score beyond which a figure alarms.
        num_ready: figures that can alarm.
        former_checkpoint_id: encoder of the night before if it was another, else None.
    """

    night: NightFigures
    figures: Mapping[str, Judged]
    limit: float
    num_ready: int
    former_checkpoint_id: str | None = None

    @property
    def is_retrained(self) -> bool:
        """Whether another encoder made the embeddings of the night before."""
        return self.former_checkpoint_id is not None

    @property
    def expected_counts(self) -> dict[str, float]:
        """Events expected of each type that is followed, none before anything is expected."""
        total = self.figures.get("num_events")
        return {
            name.removeprefix(TYPE_PREFIX): judged.expected * total.expected
            for name, judged in self.figures.items()
            if is_type(name) and total is not None
        }

    def alarms(self, group: Group) -> list[str]:
        """Return the figures of a group that alarm, the furthest off first."""
        found = [
            name
            for name, judged in self.figures.items()
            if judged.is_alarm and figure_of(name).group == group
        ]
        return sorted(found, key=lambda name: -abs(self.figures[name].score or 0.0))


@dataclass
class _Past:
    """What was learnt from the nights so far."""

    per_year: float
    calm_nights: int
    series: dict[str, Series] = field(default_factory=dict)
    counts: list[dict[str, int]] = field(default_factory=list)  # of nights since the mix changed
    last: NightFigures | None = None

    def eve_of(self, night: NightFigures) -> NightFigures | None:
        """Return the figures of the day before a night, None if there are none."""
        is_eve = self.last is not None and (night.cutoff - self.last.cutoff).days == 1
        return self.last if is_eve else None

    def series_of(self, name: str) -> Series:
        """Return a figure's nights."""
        return self.series.setdefault(name, Series(figure_of(name).floor, self.calm_nights))

    def usual_events(self) -> dict[str, int]:
        """Return the events of the last nights together, by type; none of too few nights."""
        last = self.counts[-MIX_NIGHTS:]
        if len(last) < MIN_LEVEL_NIGHTS:
            return {}
        names = {name for counts in last for name in counts}
        return {name: sum(counts.get(name, 0) for counts in last) for name in names}

    def followed_types(self, counts: Mapping[str, int]) -> list[str]:
        """Return the event types that are figures: those that once were frequent.

        A type joins on a night with enough events to miss them, as long as there is room.
        """
        known = [name.removeprefix(TYPE_PREFIX) for name in self.series if is_type(name)]
        joining = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
        new = [name for name, count in joining if count >= MIN_EXPECTED and name not in known]
        return known + new[: max(MAX_EVENT_TYPES - len(known), 0)]


def judge_history(
    nights: Sequence[NightFigures], per_year: float, calm_nights: int
) -> list[Judgement]:
    """Judge nights in order, each by those before it alone.

    Args:
        nights: from `read_history`.
        per_year: false alarms, see `nightly_limit`.
        calm_nights: before the first alarm.
    """
    past = _Past(per_year, calm_nights)
    return [_judge(night, past) for night in nights]


def _judge(night: NightFigures, past: _Past) -> Judgement:
    """Judge a night and take it in."""
    eve = past.eve_of(night)
    former = _former_checkpoint(night, eve)
    values = dict(_values(night, eve, past))
    limit = nightly_limit([past.series_of(name) for name in values], past.per_year)
    num_ready = sum(past.series_of(name).is_ready for name in values)
    judged: dict[str, Judged] = {}
    for name, value in values.items():
        figure, series = figure_of(name), past.series_of(name)
        is_explained = former is not None and figure.group == "embeddings"
        found = _score(series, figure, value, night, limit, is_explained=is_explained)
        if found is not None:
            base = figure.to(eve.figures[name]) if figure.is_change and eve is not None else 0.0
            is_alarm = _is_alarm(found, figure, limit)
            judged[name] = _in_units(figure, base, found, is_alarm=is_alarm)
    result = Judgement(night, judged, limit, num_ready, former)
    _remember(result, past)
    return result


def _former_checkpoint(night: NightFigures, eve: NightFigures | None) -> str | None:
    """Return the encoder of the night before if it was another: as recorded, or as it lies there.

    The two differ where the night before was embedded again.
    """
    known = (eve.checkpoint_id if eve is not None else None, night.previous_checkpoint_id)
    return next((each for each in known if each not in {None, night.checkpoint_id}), None)


def _score(
    series: Series,
    figure: Figure,
    value: float,
    night: NightFigures,
    limit: float,
    *,
    is_explained: bool,
) -> Score | None:
    """Judge a figure and take it in; what another encoder explains begins a new level."""
    weekday = night.cutoff.weekday()
    found = series.score(value, weekday, limit)
    if not is_explained:
        is_alarm = found is not None and _is_alarm(found, figure, limit)
        series.settle(value, weekday, found, is_alarm=is_alarm)
    elif not figure.is_change:
        series.begin_level()
    return found


def _remember(result: Judgement, past: _Past) -> None:
    """Take a night's events in; those before another mix are no measure any more."""
    past.last = result.night
    if result.night.event_counts is not None:
        has_new_mix = any(name != "num_events" for name in result.alarms("events"))
        last = [*past.counts[-MIX_NIGHTS:], result.night.event_counts]
        past.counts = [] if has_new_mix else last


def _values(
    night: NightFigures, eve: NightFigures | None, past: _Past
) -> Iterator[tuple[str, float]]:
    """Yield the figures of a night in the units in which they are judged."""
    measured = dict(night.figures) | dict(_event_figures(night, past))
    before = eve.figures if eve is not None else {}
    for name, figure in FIGURES.items():
        if name not in measured or (name in _COMPARED and not night.follows_its_eve):
            continue
        value = figure.to(measured[name])
        if not figure.is_change:
            yield name, value
        elif name in before:
            yield name, value - figure.to(before[name])
    yield from _type_shares(night, past)


def _event_figures(night: NightFigures, past: _Past) -> Iterator[tuple[str, float]]:
    """Yield how many events came and how far their mix is from the usual one."""
    if night.event_counts is None:
        return
    yield "num_events", max(float(sum(night.event_counts.values())), 0.5)
    usual = past.usual_events()
    if usual:
        yield "event_mix_psi", mix_stability(night.event_counts, usual)


def _type_shares(night: NightFigures, past: _Past) -> Iterator[tuple[str, float]]:
    """Yield the share of each event type that is followed, among the night's events.

    As the arc sine of its root, whose variance hardly depends on the share, so that a type that
    has become rare is judged as fairly (Anscombe, "The transformation of Poisson, binomial and
    negative-binomial data", Biometrika 1948).
    """
    if night.event_counts is None:
        return
    total = sum(night.event_counts.values())
    for name in past.followed_types(night.event_counts):
        share = (night.event_counts.get(name, 0) + 0.375) / (total + 0.75)
        yield TYPE_PREFIX + name, float(np.arcsin(np.sqrt(share)))


def _is_alarm(found: Score, figure: Figure, limit: float) -> bool:
    """Tell whether a score is beyond the limit, on a side that counts."""
    if found.score is None or (figure.is_one_sided and not found.is_high):
        return False
    return abs(found.score) > limit


def _in_units(figure: Figure, base: float, found: Score, *, is_alarm: bool) -> Judged:
    """Return a score in the units of the figure; `base` is the night before if that is judged."""
    low = -np.inf if figure.is_one_sided else found.expected - found.width
    limits = (found.value, found.expected, low, found.expected + found.width)
    value, expected, low, high = (
        figure.back(base + number) if np.isfinite(number) else number for number in limits
    )
    return Judged(value, expected, low, high, found.score, is_alarm)


def with_names(judgements: Iterable[Judgement]) -> list[str]:
    """Return the figures of a history, those of the frequent event types last."""
    found = {name for judgement in judgements for name in judgement.figures}
    return [name for name in FIGURES if name in found] + sorted(found - set(FIGURES))
