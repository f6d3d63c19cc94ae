"""What sets a segment apart, from RFM: medians, churn rate and a name in words."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import duckdb
import pyarrow as pa

from behavior_pipeline import sql
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage

LOW, HIGH = 1 / 3, 2 / 3
"""A median below or above so much of all users gets a word."""

WORDS: Final = (
    ("recency_days", "recent", "lapsed"),
    ("frequency", "occasional", "frequent"),
    ("monetary", "low-value", "high-value"),
)
"""RFM column, word for a low median, word for a high one."""

MAX_TRAITS: Final = 3
MIN_EFFECT: Final = 0.2  # smaller differences, in standard deviations, set nobody apart
WINDOW_SUFFIX: Final = re.compile(r"_(\d+d|lookback)$")
DIGITS: Final = 3

TYPICAL: Final = "typical"
WITHOUT_RFM: Final = "no qualifying events"


@dataclass(frozen=True)
class Trait:
    """A column of the aggregates in which a segment differs from all users.

    Attributes:
        column: of the mart `user_aggregates`.
        median, median_of_all: in the segment and among all users.
        effect: difference of the means of signed log(1 + |x|), in standard deviations.
    """

    column: str
    median: float
    median_of_all: float
    effect: float


@dataclass(frozen=True)
class Profile:
    """One segment in figures and words.

    Attributes:
        segment: 0 is the largest.
        name: what sets it apart, unique among the segments.
        num_users: its users.
        share: of all users with an embedding.
        num_with_rfm: its users with a qualifying event before the cutoff.
        recency_days, frequency, monetary: medians of those; None where there are none.
        num_labeled: its users whose churn is known.
        churn_rate: of those; None where there are none.
        traits: the aggregates that set it apart most; none where that mart was not built.
    """

    segment: int
    name: str
    num_users: int
    share: float
    num_with_rfm: int
    recency_days: float | None
    frequency: float | None
    monetary: float | None
    num_labeled: int
    churn_rate: float | None
    traits: tuple[Trait, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the profile as JSON values."""
        return asdict(self)


def describe_segments(
    storage: Storage,
    settings: Settings,
    segments: Path,
    rfm: Path,
    labels: Path | None,
    cutoff: datetime,
) -> list[Profile]:
    """Describe each segment of a file with `user_id` and `segment`.

    Args:
        segments: Parquet of all users with their segment.
        rfm: the mart at the same cutoff.
        labels: the mart at the same cutoff, or None where the future is not known.
        cutoff: whose aggregates, if they were built, tell the traits.
    """
    aggregates = storage.marts(cutoff) / "user_aggregates.parquet"
    with sql.open_engine(settings.memory_limit, settings.threads, storage.scratch) as engine:
        _join(engine, segments, rfm, labels)
        rows = _medians(engine)
        places = {row["segment"]: _places(engine, row) for row in rows}
        traits = _traits(engine, segments, aggregates) if aggregates.is_file() else {}
    total = sum(row["num_users"] for row in rows)
    words = [_words(places[row["segment"]], row) for row in rows]
    names = _unique(_with_traits(words, [traits.get(row["segment"], ()) for row in rows]))
    return [
        Profile(
            name=name,
            share=round(row["num_users"] / total, 6),
            traits=traits.get(row["segment"], ()),
            **row,
        )
        for name, row in zip(names, rows, strict=True)
    ]


def _join(
    engine: duckdb.DuckDBPyConnection, segments: Path, rfm: Path, labels: Path | None
) -> None:
    """Make the table `users`: segment, RFM and churn of every user, null where unknown."""
    known = "read_parquet($labels)" if labels else "(select null as user_id, null as is_churned)"
    query = f"""
        create temp table users as
        select segments.segment, rfm.recency_days, rfm.frequency::double as frequency,
            rfm.monetary, known.is_churned::boolean as is_churned
        from read_parquet($segments) as segments
        left join read_parquet($rfm) as rfm using (user_id)
        left join {known} as known using (user_id)
    """
    values = {"segments": str(segments), "rfm": str(rfm)}
    engine.execute(query, values | ({"labels": str(labels)} if labels else {}))


def _medians(engine: duckdb.DuckDBPyConnection) -> list[dict[str, Any]]:
    """Return one row of figures per segment, in their order."""
    query = """
        select
            segment,
            count(*) as num_users,
            count(recency_days) as num_with_rfm,
            round(median(recency_days), 6) as recency_days,
            round(median(frequency), 6) as frequency,
            round(median(monetary), 6) as monetary,
            count(is_churned) as num_labeled,
            round(count(*) filter (where is_churned) / nullif(count(is_churned), 0), 6)
                as churn_rate
        from users group by segment order by segment
    """
    rows: list[dict[str, Any]] = engine.execute(query).to_arrow_table().to_pylist()
    return rows


def _places(engine: duckdb.DuckDBPyConnection, row: dict[str, Any]) -> dict[str, float | None]:
    """Return how much of all users with RFM lies below each median, ties counting one half."""
    places: dict[str, float | None] = {}
    for column, _, _ in WORDS:
        name = sql.quote_identifier(column)
        query = f"""
            select (count(*) filter (where {name} < $median)
                + count(*) filter (where {name} = $median) / 2) / nullif(count({name}), 0)
            from users
        """
        found = engine.execute(query, {"median": row[column]}).fetchone()
        places[column] = found[0] if found and row[column] is not None else None
    return places


def _traits(
    engine: duckdb.DuckDBPyConnection, segments: Path, aggregates: Path
) -> dict[int, tuple[Trait, ...]]:
    """Return by segment the aggregates that set it apart most, one of each family of windows."""
    values = {"segments": str(segments), "aggregates": str(aggregates)}
    query = """
        create temp table described as
        select segments.segment, aggregates.* exclude (user_id, observation_cutoff)
        from read_parquet($segments) as segments
        join read_parquet($aggregates) as aggregates using (user_id)
    """
    engine.execute(query, values)
    columns = _numeric_columns(engine)
    if not columns:
        return {}
    by_segment = _moments(engine, columns, "segment")
    everyone = _moments(engine, columns, "null::integer")[0]
    return {row["segment"]: _strongest(columns, row, everyone) for row in by_segment}


def _numeric_columns(engine: duckdb.DuckDBPyConnection) -> list[str]:
    """Return the names of the aggregates that are numbers."""
    table = engine.execute("select * exclude (segment) from described limit 0").to_arrow_table()
    return [
        field.name
        for field in table.schema
        if pa.types.is_floating(field.type) or pa.types.is_integer(field.type)
    ]


def _moments(
    engine: duckdb.DuckDBPyConnection, columns: list[str], key: str
) -> list[dict[str, Any]]:
    """Return median, and mean and deviation on a log scale, of each column by a key."""
    names = [sql.quote_identifier(column) for column in columns]
    logs = [f"sign({name}) * ln(1 + abs({name}))" for name in names]
    figures = ", ".join(
        f"median({name})::double as median_{number}, avg({log})::double as mean_{number}, "
        f"stddev_pop({log})::double as deviation_{number}"
        for number, (name, log) in enumerate(zip(names, logs, strict=True))
    )
    query = f"select {key} as segment, {figures} from described group by 1 order by 1"
    rows: list[dict[str, Any]] = engine.execute(query).to_arrow_table().to_pylist()
    return rows


def _strongest(
    columns: list[str], row: dict[str, Any], everyone: dict[str, Any]
) -> tuple[Trait, ...]:
    """Return the traits of the largest effects, at most one per family such as `amount_30d`."""
    traits = []
    for number, column in enumerate(columns):
        deviation = everyone[f"deviation_{number}"]
        if deviation and row[f"mean_{number}"] is not None:
            effect = (row[f"mean_{number}"] - everyone[f"mean_{number}"]) / deviation
            median = round(row[f"median_{number}"], DIGITS)
            median_of_all = round(everyone[f"median_{number}"], DIGITS)
            traits.append(Trait(column, median, median_of_all, round(effect, DIGITS)))
    chosen: dict[str, Trait] = {}
    strong = [trait for trait in traits if abs(trait.effect) >= MIN_EFFECT]
    for trait in sorted(strong, key=lambda trait: (-abs(trait.effect), trait.column)):
        chosen.setdefault(WINDOW_SUFFIX.sub("", trait.column), trait)
    return tuple(list(chosen.values())[:MAX_TRAITS])


def _words(places: dict[str, float | None], row: dict[str, Any]) -> str:
    """Return a segment's name from where its medians stand among all users."""
    if not row["num_with_rfm"]:
        return WITHOUT_RFM
    words = []
    for column, low, high in WORDS:
        place = places[column]
        if place is not None and place <= LOW:
            words.append(low)
        elif place is not None and place >= HIGH:
            words.append(high)
    return " ".join(words) or TYPICAL


def _with_traits(names: list[str], traits: list[tuple[Trait, ...]]) -> list[str]:
    """Add to names that occur more than once what sets each segment apart most."""
    told = []
    for name, strongest in zip(names, traits, strict=True):
        if names.count(name) > 1 and strongest:
            side = "high" if strongest[0].effect > 0 else "low"
            column = WINDOW_SUFFIX.sub("", strongest[0].column).removeprefix("num_")
            told.append(f"{name}, {side} {column.replace('_', ' ')}")
        else:
            told.append(name)
    return told


def _unique(names: list[str]) -> list[str]:
    """Number the names that occur more than once, the largest segment first."""
    seen: dict[str, int] = {}
    unique = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        unique.append(f"{name} ({seen[name]})" if names.count(name) > 1 else name)
    return unique
