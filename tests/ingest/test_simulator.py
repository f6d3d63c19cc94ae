"""The simulated shop: seeded, streamed, broken where it says, and true to its story."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from behavior_pipeline.errors import PipelineError
from behavior_pipeline.ingest.files import find_files
from behavior_pipeline.ingest.presets import load_preset
from behavior_pipeline.ingest.simulation.export import SOURCE_SCHEMA
from behavior_pipeline.ingest.simulation.rendering import EVENT_TYPES
from behavior_pipeline.ingest.simulation.user_types import NEW_USERS_PER_DAY, USER_TYPES
from behavior_pipeline.ingest.simulator import SimulationSummary, is_simulated, simulate

NUM_USERS, NUM_DAYS, SEED = 3000, 180, 7
START = datetime(2026, 1, 1, tzinfo=UTC)
SESSION_GAP = timedelta(minutes=30)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> SimulationSummary:
    return simulate(tmp_path_factory.mktemp("shop") / "raw", NUM_USERS, NUM_DAYS, SEED)


@pytest.fixture(scope="module")
def rows(shop: SimulationSummary) -> pl.DataFrame:
    return pl.read_parquet(shop.files)


@pytest.fixture(scope="module")
def events(rows: pl.DataFrame) -> pl.DataFrame:
    whole = rows.drop_nulls(["user_id", "event_time", "event_type"])
    return whole.sort("user_id", "event_time", "event_id")


@pytest.fixture(scope="module")
def sessions(events: pl.DataFrame) -> pl.DataFrame:
    """One row per session of shopping, with how it ended and how long the user had been away."""
    shopping = events.filter(~pl.col("event_type").is_in(["support_ticket", "return"]))
    is_new = pl.col("event_time").diff().over("user_id") > SESSION_GAP
    numbered = shopping.with_columns(
        session=is_new.fill_null(value=True).cum_sum().over("user_id"),
    )
    return (
        numbered.group_by("user_id", "session")
        .agg(
            started_at=pl.col("event_time").min(),
            size=pl.len(),
            is_bought=(pl.col("event_type") == "purchase").any(),
            has_cart=(pl.col("event_type") == "add_to_cart").any(),
            num_categories=pl.col("category").n_unique(),
        )
        .sort("user_id", "session")
        .with_columns(
            is_abandoned=pl.col("has_cart") & ~pl.col("is_bought"),
            gap_days=pl.col("started_at").diff().over("user_id").dt.total_seconds() / 86400,
        )
    )


def bytes_of(summary: SimulationSummary) -> list[bytes]:
    return [path.read_bytes() for path in summary.files]


def test_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    first = simulate(tmp_path / "a", 300, 30, 1)
    again = simulate(tmp_path / "b", 300, 30, 1)
    other = simulate(tmp_path / "c", 300, 30, 2)
    assert bytes_of(first) == bytes_of(again)
    assert bytes_of(first) != bytes_of(other)
    assert (tmp_path / "a/_simulation.json").read_bytes() == (
        tmp_path / "b/_simulation.json"
    ).read_bytes()


def test_a_chunk_of_users_does_not_depend_on_the_others(tmp_path: Path) -> None:
    alone = simulate(tmp_path / "alone", 4096, 6, 3)
    among = simulate(tmp_path / "among", 4500, 6, 3)
    assert len(alone.files) == 1
    assert len(among.files) == 2
    assert bytes_of(alone)[0] == bytes_of(among)[0]
    users = [set(pl.read_parquet(path)["user_id"].drop_nulls()) for path in among.files]
    assert users[0].isdisjoint(users[1])
    assert pl.read_parquet(among.files)["event_id"].is_unique().all()


def test_source_columns_are_plain_and_typed(shop: SimulationSummary, rows: pl.DataFrame) -> None:
    assert pq.read_schema(shop.files[0]).equals(SOURCE_SCHEMA)
    assert rows["event_id"].is_unique().all()
    for name in ("event_id", "category", "region", "device"):
        assert rows[name].null_count() == 0, name
    assert set(rows["event_type"].drop_nulls()) == set(EVENT_TYPES)
    assert rows["category"].n_unique() == 40
    assert rows["region"].n_unique() == 20


def test_columns_are_filled_where_they_mean_something(events: pl.DataFrame) -> None:
    kind = pl.col("event_type")
    is_search, is_purchase = kind == "search", kind == "purchase"
    has_pieces = kind.is_in(["add_to_cart", "remove_from_cart", "purchase", "return"])
    amount = (pl.col("price") * pl.col("quantity")).round(2)
    wrong = events.filter(
        (pl.col("product_id").is_null() != is_search)
        | (pl.col("amount").is_null() == is_purchase)
        | (pl.col("quantity").is_null() == has_pieces)
        | (is_purchase & ((pl.col("amount") - amount).abs() > 1e-6))
        | (pl.col("price") <= 0)
        | (pl.col("quantity") < 1)
    )
    assert wrong.height == 0


def test_events_of_a_user_have_distinct_times_inside_the_period(events: pl.DataFrame) -> None:
    gaps = events.select(gap=pl.col("event_time").diff().over("user_id")).drop_nulls()
    assert gaps["gap"].min() > timedelta(0)  # type: ignore[operator]
    assert events["event_time"].min() >= START  # type: ignore[operator]
    assert events["event_time"].max() < START + timedelta(days=NUM_DAYS)  # type: ignore[operator]


def test_a_small_share_of_rows_is_broken(shop: SimulationSummary, rows: pl.DataFrame) -> None:
    nulls = rows.select(
        number=pl.sum_horizontal(pl.col("user_id", "event_time", "event_type").is_null())
    )["number"]
    assert nulls.max() == 1
    assert 0.0003 < nulls.sum() / rows.height < 0.0007
    assert nulls.sum() == shop.num_broken
    assert all(rows[name].null_count() > 0 for name in ("user_id", "event_time", "event_type"))


def test_the_summary_tells_what_was_written(shop: SimulationSummary, rows: pl.DataFrame) -> None:
    assert shop.num_users == NUM_USERS
    assert shop.num_events == rows.height
    assert 300_000 < shop.num_events < 500_000
    assert shop.first_event_at == rows["event_time"].min()
    assert shop.last_event_at == rows["event_time"].max()


def test_new_users_come_every_day(shop: SimulationSummary, events: pl.DataFrame) -> None:
    first = events.group_by("user_id").agg(day=pl.col("event_time").min().dt.date())
    late = first.filter(pl.col("user_id") >= f"u{NUM_USERS:011d}")
    assert late.height == pytest.approx(shop.num_new_users, rel=0.01)
    expected = NEW_USERS_PER_DAY * NUM_USERS
    assert late.height / NUM_DAYS == pytest.approx(expected, rel=0.1)
    assert late["day"].n_unique() >= NUM_DAYS - 3
    last_month = late.filter(pl.col("day") >= date(2026, 5, 31))
    assert last_month.height / 30 == pytest.approx(expected, rel=0.25)


def top_share(events: pl.DataFrame, column: str, share: float) -> float:
    """Share of events that fall to the most frequent values of a column."""
    counts = (
        events.drop_nulls(column)[column].value_counts().sort("count", descending=True)["count"]
    )
    return float(counts.head(max(int(len(counts) * share), 1)).sum() / counts.sum())


def test_catalogue_users_and_regions_have_heavy_tails(events: pl.DataFrame) -> None:
    assert top_share(events, "product_id", 0.01) > 0.10
    assert top_share(events, "user_id", 0.10) > 0.30
    assert top_share(events, "region", 0.10) > 0.25
    assert events["product_id"].n_unique() > 1500


def test_days_and_hours_have_a_rhythm(sessions: pl.DataFrame) -> None:
    hours = sessions["started_at"].dt.hour().value_counts().sort("started_at")["count"]
    assert len(hours) == 24
    assert hours.max() > 8 * hours.min()  # type: ignore[operator]
    days = sessions["started_at"].dt.weekday().value_counts().sort("started_at")["count"]
    assert days[5:].mean() > 1.05 * days[:5].mean()  # type: ignore[operator]


def test_types_fill_their_shares() -> None:
    assert sum(kind.start_share for kind in USER_TYPES) == pytest.approx(1.0)
    assert sum(kind.arrival_share for kind in USER_TYPES) == pytest.approx(1.0)


def test_leaving_shows_in_behavior_before_it_happens(sessions: pl.DataFrame) -> None:
    """Of those who left, the last sessions against their own earlier ones; stayers as a control."""
    end = START + timedelta(days=NUM_DAYS)
    by_user = sessions.filter(pl.len().over("user_id") >= 12).with_columns(
        is_late=pl.int_range(pl.len()).over("user_id") >= pl.len().over("user_id") - 3,
        last_at=pl.col("started_at").max().over("user_id"),
    )
    left = by_user.filter(pl.col("last_at") < end - timedelta(days=60))
    stayed = by_user.filter(pl.col("last_at") >= end - timedelta(days=7))
    assert left["user_id"].n_unique() > 200

    def change(group: pl.DataFrame, column: str) -> float:
        """Mean over users of their last three sessions, over that of their earlier ones."""
        means = group.group_by("user_id", "is_late").agg(pl.col(column).mean())
        by_time = dict(means.group_by("is_late").agg(pl.col(column).mean()).iter_rows())
        return float(by_time[True] / by_time[False])

    assert change(left, "is_abandoned") > change(stayed, "is_abandoned") + 0.2
    assert change(left, "gap_days") > change(stayed, "gap_days") + 0.1
    assert change(left, "size") < 0.9 < change(stayed, "size")
    assert change(left, "num_categories") < 0.9 < change(stayed, "num_categories")
    assert change(left, "is_bought") < change(stayed, "is_bought")


def test_order_of_the_same_contacts_tells_who_leaves(events: pl.DataFrame) -> None:
    """One ticket and one return, nothing else: only their order sets these users apart."""
    contacts = events.filter(pl.col("event_type").is_in(["support_ticket", "return"]))
    early = contacts.filter(pl.col("event_time") < START + timedelta(days=100))
    pairs = early.group_by("user_id", maintain_order=True).agg(
        first=pl.col("event_type").first(),
        number=pl.len(),
        num_kinds=pl.col("event_type").n_unique(),
        settled_at=pl.col("event_time").last(),
    )
    matched = pairs.filter((pl.col("number") == 2) & (pl.col("num_kinds") == 2))
    later = events.join(matched, on="user_id").filter(
        (pl.col("event_type") == "purchase")
        & (pl.col("event_time") > pl.col("settled_at") + pl.duration(days=30))
        & (pl.col("event_time") < pl.col("settled_at") + pl.duration(days=75))
    )
    matched = matched.with_columns(
        buys=pl.col("user_id").is_in(later["user_id"].unique().to_list())
    )
    shares = dict(matched.group_by("first").agg(pl.col("buys").mean()).iter_rows())
    assert matched.height > 200
    assert shares["return"] > shares["support_ticket"] + 0.15


def test_recent_browsing_tells_the_category_bought_next(events: pl.DataFrame) -> None:
    views = (pl.col("event_type") == "view").alias("is_view")
    with_last = events.with_columns(
        seen=pl.when(views).then("category").forward_fill().shift(12).over("user_id"),
    ).filter((pl.col("event_type") == "purchase") & pl.col("seen").is_not_null())
    hit = (with_last["seen"] == with_last["category"]).mean()
    by_chance = with_last["category"].value_counts(normalize=True)["proportion"].pow(2).sum()
    assert hit > 4 * by_chance  # type: ignore[operator]


@pytest.mark.parametrize(
    ("num_users", "num_days", "num_events"),
    [(150, 40, 3_000), (800, 90, 120_000), (3000, 180, 250_000), (20_000, 12, 100_000)],
)
def test_as_many_events_as_asked_for(
    tmp_path: Path, num_users: int, num_days: int, num_events: int
) -> None:
    summary = simulate(tmp_path / "raw", num_users, num_days, 5, num_events=num_events)
    assert summary.num_events == pytest.approx(num_events, rel=0.05)


def test_an_impossible_number_of_events_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="1,000,000 events cannot come from 2 users in 1 days"):
        simulate(tmp_path / "raw", 2, 1, 0, num_events=1_000_000)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "name"),
    [((0, 5, 0), "number of users"), ((5, 0, 0), "number of days"), ((5, 5, -1), "seed")],
)
def test_arguments_out_of_range_are_refused(
    tmp_path: Path, arguments: tuple[int, int, int], name: str
) -> None:
    with pytest.raises(PipelineError, match=f"The {name} of a simulation is"):
        simulate(tmp_path / "raw", *arguments)


def test_a_folder_that_holds_the_simulation_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "raw"
    assert not is_simulated(folder, 50, 10, 0)
    first = simulate(folder, 50, 10, 0)
    before = first.files[0].stat().st_mtime_ns
    assert is_simulated(folder, 50, 10, 0)
    assert simulate(folder, 50, 10, 0) == first
    assert first.files[0].stat().st_mtime_ns == before
    assert not is_simulated(folder, 50, 10, 1)
    assert not is_simulated(folder, 50, 10, 0, date(2026, 1, 2))
    assert not is_simulated(folder, 50, 10, 0, num_events=500)
    first.files[0].write_bytes(first.files[0].read_bytes()[:-1])
    assert not is_simulated(folder, 50, 10, 0)


def test_the_folder_reads_as_parquet_alone(tmp_path: Path) -> None:
    summary = simulate(tmp_path / "raw", 50, 5, 0)
    assert find_files(str(tmp_path / "raw")).files == tuple(str(path) for path in summary.files)


def test_a_folder_with_other_things_is_never_replaced(tmp_path: Path) -> None:
    simulate(tmp_path / "raw", 50, 5, 0)
    for folder, name in (("home", "letter.txt"), ("raw", "events-mine.parquet")):
        mine = tmp_path / folder / name
        mine.parent.mkdir(exist_ok=True)
        mine.write_text("mine")
        with pytest.raises(PipelineError, match=f"holds '{name}'"):
            simulate(tmp_path / folder, 50, 5, 1)
        assert mine.read_text() == "mine"
    with pytest.raises(PipelineError, match="is a file"):
        simulate(tmp_path / "home" / "letter.txt", 50, 5, 1)


def test_other_arguments_replace_the_whole_folder(tmp_path: Path) -> None:
    simulate(tmp_path / "raw", 4200, 3, 0)
    summary = simulate(tmp_path / "raw", 50, 3, 0)
    names = {path.name for path in (tmp_path / "raw").iterdir()}
    assert names == {summary.files[0].name, "_simulation.json"}


def test_a_failure_leaves_the_old_folder(tmp_path: Path) -> None:
    old = bytes_of(simulate(tmp_path / "raw", 50, 5, 0))

    def fail(done: int, total: int, message: str) -> None:
        raise RuntimeError(done, total, message)

    with pytest.raises(RuntimeError):
        simulate(tmp_path / "raw", 5000, 3, 0, report=fail)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]
    assert bytes_of(simulate(tmp_path / "raw", 50, 5, 0)) == old


def test_a_kill_leaves_no_partial_folder(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path\n"
        "from behavior_pipeline.ingest.simulator import simulate\n"
        "kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "simulate(Path(sys.argv[1]), 5000, 3, 0, report=kill)"
    )
    folder = tmp_path / "raw"
    done = subprocess.run([sys.executable, "-c", program, str(folder)], check=False, env=os.environ)
    assert done.returncode == -signal.SIGKILL
    assert not folder.exists()
    after = simulate(folder, 5000, 3, 0)
    assert bytes_of(after) == bytes_of(simulate(tmp_path / "undisturbed", 5000, 3, 0))


def test_progress_counts_chunks(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    simulate(
        tmp_path / "raw", 5000, 2, 0, report=lambda done, total, _: calls.append((done, total))
    )
    assert calls == [(1, 2), (2, 2)]


@hypothesis_settings(max_examples=12)
@given(num_users=st.integers(1, 6), num_days=st.integers(1, 9), seed=st.integers(0, 2**63))
def test_the_smallest_shops_are_whole(
    tmp_path_factory: pytest.TempPathFactory, num_users: int, num_days: int, seed: int
) -> None:
    summary = simulate(tmp_path_factory.mktemp("tiny") / "raw", num_users, num_days, seed)
    table = pq.read_table(list(summary.files))
    assert table.schema.equals(SOURCE_SCHEMA)
    assert table.num_rows == summary.num_events
    assert summary.first_event_at <= summary.last_event_at


def test_the_preset_maps_columns_that_exist() -> None:
    preset = load_preset("simulated")
    assert preset.is_simulated
    mappings = [getattr(preset.columns, name) for name in type(preset.columns).model_fields]
    columns = {getattr(mapping, "column", None) for mapping in mappings} - {None}
    assert columns <= set(SOURCE_SCHEMA.names)
    assert set(preset.tasks.qualifying_event_types or ()) <= set(EVENT_TYPES)
    assert set(preset.tasks.propensity_event_types or ()) <= set(EVENT_TYPES)
