"""Random histories of arrivals: what a source sent night by night, and what was done with it when.

Few users, few days around the cutoffs, few ids: so arrivals repeat, correct, move, delete and
re-create each other's events all the time, and events tie, cross midnight and end sessions exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from behavior_pipeline.ingest.presets import Preset, parse_preset
from behavior_pipeline.windows import EvaluationWindows

COLUMNS = ("id", "who", "what", "at", "sku", "kind", "price", "gone")
HISTORY = "history"
START = date(2024, 3, 1)
NUM_DAYS = 9

_SHOP = """
name: shop
description: A shop of the tests.
columns:
  user_id: who
  event_type: what
  occurred_at: {column: at, earliest: 2020-01-01, latest: 2030-01-01}
  item_id: sku
  category: kind
  amount: price
tasks:
  qualifying_event_types: [buy]
  propensity_event_types: [buy, view]
  propensity_column: category
  horizon_days: 2
  lookback_days: 3
"""
_IDS = "  event_id: id\n  is_deleted: {column: gone, values: [x]}\ntasks:"

SHOP_WITH_IDS = parse_preset(_SHOP.replace("tasks:", _IDS), "shop")
SHOP_WITHOUT_IDS = parse_preset(_SHOP, "shop")

_USERS = ("ann", "bob", "c'est", "dän", "eve", " f", "G", "日")
_TYPES = ("view", "buy", "ping")
_ITEMS = ("a1", "a2", "b1", "ü", None)
_PRICES = ("1.5", "-2", "0", "1e16", "0.1", None)
# Ties, exactly a session gap (1800 s), a microsecond more, and both across midnight.
_TIMES = (
    "00:00:00", "00:00:00.000001", "00:15:00", "05:59:59.999999", "06:00:00", "11:30:00",
    "11:59:59.999999", "12:00:00", "12:00:00", "12:30:00", "12:30:00.000001", "22:00:00",
    "23:30:00", "23:45:00", "23:59:59.999999",
)  # fmt: skip

Row = tuple[str | None, ...]


def _windows(day: int, *, is_future_known: bool) -> EvaluationWindows:
    """Return the windows of the night whose cutoff is so many days after the start."""
    cutoff = datetime.combine(START, datetime.min.time(), UTC) + timedelta(days=day)
    horizon = timedelta(days=2)
    test_cutoff = cutoff if is_future_known else cutoff - horizon
    return EvaluationWindows(cutoff, test_cutoff - horizon, test_cutoff, horizon, timedelta(days=3))


WINDOWS = (
    _windows(4, is_future_known=True),
    _windows(5, is_future_known=False),
    _windows(7, is_future_known=False),
)


class Pick(NamedTuple):
    """One row of a file: a fact, told as it is or with something else in it.

    Attributes:
        fact: which one.
        change: the column that is told otherwise; "" for none, "gone" if deleted, "bad:<column>"
            for a row that breaks the contract.
        other: which other value it gets.
        part: which of the arrival's two files it is in.
    """

    fact: int
    change: str
    other: int
    part: int


class Step(NamedTuple):
    """Something that is done; `load` of an arrival in one of its versions, or else at a night."""

    action: str
    arrival: str = ""
    version: int = 0
    night: int = 0


@dataclass(frozen=True)
class Limits:
    """The thresholds that choose a path, small enough for a few users to reach them."""

    num_buckets: int
    bulk_rows: int
    max_touched_share: float
    max_layers: int
    max_layered_share: float
    max_affected_share: float
    max_touched_files: int
    row_group_users: int


@dataclass(frozen=True)
class History:
    """What a source sent, and what was done.

    Attributes:
        has_ids: whether the source names its events.
        has_own_times: whether every load comes at a time of its own; if not, each arrival has one.
        facts: the events that its files tell of.
        versions: each arrival's rows, as its files first were and as they were corrected.
        steps: groups of steps; those of a group run in parallel.
        order: the order in which the last version of each arrival is loaded into a fresh home.
        night: the last night.
        limits: see Limits.
    """

    has_ids: bool
    has_own_times: bool
    facts: tuple[Row, ...]
    versions: dict[str, tuple[tuple[Pick, ...], ...]]
    steps: tuple[tuple[Step, ...], ...]
    order: tuple[str, ...]
    night: int
    limits: Limits

    @property
    def preset(self) -> Preset:
        """How the source is mapped."""
        return SHOP_WITH_IDS if self.has_ids else SHOP_WITHOUT_IDS

    def parts(self, arrival: str, version: int) -> tuple[list[Row], list[Row]]:
        """Return the rows of the arrival's two files."""
        picks = self.versions[arrival][version]
        told = [
            (pick.part, _told(self.facts[pick.fact], pick, has_ids=self.has_ids)) for pick in picks
        ]
        first, second = ([row for part, row in told if part == number] for number in (0, 1))
        return first, second


def _told(fact: Row, pick: Pick, *, has_ids: bool) -> Row:
    """Return the row that a pick tells."""
    row = dict(zip(COLUMNS, fact, strict=True))
    other = pick.other
    if pick.change == "gone" and has_ids:
        nothing = dict.fromkeys(COLUMNS)
        row = nothing | {"id": row["id"], "gone": "x"} if other % 2 else row | {"gone": "x"}
    elif pick.change == "who":
        row["who"] = _USERS[other % 3]
    elif pick.change == "what":
        row["what"] = _TYPES[other % len(_TYPES)]
    elif pick.change == "at":
        row["at"] = _at(other % NUM_DAYS, other)
    elif pick.change == "sku":
        row["sku"] = _ITEMS[other % len(_ITEMS)]
    elif pick.change == "price":
        row["price"] = _PRICES[other % len(_PRICES)]
    elif pick.change.startswith("bad:"):
        row |= {
            "bad:who": {"who": ""},
            "bad:at": {"at": "soon"},
            "bad:id": {"id": None, "what": ""},
        }[pick.change]
    if not has_ids:
        row |= {"id": None, "gone": None}
    return tuple(row[name] for name in COLUMNS)


def _at(day: int, time: int) -> str:
    return f"{START + timedelta(days=day)} {_TIMES[time % len(_TIMES)]}"


def write_parts(folder: Path, parts: tuple[list[Row], list[Row]]) -> Path:
    """Write an arrival's raw files, in place of those that were there."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, rows in enumerate(parts):
        values = list(zip(*rows, strict=True)) if rows else [()] * len(COLUMNS)
        arrays = [pa.array(column, pa.string()) for column in values]
        pq.write_table(pa.table(arrays, list(COLUMNS)), folder / f"part-{number}.parquet")
    return folder


@st.composite
def histories(draw: st.DrawFn) -> History:
    """A source of few users, what it sent, and what was done with it in which order."""
    users = _USERS[: draw(st.integers(3, 8))]
    facts = draw(st.lists(_facts(users), min_size=4, max_size=16))
    named = tuple((f"e{number}", *fact) for number, fact in enumerate(facts))
    num_nights = draw(st.sampled_from((2, 2, 2, 3, 3, 4, 6)))
    days = draw(st.permutations(range(1, NUM_DAYS)))[:num_nights]
    keys = [str(START + timedelta(days=day)) for day in sorted(days)]
    versions = {key: draw(_versions(len(named), 1, 8, keeps_all=False)) for key in keys}
    if draw(st.booleans()):
        keeps_all = draw(st.integers(0, 4)) > 0
        versions[HISTORY] = draw(_versions(len(named), 3, 16, keeps_all=keeps_all))
    return History(
        has_ids=draw(st.integers(0, 3)) > 0,
        has_own_times=draw(st.booleans()),
        facts=named,
        versions=versions,
        steps=draw(_steps({key: len(each) for key, each in versions.items()})),
        order=tuple(draw(st.permutations(sorted(versions)))),
        night=draw(_NIGHTS),
        limits=draw(_LIMITS),
    )


_NIGHTS = st.integers(0, len(WINDOWS) - 1)
_LIMITS = st.builds(
    Limits,
    num_buckets=st.integers(1, 3),
    bulk_rows=st.sampled_from((1_000, 1_000, 5, 2)),
    max_touched_share=st.sampled_from((9.0, 9.0, 1.0, 0.6)),
    max_layers=st.sampled_from((9, 3, 2)),
    max_layered_share=st.sampled_from((9.0, 9.0, 1.0)),
    max_affected_share=st.sampled_from((9.0, 9.0, 1.0, 0.5)),
    max_touched_files=st.sampled_from((2, 3)),
    row_group_users=st.sampled_from((1, 2, 4096)),
)


def _facts(users: tuple[str, ...]) -> st.SearchStrategy[Row]:
    """Return events without an id, in the order of COLUMNS."""
    return st.builds(
        lambda who, what, day, time, sku, price: (
            who, what, _at(day, time), sku, sku and sku[0], price, None,
        ),
        st.sampled_from(users),
        st.sampled_from(_TYPES),
        st.integers(0, NUM_DAYS - 1),
        st.integers(0, len(_TIMES) - 1),
        st.sampled_from(_ITEMS),
        st.sampled_from(_PRICES),
    )  # fmt: skip


_CHANGES = (
    *("",) * 9, "who", "who", "what", "at", "at", "sku", "price", "gone", "gone", "gone",
    "bad:who", "bad:at", "bad:id",
)  # fmt: skip


def _picks(num_facts: int) -> st.SearchStrategy[Pick]:
    return st.builds(
        Pick,
        fact=st.integers(0, num_facts - 1),
        change=st.sampled_from(_CHANGES),
        other=st.integers(0, 40),
        part=st.integers(0, 1),
    )


@st.composite
def _versions(
    draw: st.DrawFn, num_facts: int, min_rows: int, max_rows: int, *, keeps_all: bool
) -> tuple[tuple[Pick, ...], ...]:
    """Draw an arrival's rows and up to two corrections of its files; histories rarely lose rows."""
    rows = draw(st.lists(_picks(num_facts), min_size=min_rows, max_size=max_rows))
    versions = [tuple(rows)]
    for _ in range(draw(st.integers(0, 2))):
        if not keeps_all:
            kept = draw(st.lists(st.integers(0, 3), min_size=len(rows), max_size=len(rows)))
            rows = [row for row, keep in zip(rows, kept, strict=True) if keep]
        rows = [*rows, *draw(st.lists(_picks(num_facts), min_size=0 if rows else 1, max_size=3))]
        versions.append(tuple(rows))
    return tuple(versions)


@st.composite
def _steps(draw: st.DrawFn, num_versions: dict[str, int]) -> tuple[tuple[Step, ...], ...]:
    """Draw what is done: every arrival is loaded, other things happen between, some at once."""
    steps: list[Step] = []
    for arrival in draw(st.permutations(sorted(num_versions))):
        steps.append(Step("load", arrival, draw(st.integers(0, num_versions[arrival] - 1))))
        first = draw(st.sampled_from(("build", "build", "build", "load", "")))
        for action in filter(None, (first, *draw(st.lists(st.sampled_from(_ACTIONS), max_size=1)))):
            chosen = draw(st.sampled_from(sorted(num_versions)))
            version = draw(st.integers(0, num_versions[chosen] - 1))
            is_load = action == "load"
            steps.append(
                Step("load", chosen, version) if is_load else Step(action, night=draw(_NIGHTS))
            )
    groups: list[tuple[Step, ...]] = []
    for step in steps:
        is_at_once = draw(st.integers(0, 5)) == 0
        if is_at_once and groups and _may_run_at_once(groups[-1], step):
            groups[-1] = (*groups[-1], step)
        else:
            groups.append((step,))
    return tuple(groups)


_ACTIONS = (*("write",) * 6, *("load",) * 6, "build", "lose")


def _may_run_at_once(group: tuple[Step, ...], step: Step) -> bool:
    """Tell whether two steps may run in parallel with one outcome that is known."""
    if len(group) > 1:
        return False
    (other,) = group
    actions = {other.action, step.action}
    if actions == {"load"}:
        return other.arrival != step.arrival
    return actions in ({"load", "build"}, {"load", "write"}, {"build", "write"})
