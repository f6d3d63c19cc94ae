"""A simulated shop: raw events of any number of users and days, seeded, streamed to Parquet.

The story and its parameters are told in docs/simulator.md. A chunk of users lives through the
whole period at once, so memory depends on the size of a chunk alone, and a chunk's events do not
depend on the other chunks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from behavior_pipeline.errors import PipelineError
from behavior_pipeline.ingest.simulation.changes import Change, apply_changes
from behavior_pipeline.ingest.simulation.export import to_table, write_events
from behavior_pipeline.ingest.simulation.lives import live
from behavior_pipeline.ingest.simulation.population import Population, draw_population
from behavior_pipeline.ingest.simulation.rendering import Events, render
from behavior_pipeline.ingest.simulation.world import World, build_world
from behavior_pipeline.progress import Report, report_nothing
from behavior_pipeline.storage import read_json, write_json, writing_folder

MANIFEST_NAME: Final = "_simulation.json"  # the underscore hides it from readers of the folder
WRITTEN_NAME: Final = re.compile(r"events-\d{5,}\.parquet|_simulation\.json")
SIMULATOR_VERSION: Final = 1  # raise it whenever the same arguments give other bytes
DEFAULT_START: Final = date(2026, 1, 1)

MAX_CHUNK_USERS: Final = 4096
MIN_CHUNK_USERS: Final = 32
MAX_CHUNK_EVENTS: Final = 1_000_000  # expected, not exact
USUAL_EVENTS_PER_DAY: Final = 1.0  # of a user, at activity 1
CHUNK_SPAWN_KEY: Final = 2  # 0 and 1 belong to the world
CHANGES_SPAWN_KEY: Final = 3

PILOT_CHUNKS: Final = 4
PILOT_ROUNDS: Final = 30
PILOT_TOLERANCE: Final = 0.01
NUM_EVENTS_TOLERANCE: Final = 0.05
ACTIVITY_RANGE: Final = (1e-4, 1e3)


@dataclass(frozen=True)
class SimulationSummary:
    """What a simulation wrote.

    Attributes:
        num_users: users at the start.
        num_new_users: users who arrived later.
        num_events: rows written, the broken ones included.
        num_broken: rows that lack their user, time or type.
        first_event_at, last_event_at: over all rows that have a time.
        files: the Parquet files, in order.
    """

    num_users: int
    num_new_users: int
    num_events: int
    num_broken: int
    first_event_at: datetime
    last_event_at: datetime
    files: tuple[Path, ...]


@dataclass(frozen=True)
class _Plan:
    """The arguments of a simulation, and what follows from them alone."""

    num_users: int
    num_days: int
    seed: int
    start: date
    num_events: int | None
    changes: tuple[Change, ...] = ()

    def __post_init__(self) -> None:
        _check_at_least("number of users", self.num_users, 1)
        _check_at_least("number of days", self.num_days, 1)
        _check_at_least("seed", self.seed, 0)
        if self.num_events is not None:
            _check_at_least("number of events", self.num_events, 1)

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments as the manifest keeps them."""
        changes = [change.to_json() for change in self.changes]
        return {
            "num_users": self.num_users,
            "num_days": self.num_days,
            "seed": self.seed,
            "start": self.start.isoformat(),
            "num_events": self.num_events,
            "simulator_version": SIMULATOR_VERSION,
            **({"changes": changes} if changes else {}),
        }

    @property
    def chunk_users(self) -> int:
        """Users at the start of a full chunk: fewer where each has more events."""
        usual = self.num_days * USUAL_EVENTS_PER_DAY
        per_user = usual if self.num_events is None else self.num_events / self.num_users
        return int(min(max(MAX_CHUNK_EVENTS / per_user, MIN_CHUNK_USERS), MAX_CHUNK_USERS))

    @property
    def num_chunks(self) -> int:
        """Number of chunks, the last one perhaps not full."""
        return math.ceil(self.num_users / self.chunk_users)

    def users_of(self, chunk: int) -> int:
        """Users at the start of one chunk."""
        return min(self.chunk_users, self.num_users - chunk * self.chunk_users)


@dataclass(frozen=True)
class _FileEntry:
    """What the manifest keeps of one file."""

    name: str
    num_bytes: int
    num_events: int
    num_new_users: int
    num_broken: int
    first_event_at: datetime | None
    last_event_at: datetime | None


def simulate(
    folder: Path,
    num_users: int,
    num_days: int,
    seed: int,
    start: date = DEFAULT_START,
    num_events: int | None = None,
    report: Report = report_nothing,
    changes: Sequence[Change] = (),
) -> SimulationSummary:
    """Write the raw events of a simulated shop to Parquet files, one per chunk of users.

    The same arguments give the same bytes; a folder that already holds exactly this simulation is
    left as it is. The folder is swapped in whole: a kill leaves the old one or none.

    Args:
        folder: its former content is replaced.
        num_users: users at the start; 0.3 % of that number more arrive on an average day.
        num_days: length of the period, all in UTC.
        seed: every random choice derives from it.
        start: first day.
        num_events: rows wanted; users become more or less active so that about as many come out
            (within 5 %). Natural activity when absent.
        report: called once per chunk.
        changes: happen to what is recorded on some day; the events before it stay the same.

    Raises:
        PipelineError: if an argument is out of range, or so many events cannot come from so many
            users and days, or the folder holds anything that no simulation wrote.
    """
    plan = _Plan(num_users, num_days, seed, start, num_events, tuple(changes))
    if not _is_written(folder, plan):
        _check_replaceable(folder)
        _write(folder, plan, report)
    return _read_summary(folder)


def is_simulated(
    folder: Path,
    num_users: int,
    num_days: int,
    seed: int,
    start: date = DEFAULT_START,
    num_events: int | None = None,
) -> bool:
    """Return whether a folder already holds exactly this simulation, whole."""
    return _is_written(folder, _Plan(num_users, num_days, seed, start, num_events))


def _is_written(folder: Path, plan: _Plan) -> bool:
    """Return whether the manifest is of these arguments and all its files are there in full."""
    manifest = folder / MANIFEST_NAME
    if not manifest.is_file():
        return False
    try:
        content = read_json(manifest)
        files = {entry["name"]: entry["num_bytes"] for entry in content["files"]}
        is_same = content["arguments"] == plan.arguments
    except (ValueError, KeyError, TypeError):
        return False
    return is_same and _parquet_sizes(folder) == files


def _parquet_sizes(folder: Path) -> dict[str, int]:
    """Return the size of each Parquet file of a folder."""
    return {path.name: path.stat().st_size for path in folder.glob("*.parquet")}


def _check_replaceable(folder: Path) -> None:
    """Refuse to replace what no simulation wrote."""
    if folder.is_file():
        raise PipelineError(f"'{folder}' is a file.", "Give a folder for the simulated events.")
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    foreign = [name for name in names if not WRITTEN_NAME.fullmatch(name)]
    if foreign:
        raise PipelineError(
            f"The folder '{folder}' holds '{foreign[0]}', which no simulation wrote.",
            "Give a new or empty folder: a simulation replaces the whole folder.",
        )


def _write(folder: Path, plan: _Plan, report: Report) -> None:
    """Simulate chunk by chunk, aside, and swap the folder in."""
    world = build_world(plan.seed, plan.start, plan.num_days)
    activity = 1.0 if plan.num_events is None else _find_activity(plan, world)
    with writing_folder(folder) as aside:
        entries = []
        for chunk in range(plan.num_chunks):
            entries.append(_write_chunk(aside, plan, world, chunk, activity))
            report(chunk + 1, plan.num_chunks, f"{sum(e.num_events for e in entries):,} events")
        _write_manifest(aside, plan, entries)


def _write_chunk(
    folder: Path, plan: _Plan, world: World, chunk: int, activity: float
) -> _FileEntry:
    """Write one chunk's file and describe it."""
    rng, population, events = _simulate_chunk(plan, world, chunk, activity)
    table = to_table(rng, world, chunk, events)
    path = folder / f"events-{chunk:05d}.parquet"
    write_events(path, table)
    span = pc.min_max(table["event_time"]).as_py()
    return _FileEntry(
        name=path.name,
        num_bytes=path.stat().st_size,
        num_events=table.num_rows,
        num_new_users=population.size - population.num_start,
        num_broken=_count_broken(table),
        first_event_at=span["min"],
        last_event_at=span["max"],
    )


def _simulate_chunk(
    plan: _Plan, world: World, chunk: int, activity: float
) -> tuple[np.random.Generator, Population, Events]:
    """Let one chunk of users live; return its generator for what is still to be drawn."""
    sequence = np.random.SeedSequence(plan.seed, spawn_key=(CHUNK_SPAWN_KEY, chunk))
    rng = np.random.default_rng(sequence)
    population = draw_population(rng, world, plan.users_of(chunk))
    sessions = live(rng, world, population, activity)
    events = render(rng, world, population, sessions)
    changing = np.random.SeedSequence(plan.seed, spawn_key=(CHANGES_SPAWN_KEY, chunk))
    drawn = np.random.default_rng(changing)  # of its own: without changes all is as ever
    return rng, population, apply_changes(drawn, events, plan.changes, plan.start)


def _count_broken(table: pa.Table) -> int:
    """Return how many rows lack their user, time or type; no row lacks two."""
    return sum(table[name].null_count for name in ("user_id", "event_time", "event_type"))


def _write_manifest(folder: Path, plan: _Plan, entries: list[_FileEntry]) -> None:
    """Write the arguments and the files beside them."""
    files = [
        {
            **vars(entry),
            "first_event_at": entry.first_event_at and entry.first_event_at.isoformat(),
            "last_event_at": entry.last_event_at and entry.last_event_at.isoformat(),
        }
        for entry in entries
    ]
    write_json(folder / MANIFEST_NAME, {"arguments": plan.arguments, "files": files})


def _read_summary(folder: Path) -> SimulationSummary:
    """Return the summary that a manifest adds up to."""
    content = read_json(folder / MANIFEST_NAME)
    files = content["files"]
    moments = {
        name: [datetime.fromisoformat(entry[name]) for entry in files if entry[name]]
        for name in ("first_event_at", "last_event_at")
    }
    start = datetime.fromisoformat(content["arguments"]["start"]).replace(tzinfo=UTC)
    return SimulationSummary(
        num_users=content["arguments"]["num_users"],
        num_new_users=sum(entry["num_new_users"] for entry in files),
        num_events=sum(entry["num_events"] for entry in files),
        num_broken=sum(entry["num_broken"] for entry in files),
        first_event_at=min(moments["first_event_at"], default=start),
        last_event_at=max(moments["last_event_at"], default=start),
        files=tuple(folder / entry["name"] for entry in files),
    )


def _find_activity(plan: _Plan, world: World) -> float:
    """Return the factor on session rates that gives about `plan.num_events` rows.

    Pilot chunks are simulated at trial factors until they hold their share of the rows; a single
    chunk brings the factor near, the others make up for what is peculiar to it.

    Raises:
        PipelineError: if no factor does.
    """
    activity, error = 1.0, math.inf
    for num_pilots in sorted({1, min(PILOT_CHUNKS, plan.num_chunks)}):
        users = sum(plan.users_of(chunk) for chunk in range(num_pilots))
        wanted = users * (plan.num_events or 0) / plan.num_users
        count = _pilot_counter(plan, world, num_pilots)
        activity, error = _solve(count, wanted, activity)
    if error > NUM_EVENTS_TOLERANCE:
        raise PipelineError(
            f"{plan.num_events:,} events cannot come from {plan.num_users:,} users "
            f"in {plan.num_days:,} days.",
            "Ask for another number of events, users or days, or leave the number of events out.",
        )
    return activity


def _pilot_counter(plan: _Plan, world: World, num_pilots: int) -> Callable[[float], int]:
    """Return a function that counts the rows of the first chunks at an activity."""

    def count(activity: float) -> int:
        chunks = range(num_pilots)
        return sum(_simulate_chunk(plan, world, chunk, activity)[2].size for chunk in chunks)

    return count


def _solve(count: Callable[[float], int], wanted: float, activity: float) -> tuple[float, float]:
    """Return the activity whose count comes nearest, and its relative error.

    Rows are nearly proportional to activity, so the next trial is the last one times what it fell
    short by; where days are nearly full this closes in more slowly.
    """
    trials: list[tuple[float, float]] = []
    for _ in range(PILOT_ROUNDS):
        found = count(activity)
        error = abs(found / wanted - 1.0)
        trials.append((error, activity))
        if error <= PILOT_TOLERANCE:
            break
        lowest, highest = ACTIVITY_RANGE
        activity = min(max(activity * wanted / max(found, 1), lowest), highest)
    error, activity = min(trials)
    return activity, error


def _check_at_least(name: str, value: int, least: int) -> None:
    """Refuse an argument below its least value."""
    if value < least:
        raise PipelineError(
            f"The {name} of a simulation is {value}; it must be at least {least}.",
            "Correct it in the settings or on the command line.",
        )
