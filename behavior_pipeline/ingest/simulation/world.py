"""What every user of the simulated shop shares: catalogue, prices, promotions, calendar, regions.

Shapes: C categories, I items, W weeks, D days, U user types.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from behavior_pipeline.ingest.simulation.user_types import USER_TYPES

Array = npt.NDArray[Any]

NUM_REGIONS: Final = 20
NUM_QUANTILES: Final = 240
DEVICES: Final = ("mobile", "desktop", "tablet")
DEVICE_WEIGHTS: Final = (0.58, 0.34, 0.08)
MAX_ITEMS_PER_CATEGORY: Final = 300
MIN_ITEMS_PER_CATEGORY: Final = 25
PROMOTION_SHARE: Final = 0.15
GIFT_DAYS: Final = ((2, 14), (5, 10), (6, 21), (11, 28), (12, 24))
GIFT_LEAD_DAYS: Final = 12
SATURDAY: Final = 5

CATEGORIES: Final = (
    "shoes",
    "dresses",
    "shirts",
    "jackets",
    "phones",
    "laptops",
    "headphones",
    "cameras",
    "televisions",
    "tablets",
    "sofas",
    "lamps",
    "rugs",
    "bedding",
    "curtains",
    "cookware",
    "coffee",
    "tea",
    "wine",
    "chocolate",
    "snacks",
    "pet_food",
    "garden",
    "tools",
    "paint",
    "bicycles",
    "camping",
    "fitness",
    "football",
    "toys",
    "games",
    "books",
    "music",
    "stationery",
    "jewelry",
    "watches",
    "perfume",
    "makeup",
    "skincare",
    "baby",
)


@dataclass(frozen=True)
class World:
    """Everything that users share.

    Attributes:
        start: first day.
        num_days: D.
        item_offsets: (C + 1,) first flat item index of each category.
        prices: (W, I) price in cents in each week, promotions included.
        discounts: (W, C) share off in each week.
        problem_rates: (C,) chance that a delivery goes wrong.
        category_cdf: (U, C) cumulative taste of each type, plus its index, for one sorted search.
        day_weights: (U, D) relative activity of each day.
        start_seconds: (U, 2, NUM_QUANTILES + 1) quantiles of a session's second of the day, on
            weekdays and at weekends.
        region_cdf: (NUM_REGIONS,) cumulative share of users.
    """

    start: date
    num_days: int
    item_offsets: Array
    prices: Array
    discounts: Array
    problem_rates: Array
    category_cdf: Array
    day_weights: Array
    start_seconds: Array
    region_cdf: Array

    @property
    def num_categories(self) -> int:
        """Number of categories."""
        return len(CATEGORIES)

    def draw_items(self, rng: np.random.Generator, categories: Array) -> Array:
        """Draw a flat item index per category; `rank = N ** u` makes popularity fall as 1/rank."""
        first = self.item_offsets[categories]
        sizes = self.item_offsets[categories + 1] - first
        uniform = rng.random(len(categories), dtype=np.float32)
        ranks = (np.power(sizes + 1.0, uniform, dtype=np.float32)).astype(np.int64) - 1
        items: Array = first + np.minimum(ranks, sizes - 1)
        return items

    def draw_categories(self, rng: np.random.Generator, types: Array) -> Array:
        """Draw a category from each type's taste."""
        wanted = types + rng.random(len(types))
        places = np.searchsorted(self.category_cdf.ravel(), wanted, side="right")
        last = self.num_categories - 1
        categories: Array = np.minimum(places - types * self.num_categories, last)
        return categories

    def is_weekend(self, day: int) -> int:
        """Return 1 on Saturdays and Sundays, else 0."""
        return int((self.start + timedelta(days=day)).weekday() >= SATURDAY)


def build_world(seed: int, start: date, num_days: int) -> World:
    """Build the world of a seed; a longer period only adds days and weeks."""
    catalogue = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0,)))
    promotions = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1,)))
    offsets, base_prices = _build_items(catalogue)
    discounts = _draw_discounts(promotions, num_days // 7 + 1)
    category_of_item = np.repeat(np.arange(len(CATEGORIES)), np.diff(offsets))
    prices = np.rint(base_prices * (1.0 - discounts[:, category_of_item])).astype(np.int64)
    return World(
        start=start,
        num_days=num_days,
        item_offsets=offsets,
        prices=prices,
        discounts=discounts,
        problem_rates=catalogue.uniform(0.10, 0.45, len(CATEGORIES)),
        category_cdf=_build_tastes(catalogue),
        day_weights=_build_day_weights(start, num_days),
        start_seconds=_build_start_seconds(),
        region_cdf=_cumulate(1.0 / np.arange(1, NUM_REGIONS + 1)),
    )


def _build_items(rng: np.random.Generator) -> tuple[Array, Array]:
    """Return offsets (C + 1,) and base prices in cents (I,): a few wide categories, many narrow."""
    ranks = np.arange(1, len(CATEGORIES) + 1)
    sizes = np.maximum(MAX_ITEMS_PER_CATEGORY / ranks**0.8, MIN_ITEMS_PER_CATEGORY).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    levels = np.repeat(rng.normal(3.3, 0.8, len(sizes)), sizes)
    dollars = np.exp(levels + rng.normal(0.0, 0.5, len(levels)))
    return offsets, np.maximum(np.rint(dollars * 100.0), 99.0)


def _draw_discounts(rng: np.random.Generator, num_weeks: int) -> Array:
    """Return the share off (W, C): each week some categories are on promotion."""
    is_promoted = rng.random((num_weeks, len(CATEGORIES), 2))
    depth = 0.15 + 0.25 * is_promoted[:, :, 1]
    return np.where(is_promoted[:, :, 0] < PROMOTION_SHARE, depth, 0.0)


def _build_tastes(rng: np.random.Generator) -> Array:
    """Return each type's cumulative taste (U, C) plus its index: a Zipf curve, tilted by type."""
    popularity = 1.0 / np.arange(1, len(CATEGORIES) + 1) ** 0.9
    tilts = np.exp(rng.normal(0.0, 0.9, (len(USER_TYPES), len(CATEGORIES))))
    cdf = np.cumsum(popularity * tilts, axis=1)
    shares: Array = cdf / cdf[:, -1:]
    return shares + np.arange(len(USER_TYPES))[:, None]


def _build_day_weights(start: date, num_days: int) -> Array:
    """Return relative activity (U, D): day of the week, times the weeks before gift days."""
    days = [start + timedelta(days=day) for day in range(num_days)]
    gift = np.array([_gift_season(day) for day in days])
    weekdays = np.array([day.weekday() for day in days])
    weights = np.array([kind.weekday_weights for kind in USER_TYPES])[:, weekdays]
    boosts = np.array([kind.gift_boost for kind in USER_TYPES])[:, None]
    result: Array = weights * (1.0 + boosts * gift)
    return result


def _gift_season(day: date) -> float:
    """Return how close a day is to the next gift day, from 0 to 1."""
    leads = [(date(day.year, month, number) - day).days for month, number in GIFT_DAYS]
    return max(
        (1.0 - lead / GIFT_LEAD_DAYS for lead in leads if 0 <= lead < GIFT_LEAD_DAYS), default=0.0
    )


def _build_start_seconds() -> Array:
    """Return quantiles of the start of sessions (U, 2, NUM_QUANTILES + 1); weekends begin later."""
    tables = [
        [_hour_quantiles(kind.busy_hours, shift) for shift in (0.0, 1.5)] for kind in USER_TYPES
    ]
    return np.array(tables)


def _hour_quantiles(bumps: tuple[tuple[float, float, float], ...], shift: float) -> Array:
    """Return the second of the day at evenly spaced quantiles (NUM_QUANTILES + 1,)."""
    hours = (np.arange(24 * 12) + 0.5) / 12.0
    density = np.full(len(hours), 0.01)
    for center, width, weight in bumps:
        away = np.abs(hours - (center + shift) % 24.0)
        distance = np.minimum(away, 24.0 - away)
        density += weight * np.exp(-0.5 * (distance / width) ** 2) / width
    cdf = np.concatenate([[0.0], _cumulate(density)])
    seconds: Array = np.interp(
        np.linspace(0, 1, NUM_QUANTILES + 1), cdf, np.arange(len(cdf)) * 300.0
    )
    return seconds


def _cumulate(weights: Array) -> Array:
    """Return the cumulative shares of weights; the last is exactly 1."""
    cdf = np.cumsum(weights)
    shares: Array = cdf / cdf[-1]
    return shares
