"""How users live: day by day they come, look, buy, have trouble, fade, pause, leave and return.

Everything evolves forward in time: a session depends on the user's traits and on the latent state
that earlier sessions and chance have left, never on what comes later.

Shapes: N users of the chunk, P users who are present on the day, K of them with a session now.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final

import numpy as np

from behavior_pipeline.ingest.simulation.population import NUM_FAVORITES, Population
from behavior_pipeline.ingest.simulation.world import (
    DEVICE_WEIGHTS,
    DEVICES,
    NUM_QUANTILES,
    NUM_REGIONS,
    Array,
    World,
)

ENGAGED, FADING, PAUSED, GONE = range(4)
BROWSE, ABANDON, EMPTY_CART, BUY, TICKET, RETURN = range(6)

DAY_MS: Final = 86_400_000
SESSION_PAUSE_MS: Final = 40 * 60_000  # least time between two sessions of a user
SLOTS_PER_DAY: Final = 2

# Daily hazards by stage. The first move of an engaged user depends on satisfaction: see _age.
FIRST_HAZARD: Final = np.array([0.0, 1 / 16, 1 / 18, 1 / 600])
FIRST_TARGET: Final = np.array([FADING, GONE, ENGAGED, ENGAGED], np.int8)
SECOND_HAZARD: Final = np.array([1 / 90, 1 / 90, 0.0, 0.0])
SECOND_TARGET: Final = np.array([PAUSED, ENGAGED, PAUSED, GONE], np.int8)

SATISFACTION_KEPT: Final = 0.988  # a day: half is forgotten in eight weeks
FADING_SENSITIVITY: Final = 1.5  # log hazard of fading per unit of dissatisfaction
SATISFIED_BY_DELIVERY: Final = 0.06
SATISFIED_BY_SOLUTION: Final = 1.0
DISSATISFIED_BY_TROUBLE: Final = 2.6
SOLUTION_PROBABILITY: Final = 0.5
RECOVERY_BY_PURCHASE: Final = 0.2

FADING_DAYS: Final = 14.0  # time constant in which visits of a fading user thin out
CART_DAYS: Final = 10  # an abandoned cart is remembered so long
CART_PULL: Final = 1.5
INTEREST_SWITCH: Final = (
    0.22,
    0.03,
)  # a session of an engaged, a fading user takes up a new category
FAVORITE_SHARE: Final = 0.75
EMPTYING_SHARE: Final = 0.3
DEVICE_FACTOR: Final = np.array([0.85, 1.25, 1.0])
ITEM_SECONDS: Final = 70.0


@dataclass(frozen=True)
class Sessions:
    """Sessions of a chunk (S,), in the order in which each user had them; a service contact is one.

    Attributes:
        user: index of the user in the chunk.
        day: day on which it began.
        start_ms, duration_ms: milliseconds since the first midnight, and long.
        kind: BROWSE, ABANDON, EMPTY_CART, BUY, TICKET or RETURN.
        num_items: items looked at, the one in focus included; it comes last.
        category, item: of the item in focus.
        is_fading: the latent stage, which narrows the other items.
        is_carried: the item in focus lies in the cart since an earlier session.
        device, region: where it took place.
    """

    user: Array
    day: Array
    start_ms: Array
    duration_ms: Array
    kind: Array
    num_items: Array
    category: Array
    item: Array
    is_fading: Array
    is_carried: Array
    device: Array
    region: Array


@dataclass
class _State:
    """The latent state of a chunk's users, each (N,)."""

    stage: Array
    stage_day: Array
    satisfaction: Array
    last_buy_day: Array
    cart_day: Array
    category: Array
    item: Array
    busy_until_ms: Array
    trouble_days: Array  # (2, N) days of the first and second contact, -1 for none
    trouble_item: Array  # (2, N) category and item
    is_solved: Array


@dataclass(frozen=True)
class _Chunk:
    """What every step of a chunk's life needs."""

    world: World
    population: Population
    rng: np.random.Generator
    state: _State
    activity: float


def live(
    rng: np.random.Generator, world: World, population: Population, activity: float
) -> Sessions:
    """Let a chunk's users live through the period.

    Args:
        rng: the chunk's own generator.
        world: what users share.
        population: the chunk's users.
        activity: factor on every user's session rate.
    """
    chunk = _Chunk(world, population, rng, _begin(rng, world, population), activity)
    parts: list[Sessions] = []
    for day in range(world.num_days):
        present = int(np.searchsorted(population.arrival_days, day, side="right"))
        _age(chunk, day, present)
        parts.extend(_contact_service(chunk, day, turn) for turn in range(2))
        parts.extend(_hold_sessions(chunk, day, slot, present) for slot in range(SLOTS_PER_DAY))
    return Sessions(
        **{
            field.name: np.concatenate([getattr(part, field.name) for part in parts])
            for field in fields(Sessions)
        }
    )


def _begin(rng: np.random.Generator, world: World, population: Population) -> _State:
    """Return the state in which users arrive: engaged, and interested in a favorite category."""
    size = population.size
    category = population.favorites[:, 0].copy()
    return _State(
        stage=np.zeros(size, np.int8),
        stage_day=population.arrival_days.astype(np.float64),
        satisfaction=rng.normal(0.0, 0.3, size),
        last_buy_day=population.arrival_days - 20.0,
        cart_day=np.full(size, -CART_DAYS - 1, np.int64),
        category=category,
        item=world.draw_items(rng, category),
        busy_until_ms=np.zeros(size, np.int64),
        trouble_days=np.full((2, size), -1, np.int64),
        trouble_item=np.zeros((2, size), np.int64),
        is_solved=np.zeros(size, np.bool_),
    )


def _age(chunk: _Chunk, day: int, present: int) -> None:
    """Move users between stages overnight; the hazard of fading grows as satisfaction falls."""
    state = chunk.state
    stage, satisfaction = state.stage[:present], state.satisfaction[:present]
    satisfaction *= SATISFACTION_KEPT
    fading = chunk.population.fading[:present] * np.exp(-FADING_SENSITIVITY * satisfaction)
    first = np.where(stage == ENGAGED, fading, FIRST_HAZARD[stage])
    uniform = chunk.rng.random(present)
    moves_first = uniform < first
    moves = uniform < first + SECOND_HAZARD[stage]
    satisfaction[moves_first & (stage == GONE)] = 0.0
    target = np.where(moves_first, FIRST_TARGET[stage], SECOND_TARGET[stage])
    stage[moves] = target[moves]
    state.stage_day[:present][moves] = day


def _contact_service(chunk: _Chunk, day: int, turn: int) -> Sessions:
    """Emit the first or second contact after a bad delivery; the second settles how it is felt.

    A problem that is solved goes return first, then a ticket that confirms; one that is not goes
    ticket first, then, unhelped, the return. Totals are equal, the order differs.
    """
    state = chunk.state
    who = np.flatnonzero((state.trouble_days[turn] == day) & (state.stage != GONE))
    is_solved = state.is_solved[who]
    if turn == 1:
        change = np.where(is_solved, SATISFIED_BY_SOLUTION, -DISSATISFIED_BY_TROUBLE)
        state.satisfaction[who] += change
    kind = np.where(is_solved == (turn == 0), RETURN, TICKET)
    wished = (day * 24 + 9) * 3_600_000 + (chunk.rng.random(len(who)) * 9 * 3_600_000).astype(
        np.int64
    )
    start_ms = _book(state, who, wished, np.full(len(who), 60_000))
    return Sessions(
        user=who,
        day=np.full(len(who), day),
        start_ms=start_ms,
        duration_ms=np.full(len(who), 60_000),
        kind=kind,
        num_items=np.ones(len(who), np.int64),
        category=state.trouble_item[0, who],
        item=state.trouble_item[1, who],
        is_fading=state.stage[who] == FADING,
        is_carried=np.zeros(len(who), np.bool_),
        device=chunk.population.devices[who],
        region=chunk.population.regions[who],
    )


def _hold_sessions(chunk: _Chunk, day: int, slot: int, present: int) -> Sessions:
    """Let some users have a session in this half of their day, and remember what it changes."""
    state, rng = chunk.state, chunk.rng
    who = _who_comes(chunk, day, slot, present)
    is_fading = state.stage[who] == FADING
    is_carried = day - state.cart_day[who] <= CART_DAYS
    _turn_interest(chunk, who, is_fading, is_carried)
    device = _usually(rng, chunk.population.devices[who], 0.85, len(DEVICES), DEVICE_WEIGHTS)
    kind = _decide(chunk, who, day, is_fading, is_carried, device)
    mean_items = chunk.population.items[who] * np.where(is_fading, 0.45, 1.0)
    num_items = 1 + rng.poisson(mean_items)
    duration = (num_items * ITEM_SECONDS * 1e3 * np.exp(rng.normal(0, 0.5, len(who)))).astype(
        np.int64
    )
    start_ms = _book(state, who, _wished_start(chunk, who, day, slot), duration)
    sessions = Sessions(
        user=who,
        day=np.full(len(who), day),
        start_ms=start_ms,
        duration_ms=duration,
        kind=kind,
        num_items=num_items,
        category=state.category[who],
        item=state.item[who],
        is_fading=is_fading,
        is_carried=is_carried,
        device=device,
        region=_usually(rng, chunk.population.regions[who], 0.97, NUM_REGIONS, None),
    )
    _remember(chunk, sessions, day)
    return sessions


def _who_comes(chunk: _Chunk, day: int, slot: int, present: int) -> Array:
    """Return the users with a session in this slot (K,); newcomers come on their first day."""
    state, population = chunk.state, chunk.population
    stage = state.stage[:present]
    since = day - state.stage_day[:present]
    eagerness = np.clip(1.0 + 0.25 * state.satisfaction[:present], 0.5, 1.4)
    thinning = np.where(stage == FADING, 0.75 * np.exp(-since / FADING_DAYS), 0.0)
    factor = np.where(stage == ENGAGED, eagerness, thinning)
    weights = chunk.world.day_weights[:, day][population.types[:present]]
    rate = population.rates[:present] * weights * factor * (chunk.activity / SLOTS_PER_DAY)
    comes = chunk.rng.random(present) < -np.expm1(-rate)
    if slot == 0 and day > 0:
        comes |= population.arrival_days[:present] == day
    return np.flatnonzero(comes)


def _turn_interest(chunk: _Chunk, who: Array, is_fading: Array, is_carried: Array) -> None:
    """Choose category and item in focus: an open cart holds them, interest lasts a while."""
    state, rng = chunk.state, chunk.rng
    switch = np.where(is_fading, INTEREST_SWITCH[1], INTEREST_SWITCH[0])
    turns = (rng.random(len(who)) < switch) & ~is_carried
    turning = who[turns]
    place = np.minimum(rng.geometric(0.45, len(turning)) - 1, NUM_FAVORITES - 1)
    favorite = chunk.population.favorites[turning, place]
    other = chunk.world.draw_categories(rng, chunk.population.types[turning])
    likes = rng.random(len(turning)) < FAVORITE_SHARE
    state.category[turning] = np.where(likes, favorite, other)
    fresh = who[~is_carried]
    state.item[fresh] = chunk.world.draw_items(rng, state.category[fresh])


def _decide(
    chunk: _Chunk, who: Array, day: int, is_fading: Array, is_carried: Array, device: Array
) -> Array:
    """Return how each session ends (K,): BROWSE, ABANDON, EMPTY_CART or BUY."""
    state, population = chunk.state, chunk.population
    need = -np.expm1(-(day - state.last_buy_day[who]) / population.need_days[who])
    discount = chunk.world.discounts[day // 7, state.category[who]]
    temptation = 1.0 + population.price_sensitivity[who] * discount
    pull = np.where(is_carried & ~is_fading, 1.0 + CART_PULL, 1.0)
    since = day - state.stage_day[who]
    mood = np.clip(1.0 + 0.25 * state.satisfaction[who], 0.5, 1.4)
    will = np.where(is_fading, 0.5 * np.exp(-since / FADING_DAYS), mood)
    buys = population.buy[who] * need * temptation * pull * will * DEVICE_FACTOR[device]
    abandons = np.where(is_fading, population.abandon[who] * 2.0 + 0.25, population.abandon[who])
    buys = np.minimum(buys, 0.85)
    uniform = chunk.rng.random(len(who))
    has_cart = uniform < buys + np.minimum(abandons, 0.6)
    empties = chunk.rng.random(len(who)) < EMPTYING_SHARE
    left = np.where(empties, EMPTY_CART, ABANDON)
    return np.where(uniform < buys, BUY, np.where(has_cart, left, BROWSE))


def _remember(chunk: _Chunk, sessions: Sessions, day: int) -> None:
    """Carry forward what a session changes: need, cart, satisfaction, trouble with the delivery."""
    state, rng = chunk.state, chunk.rng
    state.cart_day[sessions.user[sessions.kind == ABANDON]] = day
    state.cart_day[sessions.user[sessions.kind >= EMPTY_CART]] = -CART_DAYS - 1
    buyers = sessions.user[sessions.kind == BUY]
    state.last_buy_day[buyers] = day
    stays = buyers[
        (state.stage[buyers] == FADING) & (rng.random(len(buyers)) < RECOVERY_BY_PURCHASE)
    ]
    state.stage[stays], state.stage_day[stays] = ENGAGED, day
    goes_wrong = rng.random(len(buyers)) < chunk.world.problem_rates[state.category[buyers]]
    is_free = state.trouble_days[1, buyers] < day
    state.satisfaction[buyers[~goes_wrong]] += SATISFIED_BY_DELIVERY
    _plan_trouble(chunk, buyers[goes_wrong & is_free], day)


def _plan_trouble(chunk: _Chunk, who: Array, day: int) -> None:
    """Let a delivery go wrong: two contacts soon, in an order that tells the outcome."""
    state, rng = chunk.state, chunk.rng
    first = day + rng.integers(2, 6, len(who))
    state.trouble_days[0, who] = first
    state.trouble_days[1, who] = first + rng.integers(1, 6, len(who))
    state.trouble_item[0, who] = state.category[who]
    state.trouble_item[1, who] = state.item[who]
    state.is_solved[who] = rng.random(len(who)) < SOLUTION_PROBABILITY


def _wished_start(chunk: _Chunk, who: Array, day: int, slot: int) -> Array:
    """Return when users would come (K,), in ms: the slots are the halves of their type's day."""
    table = chunk.world.start_seconds[chunk.population.types[who], chunk.world.is_weekend(day)]
    place = (slot + chunk.rng.random(len(who))) / SLOTS_PER_DAY * NUM_QUANTILES
    below = np.minimum(place.astype(np.int64), NUM_QUANTILES - 1)
    rows = np.arange(len(who))
    low, high = table[rows, below], table[rows, below + 1]
    seconds = low + (place - below) * (high - low)
    result: Array = day * DAY_MS + (seconds * 1e3).astype(np.int64)
    return result


def _book(state: _State, who: Array, wished_ms: Array, duration_ms: Array) -> Array:
    """Return the start in ms (K,), after the last session, and keep the user busy till the end."""
    start: Array = np.maximum(wished_ms, state.busy_until_ms[who])
    state.busy_until_ms[who] = start + duration_ms + SESSION_PAUSE_MS
    return start


def _usually(
    rng: np.random.Generator,
    usual: Array,
    share: float,
    size: int,
    weights: tuple[float, ...] | None,
) -> Array:
    """Return the usual value with a probability of `share`, else any."""
    other = rng.choice(size, len(usual), p=weights)
    return np.where(rng.random(len(usual)) < share, usual, other)
