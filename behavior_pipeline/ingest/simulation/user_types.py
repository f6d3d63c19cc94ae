"""The latent types of users: how each comes, looks, buys and leaves. No event shows the type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

NEW_USERS_PER_DAY: Final = 0.003
"""Expected arrivals a day, as a share of the users at the start."""


@dataclass(frozen=True)
class UserType:
    """Parameters of one latent type; a user varies around them.

    Attributes:
        name: for people; never written to an event.
        start_share: share among the users at the start.
        arrival_share: share among the users who arrive later.
        sessions_per_day: median rate of an engaged user.
        buy_probability: of a session by a user in need, without discount or open cart.
        abandon_probability: of a session that ends with a full cart, while engaged.
        items_per_session: mean number of items looked at beyond the first.
        need_days: time constant in which the need to buy comes back after a purchase.
        price_sensitivity: how much a discount raises the chance to buy.
        fading_per_day: hazard of beginning to leave at neutral satisfaction.
        weekday_weights: relative activity, Monday first.
        busy_hours: bumps of the day's rhythm as (hour UTC, width in hours, weight).
        gift_boost: how much activity rises before the days on which gifts are given.
    """

    name: str
    start_share: float
    arrival_share: float
    sessions_per_day: float
    buy_probability: float
    abandon_probability: float
    items_per_session: float
    need_days: float
    price_sensitivity: float
    fading_per_day: float
    weekday_weights: tuple[float, float, float, float, float, float, float]
    busy_hours: tuple[tuple[float, float, float], ...]
    gift_boost: float = 0.0


USER_TYPES: Final = (
    UserType(
        name="loyal regular",
        start_share=0.34,
        arrival_share=0.15,
        sessions_per_day=0.24,
        buy_probability=0.5,
        abandon_probability=0.10,
        items_per_session=1.3,
        need_days=6.0,
        price_sensitivity=0.6,
        fading_per_day=0.0025,
        weekday_weights=(1.0, 1.0, 1.0, 1.1, 1.1, 0.9, 0.8),
        busy_hours=((12.5, 1.2, 0.3), (20.0, 1.8, 0.7)),
    ),
    UserType(
        name="bargain hunter",
        start_share=0.22,
        arrival_share=0.17,
        sessions_per_day=0.25,
        buy_probability=0.26,
        abandon_probability=0.26,
        items_per_session=1.7,
        need_days=4.0,
        price_sensitivity=5.0,
        fading_per_day=0.0028,
        weekday_weights=(1.3, 1.0, 0.9, 0.9, 1.0, 0.9, 1.0),
        busy_hours=((7.5, 1.2, 0.5), (22.0, 1.5, 0.5)),
    ),
    UserType(
        name="browser",
        start_share=0.22,
        arrival_share=0.23,
        sessions_per_day=0.24,
        buy_probability=0.15,
        abandon_probability=0.08,
        items_per_session=2.0,
        need_days=3.0,
        price_sensitivity=1.5,
        fading_per_day=0.0028,
        weekday_weights=(0.8, 0.8, 0.8, 0.8, 1.0, 1.5, 1.6),
        busy_hours=((15.0, 2.5, 0.6), (21.0, 2.0, 0.4)),
    ),
    UserType(
        name="gift buyer",
        start_share=0.16,
        arrival_share=0.15,
        sessions_per_day=0.09,
        buy_probability=0.45,
        abandon_probability=0.12,
        items_per_session=1.6,
        need_days=3.0,
        price_sensitivity=1.0,
        fading_per_day=0.0025,
        weekday_weights=(0.9, 0.9, 0.9, 0.9, 1.0, 1.3, 1.2),
        busy_hours=((11.0, 2.0, 0.6), (18.0, 2.0, 0.4)),
        gift_boost=3.5,
    ),
    UserType(
        name="one-off",
        start_share=0.06,
        arrival_share=0.30,
        sessions_per_day=0.22,
        buy_probability=0.35,
        abandon_probability=0.18,
        items_per_session=1.5,
        need_days=20.0,
        price_sensitivity=1.5,
        fading_per_day=0.05,
        weekday_weights=(1.0, 1.0, 1.0, 1.0, 1.0, 1.1, 1.1),
        busy_hours=((14.0, 4.0, 1.0),),
    ),
)
