"""A user's history in a few scalars: how much, how long, how regular, how recent.

All are functions of events before the cutoff and of nothing else. They are logarithms, brought to
about unit size by fixed constants, so that no statistics of a training set need to be kept.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

VISIT_GAP_DAYS: Final = 0.5
"""An event after a longer gap begins a visit: roughly a day on which the user came."""

HISTORY_SCALARS: Final = (
    "num_events",
    "tenure",
    "num_visits",
    "visit_interval",
    "events_a_visit",
    "last_visit_gap",
    "recent_visits_30",
    "recent_visits_90",
    "recent_visits_180",
    "recent_events_30",
    "recent_events_90",
)
"""What each of the K columns of `history_scalars` tells, each as log(1 + x) / 3; days or counts."""

SILENCE_SCALARS: Final = ("silence", "overdue", "fresh_7", "fresh_30", "fresh_90")
"""What each column of `silence_scalars` tells: log(1 + days) / 3; the log of silence over the
user's own interval between visits; exp(-days / 7), exp(-days / 30), exp(-days / 90)."""

_RECENT_VISIT_DAYS: Final = (30.0, 90.0, 180.0)
_RECENT_EVENT_DAYS: Final = (30.0, 90.0)
_FRESHNESS_DAYS: Final = (7.0, 30.0, 90.0)
_SCALE: Final = 3.0
_INTERVAL: Final = HISTORY_SCALARS.index("visit_interval")


def history_scalars(gap_days: Tensor, lengths: Tensor, before: Tensor) -> Tensor:
    """Summarise histories as of their last event.

    Args:
        gap_days: days since the event before, (B, T), right padded.
        lengths: events that are read, (B,).
        before: what came before the events that are read, (B, 3): number of events, days from the
            very first event to the first that is read, number of visits.

    Returns:
        (B, K) float32 with the columns of HISTORY_SCALARS; zeros for an empty history.
    """
    ago, valid = days_before_last(gap_days, lengths)
    is_visit = _starts_visit(gap_days, before[:, 0]) & valid
    num_events = before[:, 0] + lengths
    num_visits = before[:, 2] + is_visit.sum(1)
    tenure = before[:, 1] + torch.where(valid, ago, 0.0).amax(1)
    columns = [
        num_events,
        tenure,
        num_visits,
        tenure / (num_visits - 1).clamp(min=1),
        num_events / num_visits.clamp(min=1),
        _last_visit_gap(gap_days, is_visit),
        *[(is_visit & (ago <= days)).sum(1) for days in _RECENT_VISIT_DAYS],
        *[(valid & (ago <= days)).sum(1) for days in _RECENT_EVENT_DAYS],
    ]
    return torch.stack([column.float().log1p() / _SCALE for column in columns], dim=1)


def silence_scalars(history: Tensor, silence_days: Tensor) -> Tensor:
    """Relate the silence since the last event, (B,) days, to the history (B, K).

    Returns:
        (B, 5) with the columns of SILENCE_SCALARS.
    """
    interval_days = torch.expm1(history[:, _INTERVAL] * _SCALE)
    overdue = ((silence_days + 1) / (interval_days + 1)).log() / _SCALE
    fresh = [torch.exp(-silence_days / days) for days in _FRESHNESS_DAYS]
    return torch.stack([silence_days.log1p() / _SCALE, overdue, *fresh], dim=1)


def elapsed_days(gap_days: Tensor) -> Tensor:
    """Return the days (B, T) from the first event that is read to each event."""
    return gap_days.cumsum(1) - gap_days[:, :1]


def days_before_last(gap_days: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many days before the last event each was, and which places hold one, (B, T)."""
    valid = torch.arange(gap_days.shape[1], device=gap_days.device) < lengths[:, None]
    elapsed = elapsed_days(gap_days)
    last = elapsed.gather(1, (lengths - 1).clamp(min=0)[:, None])
    return (last - elapsed).clamp(min=0.0), valid


def _starts_visit(gap_days: Tensor, num_events_before: Tensor) -> Tensor:
    """Tell which events (B, T) begin a visit; a user's very first event does."""
    is_first = torch.zeros_like(gap_days, dtype=torch.bool)
    is_first[:, 0] = num_events_before == 0
    return is_first | (gap_days >= VISIT_GAP_DAYS)


def _last_visit_gap(gap_days: Tensor, is_visit: Tensor) -> Tensor:
    """Return the gap in days (B,) before the latest visit that is read, 0 without one."""
    places = torch.arange(gap_days.shape[1], device=gap_days.device)
    latest = torch.where(is_visit, places, -1).amax(1)
    gap = gap_days.gather(1, latest.clamp(min=0)[:, None]).squeeze(1)
    return torch.where(latest >= 0, gap, 0.0)
