"""Histories of made-up nights, for tests of drift."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np

from behavior_pipeline.downstream.drift.history import NightFigures

FIRST = datetime(2024, 3, 4, tzinfo=UTC)  # a Monday
MEASURED_AT = datetime(2025, 1, 1, tzinfo=UTC)
MIX = {"view": 600.0, "search": 150.0, "cart": 90.0, "buy": 60.0, "return": 12.0}

Alter = Callable[[NightFigures], NightFigures]


def calm_nights(num_nights: int, seed: int = 0, checkpoint_id: str = "one") -> list[NightFigures]:
    """Nights of a shop that is busier and sells another mix at weekends, and grows slowly."""
    rng = np.random.default_rng(seed)
    return [_night(number, rng, checkpoint_id) for number in range(num_nights)]


def _night(number: int, rng: np.random.Generator, checkpoint_id: str) -> NightFigures:
    cutoff = FIRST + timedelta(days=number)
    is_weekend = cutoff.weekday() >= 5
    busy = 1.4 if is_weekend else 1.0
    mix = MIX | ({"view": 900.0} if is_weekend else {})
    counts = {name: int(rng.poisson(mean * busy)) for name, mean in mix.items()}
    figures = {
        "num_users": 1000.0 * 1.002**number + rng.normal(),
        "cold_start_share": 0.01 + 0.0005 * rng.normal(),
        "norm_p05": 5.0 + 0.01 * rng.normal(),
        "norm_p50": 6.0 + 0.01 * rng.normal(),
        "norm_p95": 7.0 + 0.01 * rng.normal(),
        "effective_rank": 8.0 + 0.02 * rng.normal(),
        "neighbour_overlap": 0.8 + 0.01 * rng.normal(),
        "cross_overlap": 0.85,
        "aligned_overlap": 0.86,
        "moved": 0.06 + 0.002 * rng.normal(),
        "segment_churn": 0.07 + 0.01 * rng.normal(),
        "unknown_event_share": 0.0,
        "psi_recency_days": 0.015 + 0.001 * rng.normal(),
        "psi_frequency": 0.0004,
        "psi_monetary": 0.0004,
    }
    eve = cutoff - timedelta(days=1) if number else None
    return NightFigures(
        cutoff, checkpoint_id, MEASURED_AT, eve, checkpoint_id if number else None, figures, counts
    )


def altered(nights: list[NightFigures], since: int, alter: Alter) -> list[NightFigures]:
    """Return the nights with something else from one on."""
    return [*nights[:since], *(alter(night) for night in nights[since:])]


def with_counts(night: NightFigures, **counts: int | None) -> NightFigures:
    """Return a night with other counts of some types; None takes a type out."""
    found = (night.event_counts or {}) | counts
    return replace(night, event_counts={name: n for name, n in found.items() if n is not None})


def with_figures(night: NightFigures, **figures: float) -> NightFigures:
    """Return a night with other figures."""
    return replace(night, figures=night.figures | figures)
