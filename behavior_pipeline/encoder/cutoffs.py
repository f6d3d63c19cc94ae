"""Training batches: every user's history is cut at a random moment, and what follows is the label.

Cutoffs are drawn in wall time, alike for all users, so that users who fell silent appear with the
long silences that nightly cutoffs meet. A label window ends within the training data, so that "no
event" is an observation and not a gap in what is known.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from behavior_pipeline.contracts import NUM_SPECIAL_IDS
from behavior_pipeline.encoder.batches import EventBatch, pad, padded_length
from behavior_pipeline.encoder.configuration import EncoderConfig, TrainingConfig
from behavior_pipeline.encoder.sequence_files import (
    MICROSECONDS_A_DAY,
    Ints,
    SequenceTable,
    Survey,
    read_in_order,
    read_shuffled,
    to_microseconds,
)
from behavior_pipeline.errors import PipelineError

WINDOW_FIELDS: Final = ("action", "category", "item")
"""Fields whose values in the label window are predicted as a set."""

NEXT_TIME_SHARES: Final = (1 / 30, 3 / 30, 7 / 30, 14 / 30, 21 / 30, 1.0)
"""Inner edges of the classes of "time to the next event", as shares of the horizon; the class
beyond the last edge means: none within the horizon."""

MAX_BATCH_USERS: Final = 512
"""Users in a batch at the most, however short their histories."""

_HASH_RANGE: Final = 10_000
_RARE_SHARE: Final = 0.01  # how often an unseen window target occurs for the imagined user


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
class CutLabels:
    """One cutoff of each of B users: what was known then, and what came.

    Attributes:
        lengths: how many of the batch's `history` events are before the cutoff, (B,) int64.
        silence_days: days from the last of them to the cutoff, 0 without one, (B,) float32.
        next_time: class of the time from the cutoff to the next event, (B,) int64.
        window: per field, which of the lowest ids occur in the label window, (B, V') float32.
    """

    lengths: Tensor
    silence_days: Tensor
    next_time: Tensor
    window: Mapping[str, Tensor]

    def to(self, device: torch.device | str) -> CutLabels:
        """Return the labels on a device."""
        return CutLabels(
            self.lengths.to(device),
            self.silence_days.to(device),
            self.next_time.to(device),
            {field: values.to(device) for field, values in self.window.items()},
        )


@dataclass(frozen=True)
class TrainingBatch:
    """B users, each cut at random moments.

    Attributes:
        history: events before the latest cutoff; empty for users who came later.
        future: events from the latest cutoff on, as if they were all there is.
        cuts: the labels at each of the cutoffs, the latest first.
        typical_users: users of an average batch: what sums over users are divided by, so that
            users count alike in batches of short and of long histories.
    """

    history: EventBatch
    future: EventBatch
    cuts: tuple[CutLabels, ...]
    typical_users: float

    def to(self, device: torch.device | str) -> TrainingBatch:
        """Return the batch on a device."""
        return replace(
            self,
            history=self.history.to(device),
            future=self.future.to(device),
            cuts=tuple(cut.to(device) for cut in self.cuts),
        )

    @property
    def num_events(self) -> int:
        """Events in the batch."""
        return int(self.history.lengths.sum() + self.future.lengths.sum())


def window_sizes(encoder: EncoderConfig, config: TrainingConfig) -> dict[str, int]:
    """Return how many ids of each window field are predicted: the most frequent ones."""
    return {
        field: min(encoder.field_sizes[field] - NUM_SPECIAL_IDS, config.max_window_targets)
        for field in WINDOW_FIELDS
    }


def window_rates(batches: Sequence[TrainingBatch]) -> dict[str, Tensor]:
    """Return how often each window target occurs, per field (V',) inside (0, 1).

    Shares of users and cutoffs, shrunk towards "hardly ever" by one imagined user.
    """
    cuts = [cut for batch in batches for cut in batch.cuts]
    count = sum(len(cut.lengths) for cut in cuts)
    totals = {
        field: torch.stack([cut.window[field].sum(0) for cut in cuts]).sum(0)
        for field in (cuts[0].window if cuts else ())
    }
    return {field: (total + _RARE_SHARE) / (count + 1) for field, total in totals.items()}


def is_validation(user_ids: Sequence[str], share: float) -> NDArray[np.bool_]:
    """Tell which users are kept for validation: a stable function of the id alone."""
    hashes = np.fromiter((zlib.crc32(user.encode()) for user in user_ids), np.int64, len(user_ids))
    return hashes % _HASH_RANGE < share * _HASH_RANGE


class BatchMaker:
    """Makes training batches out of sequence files.

    Args:
        files: sequence files.
        encoder: shape of the encoder.
        config: the training.
        plan: where histories may be cut.
    """

    def __init__(
        self,
        files: Sequence[Path],
        encoder: EncoderConfig,
        config: TrainingConfig,
        plan: CutoffPlan,
    ) -> None:
        self.files = files
        self.config = config
        self.plan = plan
        self.max_events = encoder.max_events
        self.window_sizes = window_sizes(encoder, config)

    def training(self) -> Iterator[TrainingBatch]:
        """Yield batches without end, in an order and with cutoffs that the seed decides."""
        epoch = 0
        while True:
            random = np.random.default_rng([self.config.seed, epoch])
            empty = True
            for table in read_shuffled(self.files, self.config.shuffle_users, random):
                is_kept = is_validation(table.user_ids.to_pylist(), self.config.validation_share)
                users = np.flatnonzero(~is_kept & (table.lengths > 0))
                for batch in self._batches(table, users, random):
                    empty = False
                    yield batch
            if empty:
                raise PipelineError("No user is left for training.", "Lower validation_share.")
            epoch += 1

    def validation(self) -> list[TrainingBatch]:
        """Return the validation users' batches, the same at every call; maybe none."""
        random = np.random.default_rng([self.config.seed, 2**32 - 1])
        batches: list[TrainingBatch] = []
        left = self.config.max_validation_users
        for table in read_in_order(self.files, self.config.shuffle_users):
            is_kept = is_validation(table.user_ids.to_pylist(), self.config.validation_share)
            users = np.flatnonzero(is_kept & (table.lengths > 0))[:left]
            batches += self._batches(table, users, random)
            left -= len(users)
        return batches

    def _batches(
        self, table: SequenceTable, users: Ints, random: np.random.Generator
    ) -> Iterator[TrainingBatch]:
        """Cut users at random moments; yield batches of like lengths in random order."""
        users = random.permutation(users)
        cuts = self._draw_cuts(table, users, random)
        history = np.minimum(cuts[0].places - cuts[0].starts, self.max_events)
        future = np.minimum(cuts[0].ends - cuts[0].places, self.config.max_future_events)
        padded = padded_length(history, self.max_events)
        parts = _split(np.lexsort((future, padded)), padded, self.config.batch_tokens)
        for index in random.permutation(len(parts)):
            part = parts[index]
            taken = [cut.take(part) for cut in cuts]
            batch = self._batch(table, taken, history[part], future[part])
            yield replace(batch, typical_users=len(users) / len(parts))

    def _draw_cuts(
        self, table: SequenceTable, users: Ints, random: np.random.Generator
    ) -> list[Cuts]:
        """Draw moments for every user; return one cut of all users each, the latest first."""
        shape = len(users), self.config.cutoffs_per_user
        moments = random.integers(self.plan.earliest, self.plan.latest, shape, endpoint=True)
        latest_first = np.sort(moments, axis=1)[:, ::-1].T.copy()
        return [Cuts.at(table, users, column, self.plan.horizon) for column in latest_first]

    def _batch(
        self, table: SequenceTable, cuts: list[Cuts], history: Ints, future: Ints
    ) -> TrainingBatch:
        """Pad the events before and after the latest cut and look up the labels of all cuts."""
        latest, rows = cuts[0], len(history)
        first = latest.places - history
        shape = rows, int(padded_length(history, self.max_events).max())
        past = pad(table, latest.users, first, history, shape)
        shape = rows, int(padded_length(future, self.config.max_future_events).max())
        ahead = pad(table, latest.users, latest.places, future, shape)
        return TrainingBatch(
            history=replace(past, silence_days=torch.from_numpy(latest.silence_days(table))),
            future=_as_beginning(ahead),
            cuts=tuple(self._labels(table, cut, first) for cut in cuts),
            typical_users=float(rows),
        )

    def _labels(self, table: SequenceTable, cuts: Cuts, first: Ints) -> CutLabels:
        """Look up what is known and what comes at cuts; `first` is what histories begin with."""
        return CutLabels(
            # An earlier cut may lie before the newest events that were read: then none is known.
            lengths=torch.from_numpy(np.maximum(cuts.places - first, 0)),
            silence_days=torch.from_numpy(cuts.silence_days(table)),
            next_time=torch.from_numpy(cuts.next_time(table, self.plan.horizon)),
            window={
                field: torch.from_numpy(cuts.window(table, field, size))
                for field, size in self.window_sizes.items()
            },
        )


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
            places=_places_of(table, users, moments),
            window_ends=_places_of(table, users, moments + horizon),
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

    def window(self, table: SequenceTable, field: str, size: int) -> NDArray[np.float32]:
        """Return which of a field's `size` lowest ids occur in the label window, (n, size)."""
        counts = self.window_ends - self.places
        rows = np.repeat(np.arange(len(counts)), counts)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        ids = table.ids[field][np.repeat(self.places, counts) + within] - NUM_SPECIAL_IDS
        is_target = (ids >= 0) & (ids < size)
        found = np.zeros((len(counts), size), np.float32)
        found[rows[is_target], ids[is_target]] = 1
        return found


def _places_of(table: SequenceTable, users: Ints, moments: Ints) -> Ints:
    """Return the flat place of each user's first event at or after a moment.

    Binary search in all lists at once: as many passes as the longest list has binary digits.
    """
    low, high = table.offsets[users].copy(), table.offsets[users + 1].copy()
    while (is_open := low < high).any():
        middle = (low + high) // 2
        is_before = is_open & (table.times[np.minimum(middle, len(table.times) - 1)] < moments)
        low = np.where(is_before, middle + 1, low)
        high = np.where(is_open & ~is_before, middle, high)
    return low


def _split(order: Ints, padded: Ints, batch_tokens: int) -> list[Ints]:
    """Cut users in order of padded length into batches of at most `batch_tokens` padded tokens."""
    parts: list[Ints] = []
    for length in np.unique(padded):
        users = order[padded[order] == length]
        size = min(MAX_BATCH_USERS, max(1, batch_tokens // int(length)))
        parts += [users[begin : begin + size] for begin in range(0, len(users), size)]
    return parts


def _as_beginning(batch: EventBatch) -> EventBatch:
    """Forget what came before a window: no events, and no gap before its first one."""
    gap_days = batch.gap_days.clone()
    gap_days[:, 0] = 0
    return replace(batch, gap_days=gap_days, before=torch.zeros_like(batch.before))
