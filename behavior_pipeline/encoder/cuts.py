"""Histories cut at moments: what was known then, and what came.

Cutoffs are drawn in wall time, alike for all users, so that users who fell silent appear with the
long silences that nightly cutoffs meet. A label window ends within the training data, so that "no
event" is an observation and not a gap in what is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Final

import numpy as np
from numpy.typing import NDArray

from behavior_pipeline.contracts import NUM_SPECIAL_IDS
from behavior_pipeline.encoder.configuration import TrainingConfig
from behavior_pipeline.encoder.sequence_files import (
    MICROSECONDS_A_DAY,
    Ints,
    SequenceTable,
    Survey,
    first_at_or_after,
    places_between,
    to_microseconds,
)

NEXT_TIME_SHARES: Final = (1 / 30, 3 / 30, 7 / 30, 14 / 30, 21 / 30, 1.0)
"""Inner edges of the classes of "time to the next event", as shares of the horizon; the class
beyond the last edge means: none within the horizon."""


@dataclass(frozen=True)
class CutoffPlan:
    """Where training may cut histories, in microseconds since 1970.

    Attributes:
        earliest: first possible cutoff.
        latest: last possible cutoff: its label window still ends within the training data.
        horizon: length of the label window.
    """

    earliest: int
    latest: int
    horizon: int


def plan_cutoffs(survey: Survey, config: TrainingConfig) -> CutoffPlan:
    """Choose the range of cutoffs; short training shortens the horizon to its third."""
    span = survey.trained_through - survey.started_at
    horizon = min(timedelta(days=config.horizon_days), span / 3)
    reach = max(span * config.cutoff_share, 1.5 * horizon)
    through = to_microseconds(survey.trained_through)
    length = horizon // timedelta(microseconds=1)
    return CutoffPlan(through - reach // timedelta(microseconds=1), through - length, length)


@dataclass(frozen=True)
class Cuts:
    """Users of a table cut at moments; all arrays have one entry per user.

    Attributes:
        users: rows of the table.
        moments: the cutoffs, in microseconds since 1970.
        starts: flat place of each list's first event.
        places: flat place of the first event at or after the cutoff.
        window_ends: flat place of the first event after the label window.
        ends: flat place after each list's last event.
    """

    users: Ints
    moments: Ints
    starts: Ints
    places: Ints
    window_ends: Ints
    ends: Ints

    @classmethod
    def at(cls, table: SequenceTable, users: Ints, moments: Ints, horizon: int) -> Cuts:
        """Cut users' lists at moments."""
        return cls(
            users=users,
            moments=moments,
            starts=table.offsets[users],
            places=first_at_or_after(table.times, table.offsets, users, moments),
            window_ends=first_at_or_after(table.times, table.offsets, users, moments + horizon),
            ends=table.offsets[users + 1],
        )

    def take(self, rows: Ints) -> Cuts:
        """Return some of the cuts."""
        return Cuts(
            self.users[rows], self.moments[rows], self.starts[rows], self.places[rows],
            self.window_ends[rows], self.ends[rows],
        )  # fmt: skip

    def silence_days(self, table: SequenceTable) -> NDArray[np.float32]:
        """Return the days from the last event before each cut to it, 0 without one."""
        days = (self.moments - table.times[np.maximum(self.places - 1, 0)]) / MICROSECONDS_A_DAY
        return np.where(self.places > self.starts, days, 0).astype(np.float32)

    def next_time(self, table: SequenceTable, horizon: int) -> Ints:
        """Return the class of the time to the next event."""
        edges = np.array(NEXT_TIME_SHARES) * horizon
        next_times = table.times[np.minimum(self.places, len(table.times) - 1)]
        wait = np.where(self.places < self.window_ends, next_times - self.moments, horizon)
        classes: Ints = np.searchsorted(edges, wait, side="right")
        return classes

    def window(self, table: SequenceTable, field: str, size: int) -> NDArray[np.bool_]:
        """Return which of a field's `size` lowest ids occur in the label window, (n, size)."""
        rows, places = places_between(self.places, self.window_ends)
        ids = table.ids[field][places] - NUM_SPECIAL_IDS
        is_target = (ids >= 0) & (ids < size)
        found = np.zeros((len(self.places), size), np.bool_)
        found[rows[is_target], ids[is_target]] = True
        return found
