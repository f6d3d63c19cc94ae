"""A user's history in a few scalars: how much, how long, how regular, how recent.

All are functions of events before the cutoff and of nothing else. They are logarithms, brought to
about unit size by fixed constants, so that no statistics of a training set need to be kept.

Legend of shapes: N tokens, R runs (a user's events each), C cutoffs of each run, B users, T events.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final

import torch
from torch import Tensor

VISIT_GAP_DAYS: Final = 0.5
"""An event after a longer gap begins a visit: roughly a day on which the user came."""

DECAY_DAYS: Final = (7.0, 30.0, 90.0, 365.0)
"""Decay times of counts of visits: a visit counts exp(-days since it / decay time)."""

HISTORY_SCALARS: Final = (
    "num_events",
    "tenure",
    "num_visits",
    "visit_interval",
    "events_a_visit",
    "last_visit_gap",
    "longest_visit_gap",
    "visits_7",
    "visits_30",
    "visits_90",
    "visits_365",
    "typical_visit_gap",
    "visit_gap_spread",
)
"""What each of the K columns of `history_scalars` tells: log(1 + x) / 3 of days or counts, those of
`visits_*` decayed as of the last event; the last two are a third of the mean of log(1 + gap) over
the gaps in days between visits, and the standard deviation of the same logarithms."""

SILENCE_SCALARS: Final = (
    "silence",
    "overdue",
    "overdue_typical",
    "overdue_longest",
    "fresh_7",
    "fresh_30",
    "fresh_90",
    "visits_now_7",
    "visits_now_30",
    "visits_now_90",
    "visits_now_365",
)
"""What each column of `silence_scalars` tells: log(1 + days) / 3; a third of the log of silence
over the user's own interval between visits, over their typical and over their longest gap;
exp(-days / 7), exp(-days / 30), exp(-days / 90); and the decayed visits as of the cutoff."""

BEFORE: Final = (
    "num_events",
    "days",
    "num_visits",
    "num_gaps",
    "log_gaps",
    "squared_log_gaps",
    "longest_gap",
    *(f"visits_{days:g}" for days in DECAY_DAYS),
)
"""What is told of the events before those that are read: their number, the days from the very first
event to the first that is read, visits; number, sum and sum of squares of log(1 + gap) and longest
of the gaps between visits, in days; visits decayed as of the first event that is read."""

_FRESHNESS_DAYS: Final = (7.0, 30.0, 90.0)
_SCALE: Final = 3.0
_GAPS: Final = slice(BEFORE.index("num_gaps"), BEFORE.index("longest_gap"))
_LONGEST: Final = BEFORE.index("longest_gap")
_DECAYED: Final = slice(BEFORE.index("visits_7"), None)
_INTERVAL: Final = HISTORY_SCALARS.index("visit_interval")
_LONGEST_GAP: Final = HISTORY_SCALARS.index("longest_visit_gap")
_TYPICAL_GAP: Final = HISTORY_SCALARS.index("typical_visit_gap")
_VISITS: Final = slice(
    HISTORY_SCALARS.index("visits_7"), HISTORY_SCALARS.index("typical_visit_gap")
)


@dataclass(frozen=True)
class Prefixes:
    """The first events of R runs, as they were known at C cutoffs each.

    Attributes:
        rows: the run of each token, R for tokens of none, (N,) int64.
        places: each token's place in its run, (N,) int64.
        gap_days: days since the event before, (N,) float32.
        elapsed_days: days since the run's first event, (N,) float64.
        starts: each run's first token, (R,) int64; any token for an empty run.
        lengths: events of each run known at each cutoff, (R, C) int64, rising along C.
        before: what came before each run's first event, (R, len(BEFORE)) float32.
    """

    rows: Tensor
    places: Tensor
    gap_days: Tensor
    elapsed_days: Tensor
    starts: Tensor
    lengths: Tensor
    before: Tensor

    @property
    def num_rows(self) -> int:
        """R."""
        return self.lengths.shape[0]

    @property
    def num_cuts(self) -> int:
        """C."""
        return self.lengths.shape[1]

    def last_tokens(self) -> Tensor:
        """Return the last token known at each cutoff, (R x C,); any token where none is."""
        last = self.starts[:, None] + (self.lengths - 1).clamp(min=0)
        return last.reshape(-1).clamp(max=len(self.rows) - 1)

    def last_elapsed(self) -> Tensor:
        """Return the days from each run's first event to the last one known, (R, C) float64."""
        elapsed = self.elapsed_days.index_select(0, self.last_tokens()).view(self.lengths.shape)
        return torch.where(self.lengths > 0, elapsed, 0.0)

    def of_tokens(self, values: Tensor) -> Tensor:
        """Return for each token the value of its run, (N, ...) of (R, ...); zero for none."""
        nothing = values.new_zeros(1, *values.shape[1:])
        return torch.cat((values, nothing)).index_select(0, self.rows)

    def sum_by_run(self, values: Tensor) -> Tensor:
        """Add up the values (N, ...) of each run's tokens, (R, ...)."""
        total = values.new_zeros(self.num_rows + 1, *values.shape[1:])
        return total.index_add(0, self.rows, values)[:-1]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Prefixes:
        """Return the prefixes on a device."""
        tensors = {item.name: getattr(self, item.name) for item in fields(self)}
        return Prefixes(
            **{name: value.to(device, non_blocking=non_blocking) for name, value in tensors.items()}
        )

    def pin_memory(self) -> Prefixes:
        """Return the prefixes in memory that a GPU can fetch from while others work."""
        tensors = {item.name: getattr(self, item.name) for item in fields(self)}
        return Prefixes(**{name: value.pin_memory() for name, value in tensors.items()})


def history_at(prefixes: Prefixes) -> Tensor:
    """Summarise runs as of the last event known at each cutoff.

    Returns:
        (R, C, K) float32 with the columns of HISTORY_SCALARS; zeros for an empty history.
    """
    lengths = prefixes.of_tokens(prefixes.lengths)
    known = prefixes.places[:, None] < lengths
    is_visit = known & _starts_visit(prefixes)[:, None]
    before = prefixes.before
    num_events = before[:, :1] + prefixes.lengths
    num_visits = before[:, 2:3] + prefixes.sum_by_run(is_visit.float())
    tenure = before[:, 1:2] + prefixes.last_elapsed()
    is_gap = known & (prefixes.gap_days >= VISIT_GAP_DAYS)[:, None]
    columns = [
        num_events,
        tenure,
        num_visits,
        tenure / (num_visits - 1).clamp(min=1),
        num_events / num_visits.clamp(min=1),
        _last_visit_gap(prefixes, is_visit),
        _longest_gap(prefixes, is_gap),
        *_decayed_visits(prefixes, is_visit).unbind(-1),
    ]
    logs = torch.stack([column.float().log1p() / _SCALE for column in columns], dim=-1)
    return torch.cat((logs, _regularity(prefixes, is_gap)), dim=-1)


def _decayed_visits(prefixes: Prefixes, is_visit: Tensor) -> Tensor:
    """Count visits (N, C), each by its age at the last event known, (R, C, len(DECAY_DAYS))."""
    days = prefixes.before.new_tensor(DECAY_DAYS)
    last = prefixes.last_elapsed()
    ago = (prefixes.of_tokens(last) - prefixes.elapsed_days[:, None]).clamp(min=0.0)
    weights = torch.exp(-ago[..., None].float() / days) * is_visit[..., None]
    older = prefixes.before[:, None, _DECAYED] * torch.exp(-last[..., None].float() / days)
    return older + prefixes.sum_by_run(weights)


def _longest_gap(prefixes: Prefixes, is_gap: Tensor) -> Tensor:
    """Return the longest gap in days between visits known at each cutoff, (R, C); 0 without one.

    Args:
        prefixes: the runs.
        is_gap: whose gaps count, (N, C).
    """
    older = prefixes.before[:, _LONGEST, None]
    gaps = torch.where(is_gap, prefixes.gap_days[:, None], 0.0).to(older.dtype)
    rows = prefixes.rows[:, None].expand_as(is_gap)
    found = torch.cat((older, older.new_zeros(1, 1))).repeat(1, is_gap.shape[1])
    return found.scatter_reduce(0, rows, gaps, reduce="amax")[:-1]


def _regularity(prefixes: Prefixes, is_gap: Tensor) -> Tensor:
    """Return a third of the mean and the standard deviation of log(1 + gap), (R, C, 2).

    Args:
        prefixes: the runs.
        is_gap: whose gaps count, (N, C).
    """
    logs = prefixes.gap_days.double().log1p()
    # Sums of squares in float64: their differences would be noise.
    moments = torch.stack((torch.ones_like(logs), logs, logs * logs), dim=-1)
    sums = prefixes.sum_by_run(is_gap[..., None] * moments[:, None])
    sums = sums + prefixes.before[:, None, _GAPS].double()
    count = sums[..., 0].clamp(min=1.0)
    mean = sums[..., 1] / count
    variance = (sums[..., 2] / count - mean * mean).clamp(min=0.0)
    spread = torch.where(count > 1, variance, 0.0).sqrt()
    return torch.stack((mean / _SCALE, spread), dim=-1).float()


def history_scalars(gap_days: Tensor, lengths: Tensor, before: Tensor) -> Tensor:
    """Summarise padded histories as of their last event.

    Args:
        gap_days: days since the event before, (B, T), right padded.
        lengths: events that are read, (B,).
        before: what came before the events that are read, (B, len(BEFORE)), as in `Prefixes`.

    Returns:
        (B, K) float32 with the columns of HISTORY_SCALARS; zeros for an empty history.
    """
    return history_at(padded_prefixes(gap_days, lengths, before))[:, 0]


def padded_prefixes(gap_days: Tensor, lengths: Tensor, before: Tensor) -> Prefixes:
    """Return the prefixes of padded histories (B, T): one cutoff each, after their last event."""
    rows, length = gap_days.shape
    users = torch.arange(rows, device=gap_days.device)
    places = torch.arange(length, device=gap_days.device)
    return Prefixes(
        rows=users.repeat_interleave(length),
        places=places.repeat(rows),
        gap_days=gap_days.reshape(-1),
        elapsed_days=elapsed_days(gap_days).reshape(-1),
        starts=users * length,
        lengths=lengths[:, None],
        before=before,
    )


def silence_scalars(history: Tensor, silence_days: Tensor) -> Tensor:
    """Relate the silence since the last event, (B,) days, to the history (B, K).

    Returns:
        (B, len(SILENCE_SCALARS)) float32.
    """
    interval_days = torch.expm1(history[:, _INTERVAL] * _SCALE)
    silence = silence_days.log1p() / _SCALE
    columns = [
        silence,
        ((silence_days + 1) / (interval_days + 1)).log() / _SCALE,
        silence - history[:, _TYPICAL_GAP],
        silence - history[:, _LONGEST_GAP],
        *(torch.exp(-silence_days / days) for days in _FRESHNESS_DAYS),
    ]
    decay = torch.exp(-silence_days[:, None] / history.new_tensor(DECAY_DAYS))
    visits = torch.expm1(history[:, _VISITS] * _SCALE) * decay
    return torch.cat((torch.stack(columns, dim=1), visits.log1p() / _SCALE), dim=1)


def elapsed_days(gap_days: Tensor) -> Tensor:
    """Return the days (B, T) from the first event that is read to each event, float64."""
    exact = gap_days.double()
    return exact.cumsum(1) - exact[:, :1]


def _starts_visit(prefixes: Prefixes) -> Tensor:
    """Tell which tokens (N,) begin a visit; a user's very first event does."""
    is_first = (prefixes.places == 0) & (prefixes.of_tokens(prefixes.before[:, 0]) == 0)
    return is_first | (prefixes.gap_days >= VISIT_GAP_DAYS)


def _last_visit_gap(prefixes: Prefixes, is_visit: Tensor) -> Tensor:
    """Return the gap in days (R, C) before the latest visit known, 0 without one.

    Args:
        prefixes: the runs.
        is_visit: which tokens begin a visit known at each cutoff, (N, C).
    """
    tokens = torch.arange(len(is_visit), device=is_visit.device)[:, None]
    latest = torch.full(
        (prefixes.num_rows + 1, prefixes.num_cuts), -1, device=is_visit.device, dtype=torch.int64
    ).scatter_reduce(
        0,
        prefixes.rows[:, None].expand_as(is_visit),
        torch.where(is_visit, tokens, -1),
        reduce="amax",
    )[:-1]
    gaps = prefixes.gap_days.index_select(0, latest.reshape(-1).clamp(min=0)).view(latest.shape)
    return torch.where(latest >= 0, gaps, 0.0)
