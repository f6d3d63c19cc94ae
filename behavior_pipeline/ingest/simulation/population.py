"""The users of one chunk: who they are before anything happens.

Shapes: N users of the chunk, those of the start first, then in order of arrival.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from behavior_pipeline.ingest.simulation.user_types import NEW_USERS_PER_DAY, USER_TYPES
from behavior_pipeline.ingest.simulation.world import DEVICE_WEIGHTS, DEVICES, Array, World

NUM_FAVORITES: Final = 5
RATE_SPREAD: Final = 0.75  # standard deviation of the log of the session rate: a heavy tail


@dataclass(frozen=True)
class Population:
    """Traits that stay with a user for life.

    Attributes:
        num_start: users present from the first day.
        types: (N,) index into `USER_TYPES`.
        arrival_days: (N,) day of arrival, 0 for users of the start; ascending.
        rates: (N,) sessions a day while engaged.
        buy, abandon: (N,) probabilities of a session, before circumstances.
        items: (N,) mean number of items beyond the first in a session.
        need_days: (N,) time constant of the need to buy.
        price_sensitivity: (N,).
        fading: (N,) daily hazard of beginning to leave, at neutral satisfaction.
        favorites: (N, NUM_FAVORITES) categories that the user likes.
        regions, devices: (N,) home region and usual device.
    """

    num_start: int
    types: Array
    arrival_days: Array
    rates: Array
    buy: Array
    abandon: Array
    items: Array
    need_days: Array
    price_sensitivity: Array
    fading: Array
    favorites: Array
    regions: Array
    devices: Array

    @property
    def size(self) -> int:
        """Number of users, those who arrive later included."""
        return len(self.types)


def draw_population(rng: np.random.Generator, world: World, num_start: int) -> Population:
    """Draw the users of a chunk: `num_start` of the start, and those who arrive day by day."""
    arrivals = rng.poisson(NEW_USERS_PER_DAY * num_start, world.num_days)
    arrivals[0] = 0
    days = np.concatenate(
        [np.zeros(num_start, np.int64), np.repeat(np.arange(world.num_days), arrivals)]
    )
    types = _draw_types(rng, days == 0)
    size = len(types)
    return Population(
        num_start=num_start,
        types=types,
        arrival_days=days,
        rates=_per_type("sessions_per_day", types) * _spread(rng, size, RATE_SPREAD),
        buy=_per_type("buy_probability", types) * _spread(rng, size, 0.3),
        abandon=_per_type("abandon_probability", types) * _spread(rng, size, 0.3),
        items=_per_type("items_per_session", types) * _spread(rng, size, 0.4),
        need_days=_per_type("need_days", types) * _spread(rng, size, 0.4),
        price_sensitivity=_per_type("price_sensitivity", types) * _spread(rng, size, 0.3),
        fading=_per_type("fading_per_day", types) * _spread(rng, size, 0.4),
        favorites=world.draw_categories(rng, np.repeat(types, NUM_FAVORITES)).reshape(
            size, NUM_FAVORITES
        ),
        regions=np.searchsorted(world.region_cdf, rng.random(size)),
        devices=rng.choice(len(DEVICES), size, p=DEVICE_WEIGHTS),
    )


def _draw_types(rng: np.random.Generator, is_start: Array) -> Array:
    """Draw a type per user: the mix of newcomers is not that of the users at the start."""
    uniform = rng.random(len(is_start))
    start = np.cumsum([kind.start_share for kind in USER_TYPES])
    later = np.cumsum([kind.arrival_share for kind in USER_TYPES])
    drawn = np.where(is_start, np.searchsorted(start, uniform), np.searchsorted(later, uniform))
    return np.minimum(drawn, len(USER_TYPES) - 1)


def _per_type(parameter: str, types: Array) -> Array:
    """Return a parameter of each user's type."""
    values: Array = np.array([getattr(kind, parameter) for kind in USER_TYPES])[types]
    return values


def _spread(rng: np.random.Generator, size: int, sigma: float) -> Array:
    """Return log-normal factors of median 1."""
    return np.exp(rng.normal(0.0, sigma, size))
