"""Observation cutoffs, label windows, and which cutoffs train and test a probe.

A feature at a cutoff uses `occurred_at < cutoff`. Labels live in `[cutoff, cutoff + horizon)`.
A nightly partition is named after its day; its cutoff is the midnight that ends that day.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta

from behavior_pipeline.errors import PipelineError


@dataclass(frozen=True)
class EvaluationWindows:
    """The cutoffs of one night.

    Attributes:
        cutoff: the observation cutoff of the night itself; users are scored here.
        train_cutoff: where probes are fitted; encoder and vocabulary know nothing after it.
        test_cutoff: where probes are judged, `train_cutoff + horizon`.
        horizon: length of the label window.
        lookback: how far before a cutoff a user must have acted to be in the population.
    """

    cutoff: datetime
    train_cutoff: datetime
    test_cutoff: datetime
    horizon: timedelta
    lookback: timedelta

    @property
    def cutoffs(self) -> tuple[datetime, ...]:
        """The distinct cutoffs that features are needed at, in order."""
        return tuple(sorted({self.train_cutoff, self.test_cutoff, self.cutoff}))


def parse_cutoff(text: str) -> datetime:
    """Parse `YYYY-MM-DD` as a midnight in UTC.

    Raises:
        PipelineError: if the text is no such date.
    """
    try:
        return midnight(date.fromisoformat(text))
    except ValueError:
        raise PipelineError(
            f"'{text}' is not a date.", "Give the cutoff as YYYY-MM-DD; it means midnight UTC."
        ) from None


def midnight(day: date) -> datetime:
    """Return the midnight in UTC that begins a day."""
    return datetime.combine(day, time(), tzinfo=UTC)


def partition_of(cutoff: datetime) -> str:
    """Return the nightly partition whose end is the cutoff: the day before it."""
    return f"{cutoff - timedelta(days=1):%Y-%m-%d}"


def cutoff_of(partition: str) -> datetime:
    """Return the cutoff of a nightly partition: the midnight that ends its day."""
    return parse_cutoff(partition) + timedelta(days=1)


def plan_evaluation(
    cutoff: datetime,
    first_event_at: datetime,
    last_event_at: datetime,
    horizon_days: int,
    lookback_days: int,
) -> EvaluationWindows:
    """Choose the latest train and test cutoffs whose label windows the data covers.

    If events reach a whole horizon past the cutoff (a historical study), probes are tested at the
    cutoff itself; in a live night the future is not known, so they are tested one horizon earlier.

    Raises:
        PipelineError: if the horizon or lookback is not positive, or the cutoff or the windows
            that it needs lie outside the data.
    """
    check_positive_windows(horizon_days, lookback_days)
    horizon = timedelta(days=horizon_days)
    span = f"{first_event_at:%Y-%m-%d} to {last_event_at:%Y-%m-%d}"
    if not first_event_at < cutoff <= last_event_at + timedelta(days=1):
        raise PipelineError(
            f"The cutoff {cutoff:%Y-%m-%d} is outside the data, which run from {span}.",
            "Choose a cutoff inside that span.",
        )
    is_future_known = cutoff + horizon <= last_event_at
    test_cutoff = cutoff if is_future_known else cutoff - horizon
    train_cutoff = test_cutoff - horizon
    if train_cutoff <= first_event_at:
        raise PipelineError(
            f"Probes for the cutoff {cutoff:%Y-%m-%d} would be trained at "
            f"{train_cutoff:%Y-%m-%d}, before the first event ({span}).",
            f"Choose a later cutoff, or a shorter horizon than {horizon_days} days.",
        )
    return EvaluationWindows(
        cutoff, train_cutoff, test_cutoff, horizon, timedelta(days=lookback_days)
    )


def default_cutoff(last_event_at: datetime, horizon_days: int) -> datetime:
    """Return the latest midnight whose whole label window lies inside the data."""
    return midnight((last_event_at - timedelta(days=horizon_days)).date())


def check_positive_windows(horizon_days: int, lookback_days: int) -> None:
    """Refuse windows without a length.

    Raises:
        PipelineError: naming the window.
    """
    for name, days in (("horizon", horizon_days), ("lookback", lookback_days)):
        if days <= 0:
            raise PipelineError(
                f"The {name} is {days} days; it must be at least 1.",
                f"Set a positive number of days with --{name}-days or in the preset.",
            )
