"""Turns sessions into events, a whole chunk at once.

A session looks at items one after the other: perhaps a search, one or more views, perhaps into
the cart and perhaps out again; the item in focus comes last, then what is left in the cart is
bought. Shapes: S sessions, L looks at an item, E events.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from behavior_pipeline.ingest.simulation.lives import (
    ABANDON,
    BROWSE,
    BUY,
    DAY_MS,
    EMPTY_CART,
    RETURN,
    TICKET,
    Sessions,
)
from behavior_pipeline.ingest.simulation.population import NUM_FAVORITES, Population
from behavior_pipeline.ingest.simulation.world import Array, World

EVENT_TYPES: Final = (
    "view",
    "search",
    "add_to_cart",
    "remove_from_cart",
    "purchase",
    "support_ticket",
    "return",
)
VIEW, SEARCH, ADD, REMOVE, PURCHASE, SUPPORT_TICKET, GIVE_BACK = range(7)
HAS_QUANTITY: Final = np.array([False, False, True, True, True, False, True])
HAS_PRICE: Final = np.array([True, False, True, True, True, False, True])

INTEREST_SHARE: Final = (0.55, 0.9)  # other items from the category in focus: engaged, fading
FAVORITE_SHARE: Final = 0.6  # of what remains
SEARCH_SHARE: Final = (0.10, 0.45)  # later items, first item of a session
MORE_VIEWS: Final = 0.45  # mean of the exponential behind repeated views
ALSO_ADDED: Final = (0.02, 0.20)  # other items, in a session without and with a cart
ALSO_REMOVED: Final = 0.15
MORE_QUANTITY: Final = 0.4


@dataclass(frozen=True)
class Events:
    """Events of a chunk (E,), by time.

    Attributes:
        user: index in the chunk.
        kind: index into `EVENT_TYPES`.
        time_ms: milliseconds since the first midnight; distinct within a user.
        category, item: indexes; a search has no item.
        region, device: indexes.
        cents: price of one piece.
        quantity: pieces.
    """

    user: Array
    kind: Array
    time_ms: Array
    category: Array
    item: Array
    region: Array
    device: Array
    cents: Array
    quantity: Array

    @property
    def size(self) -> int:
        """Number of events."""
        return len(self.user)


@dataclass(frozen=True)
class _Looks:
    """Looks at an item (L,), in order of session; `num_events` without purchases."""

    session: Array
    category: Array
    item: Array
    is_searched: Array
    num_views: Array
    is_added: Array
    is_removed: Array
    is_bought: Array

    @property
    def num_events(self) -> Array:
        """Events of each look, purchases aside."""
        searched = self.is_searched.astype(np.int64)
        result: Array = searched + self.num_views + self.is_added + self.is_removed
        return result


def render(
    rng: np.random.Generator, world: World, population: Population, sessions: Sessions
) -> Events:
    """Return the events of a chunk's sessions, by time, cut at the end of the period."""
    looks = _look_at_items(rng, world, population, sessions)
    kind, look = _lay_out(looks, len(sessions.user))
    session = looks.session[look]
    contact = sessions.kind[session]
    kind[contact == TICKET] = SUPPORT_TICKET
    kind[contact == RETURN] = GIVE_BACK
    time_ms = _spread_times(rng, session, sessions)
    order = np.argsort(time_ms, kind="stable")
    order = order[: np.searchsorted(time_ms, world.num_days * DAY_MS, sorter=order)]
    quantity = 1 + (
        rng.standard_exponential(len(looks.session), np.float32) * MORE_QUANTITY
    ).astype(np.int32)
    look, session, kind = look[order], session[order], kind[order]
    item = looks.item[look]
    return Events(
        user=sessions.user[session],
        kind=kind,
        time_ms=time_ms[order],
        category=looks.category[look],
        item=item,
        region=sessions.region[session],
        device=sessions.device[session],
        cents=world.prices[sessions.day[session] // 7, item],
        quantity=quantity[look],
    )


def _look_at_items(
    rng: np.random.Generator, world: World, population: Population, sessions: Sessions
) -> _Looks:
    """Draw what each session looks at and what it does with it."""
    session = np.repeat(np.arange(len(sessions.user)), sessions.num_items)
    last = np.cumsum(sessions.num_items) - 1
    is_focus = np.zeros(len(session), np.bool_)
    is_focus[last] = True
    is_first = np.zeros(len(session), np.bool_)
    is_first[last - sessions.num_items + 1] = True
    kind = sessions.kind[session]
    category, item = _choose_items(rng, world, population, sessions, session, is_focus)
    is_contact = kind >= TICKET
    is_added, is_removed, is_bought = _fill_cart(rng, kind, is_focus, sessions.is_carried[session])
    views = 1 + (rng.standard_exponential(len(session), np.float32) * MORE_VIEWS).astype(np.int64)
    searches = rng.random(len(session), np.float32) < np.where(
        is_first, SEARCH_SHARE[1], SEARCH_SHARE[0]
    )
    return _Looks(
        session=session,
        category=category,
        item=item,
        is_searched=searches & ~is_contact,
        num_views=np.where(is_contact, 1, views),
        is_added=is_added,
        is_removed=is_removed,
        is_bought=is_bought,
    )


def _choose_items(
    rng: np.random.Generator,
    world: World,
    population: Population,
    sessions: Sessions,
    session: Array,
    is_focus: Array,
) -> tuple[Array, Array]:
    """Return category and item of each look (L,): the interest of the day, favorites, or any."""
    category, item = sessions.category[session], sessions.item[session]
    other = np.flatnonzero(~is_focus)
    user = sessions.user[session[other]]
    share = np.where(sessions.is_fading[session[other]], INTEREST_SHARE[1], INTEREST_SHARE[0])
    wanders = rng.random(len(other), np.float32) >= share
    strays, strayer = other[wanders], user[wanders]
    favorite = population.favorites[strayer, rng.integers(0, NUM_FAVORITES, len(strays))]
    chance = world.draw_categories(rng, population.types[strayer])
    likes = rng.random(len(strays)) < FAVORITE_SHARE
    category[strays] = np.where(likes, favorite, chance)
    item[other] = world.draw_items(rng, category[other])
    return category, item


def _fill_cart(
    rng: np.random.Generator, kind: Array, is_focus: Array, is_carried: Array
) -> tuple[Array, Array, Array]:
    """Return which looks are added, removed and bought (L,), true to how the session ends."""
    has_cart = (kind >= ABANDON) & (kind <= BUY)
    uniform = rng.random((2, len(kind)), np.float32)
    also_added = uniform[0] < np.where(has_cart, ALSO_ADDED[1], ALSO_ADDED[0])
    is_in_cart = np.where(is_focus, has_cart, also_added & (kind < TICKET))
    focus_removed = kind == EMPTY_CART
    other_removed = (uniform[1] < ALSO_REMOVED) | (kind == BROWSE) | focus_removed
    is_removed = is_in_cart & np.where(is_focus, focus_removed, other_removed)
    is_bought = is_in_cart & ~is_removed & (kind == BUY)
    is_added = is_in_cart & ~(is_focus & is_carried)
    return is_added, is_removed, is_bought


def _lay_out(looks: _Looks, num_sessions: int) -> tuple[Array, Array]:
    """Return each event's kind and look (E,): looks in turn, then the session's purchases."""
    steps = looks.num_events
    bought = np.flatnonzero(looks.is_bought)
    purchases = np.bincount(looks.session[bought], minlength=num_sessions)
    bought_before = np.cumsum(purchases) - purchases
    start = np.cumsum(steps) - steps + bought_before[looks.session]
    session_end = np.bincount(looks.session, weights=steps, minlength=num_sessions).astype(np.int64)
    purchase_at = np.cumsum(session_end)[looks.session[bought]] + np.arange(len(bought))
    kind = np.full(int(steps.sum()) + len(bought), VIEW, np.int8)
    kind[start[looks.is_searched]] = SEARCH
    after_views = start + looks.is_searched + looks.num_views
    kind[after_views[looks.is_added]] = ADD
    kind[(after_views + looks.is_added)[looks.is_removed]] = REMOVE
    kind[purchase_at] = PURCHASE
    look = np.empty(len(kind), np.int64)
    look[kind != PURCHASE] = np.repeat(np.arange(len(steps)), steps)
    look[purchase_at] = bought
    return kind, look


def _spread_times(rng: np.random.Generator, session: Array, sessions: Sessions) -> Array:
    """Return the time of each event (E,) in ms: over its session, a second apart at least."""
    size = np.bincount(session, minlength=len(sessions.user))
    first = np.cumsum(size) - size
    steps = rng.standard_exponential(len(session), np.float32).astype(np.float64)
    elapsed = np.cumsum(steps) - steps
    whole = np.add.reduceat(steps, first)
    share = (elapsed - elapsed[first][session]) / whole[session]
    place = np.arange(len(session)) - first[session]
    spread = (share * sessions.duration_ms[session]).astype(np.int64)
    result: Array = sessions.start_ms[session] + spread + place * 1000
    return result
