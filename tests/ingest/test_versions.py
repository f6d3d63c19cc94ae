"""Ids that several arrivals hold: which row counts, and whom a load touches."""

from __future__ import annotations

from datetime import date, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from ingest_builders import LATER, NOW, events, load, quarantine, shop, write_rows

from behavior_pipeline.contracts import CHANGES, VERSIONS
from behavior_pipeline.ingest.arrivals import LoadSummary, find_arrival, loaded_arrivals
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage

COLUMNS = ("id", "who", "what", "at", "sku", "price", "gone")
PRESET = shop(item_id="sku\n  event_id: id\n  is_deleted: {column: gone, values: ['Yes', d]}")
NIGHT = "2024-01-05"

Row = tuple[str | None, ...]
UserDay = tuple[str, date]


def row(
    id_: str | None, who: str | None, at: str | None, what: str = "view", price: str = "1"
) -> Row:
    return (id_, who, what, at, "a", price, None)


def gone(id_: str | None, at: str | None = None) -> Row:
    return (id_, None, None, at, None, None, "yes")


HISTORY = [
    row("a", "ann", "2024-01-01 10:00"),
    row("b", "ann", "2024-01-02", "buy"),
    row("c", "bob", "2024-01-02"),
    row("d", "cyd", "2024-01-03"),
]


class Home:
    """A home to load arrivals into."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self.settings = folder, settings
        self.storage = Storage(folder / "home")

    def load(self, *rows: Row, arrival: str = NIGHT, at: datetime = LATER) -> LoadSummary:
        file = write_rows(self.folder / f"{arrival}.csv", rows, COLUMNS)
        return load(file, self.storage, self.settings, preset=PRESET, arrival=arrival, at=at)

    def changes(self, arrival: str = NIGHT) -> set[UserDay]:
        rows = self.written("changes.parquet", arrival)
        found = [(row["user_id"], row["activity_date"]) for row in rows]
        assert found == sorted(set(found))
        return set(found)

    def written(self, name: str, arrival: str = NIGHT) -> list[dict[str, Any]]:
        found = find_arrival(self.storage, arrival)
        assert found is not None
        return pq.ParquetFile(found.folder / name).read().to_pylist()

    @property
    def said(self) -> dict[str, tuple[str, float]]:
        """What counts: user and amount by id."""
        return {
            each["event_id"]: (each["user_id"], each["amount"]) for each in events(self.storage)
        }


@pytest.fixture
def home(tmp_path: Path, settings: Settings) -> Home:
    home = Home(tmp_path, settings)
    home.load(*HISTORY, arrival="history", at=NOW)
    return home


def day(number: int) -> date:
    return date(2024, 1, number)


CASES: dict[str, tuple[list[Row], set[UserDay], dict[str, int]]] = {
    "a new event": ([row("n", "dee", "2024-01-04")], {("dee", day(4))}, {"num_inserted": 1}),
    "a repeat": ([HISTORY[0]], set(), {"num_known": 1, "num_repeated": 1}),
    "a correction": (
        [row("a", "ann", "2024-01-01 10:00", price="9")],
        {("ann", day(1))},
        {"num_corrected": 1},
    ),
    "another day": (
        [row("a", "ann", "2024-01-09")],
        {("ann", day(1)), ("ann", day(9))},
        {"num_corrected": 1},
    ),
    "another user": (
        [row("c", "dee", "2024-01-02")],
        {("bob", day(2)), ("dee", day(2))},
        {"num_corrected": 1},
    ),
    "a deletion": ([gone("d")], {("cyd", day(3))}, {"num_deletions": 1, "num_stored": 0}),
    "a deletion of nothing": ([gone("x")], set(), {"num_deletions": 1}),
    "a duplicate": ([row("n", "dee", "2024-01-04")] * 2, {("dee", day(4))}, {"num_duplicates": 1}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_load_touches_exactly_the_days_that_it_changes(home: Home, case: str) -> None:
    rows, touched, counts = CASES[case]
    summary = home.load(*rows)
    assert home.changes() == touched
    assert summary.num_users_touched == len({user for user, _ in touched})
    assert {name: getattr(summary, name) for name in counts} == counts
    assert home.changes("history") == {
        ("ann", day(1)), ("ann", day(2)), ("bob", day(2)), ("cyd", day(3)),
    }  # fmt: skip


def test_of_an_id_the_newest_arrival_counts_whenever_it_is_loaded(home: Home) -> None:
    new, old = row("a", "ann", "2024-01-01 10:00", price="7"), row("a", "eve", "2024-01-08")
    home.load(new, arrival="2024-01-06")
    assert home.said["a"] == ("ann", 7.0)
    summary = home.load(old)  # between the history and that night, but later
    assert home.said["a"] == ("ann", 7.0)
    assert home.changes() == set()
    assert (summary.num_corrected, summary.num_users_touched) == (1, 0)
    assert [each.key for each in loaded_arrivals(home.storage)] == ["history", NIGHT, "2024-01-06"]


def test_a_deletion_holds_for_arrivals_before_it_and_may_be_taken_back(home: Home) -> None:
    home.load(gone("c"), arrival="2024-01-06")
    home.load(row("c", "bob", "2024-01-02", price="5"))
    assert "c" not in home.said
    assert home.changes() == set()
    home.load(row("c", "bob", "2024-01-02", price="6"), arrival="2024-01-07")
    assert home.said["c"] == ("bob", 6.0)
    assert home.changes("2024-01-07") == {("bob", day(2))}


def test_loading_less_takes_back_what_the_arrival_changed(home: Home) -> None:
    home.load(
        row("a", "ann", "2024-01-01 10:00", price="9"), row("n", "dee", "2024-01-04"), gone("d")
    )
    assert set(home.said) == {"a", "b", "c", "n"}
    summary = home.load(row("n2", "dee", "2024-01-06"))
    assert home.said == {name: (who, 1.0) for name, who, *_ in HISTORY} | {"n2": ("dee", 1.0)}
    # whoever the loads before changed too: nobody may have worked on them yet
    assert home.changes() == {
        ("ann", day(1)), ("dee", day(4)), ("cyd", day(3)), ("dee", day(6)),
    }  # fmt: skip
    assert summary.num_users_touched == 3


def test_a_correction_corrected_touches_the_user_between_too(home: Home) -> None:
    home.load(row("c", "dee", "2024-01-02"))
    home.load(row("c", "eve", "2024-01-02"))
    assert home.said["c"] == ("eve", 1.0)
    assert home.changes() == {("bob", day(2)), ("dee", day(2)), ("eve", day(2))}


def test_every_version_of_a_contested_id_is_listed(home: Home) -> None:
    home.load(
        row("a", "ann", "2024-01-01 10:00", price="9"), row("n", "dee", "2024-01-04"), gone("d")
    )
    found = find_arrival(home.storage, NIGHT)
    assert found is not None
    schema = pq.ParquetFile(found.folder / "versions.parquet").schema_arrow
    assert schema.equals(VERSIONS.schema, check_metadata=False)
    changes = pq.ParquetFile(found.folder / "changes.parquet").schema_arrow
    assert changes.equals(CHANGES.schema, check_metadata=False)
    versions = home.written("versions.parquet")
    listed = {(each["event_id"], each["arrival"]): each["ingested_at"] for each in versions}
    assert listed == {
        ("a", NIGHT): LATER, ("a", "history"): NOW, ("d", NIGHT): None, ("d", "history"): NOW,
    }  # fmt: skip
    states = {(each["event_id"], each["arrival"]): each["state"] for each in versions}
    assert states["d", NIGHT] == 0
    assert states["a", NIGHT] != states["a", "history"]
    assert 0 not in {states["a", NIGHT], states["a", "history"], states["d", "history"]}
    assert home.written("versions.parquet", "history") == []
    assert home.written("deletions.parquet") == [{"event_id": "d"}]


def test_a_repeat_keeps_the_time_at_which_it_first_came(home: Home) -> None:
    home.load(HISTORY[0])
    (first,) = [each for each in events(home.storage) if each["event_id"] == "a"]
    assert first["ingested_at"] == NOW
    assert {each["ingested_at"] for each in events(home.storage, NIGHT)} == {LATER}


def test_new_events_are_counted_by_their_age(home: Home) -> None:
    moments = ["2024-01-06 00:00", "2024-01-05 23:59", "2024-01-04", "2024-01-03", "2023-12-29",
               "2023-12-28", "2023-12-06", "2023-12-05"]  # fmt: skip
    rows = [row(f"n{number}", "dee", moment) for number, moment in enumerate(moments)]
    assert home.load(*rows, HISTORY[0]).late == {
        "from the future": 1, "same day": 1, "1 day": 1, "2 to 7 days": 2, "8 to 30 days": 2,
        "more than 30 days": 1,
    }  # fmt: skip


@pytest.mark.parametrize("value", ["yes", "YES", "D"])
def test_a_tombstone_needs_nothing_but_its_id(home: Home, value: str) -> None:
    summary = home.load((*gone("d")[:-1], value), (*gone(None)[:-1], value))
    assert "d" not in home.said
    assert summary.reasons == {"event_id is null or empty": 1}
    assert quarantine(home.storage, NIGHT)[0]["column_name"] == "id"


def test_other_values_delete_nothing(home: Home) -> None:
    summary = home.load((*row("d", "cyd", "2024-01-03")[:-1], "no"), row("e", "cyd", "2024-01-04"))
    assert (summary.num_deletions, summary.num_stored) == (0, 2)


def test_in_one_load_a_tombstone_wins_over_a_row_of_its_file(home: Home) -> None:
    summary = home.load(gone("n"), row("n", "dee", "2024-01-04"), row("o", "dee", "2024-01-04"))
    assert set(home.said) == {"a", "b", "c", "d", "o"}
    assert (summary.num_deletions, summary.num_duplicates, summary.num_stored) == (1, 1, 1)


def test_the_last_file_by_name_wins(home: Home) -> None:
    folder = home.folder / "in"
    for name, rows in {"1": [gone("n"), row("m", "dee", "2024-01-04")],
                       "2": [row("n", "dee", "2024-01-04"), gone("m")]}.items():  # fmt: skip
        write_rows(folder / f"{name}.csv", rows, COLUMNS)
    load(folder, home.storage, home.settings, preset=PRESET, arrival=NIGHT, at=LATER)
    assert {"n", "m"} & set(home.said) == {"n"}
    assert home.written("deletions.parquet") == [{"event_id": "m"}]


def test_a_night_takes_tombstones_of_a_dump_that_have_no_time(home: Home) -> None:
    file = write_rows(
        home.folder / "dump.csv", [*HISTORY[1:], gone("a"), gone("c", "2024-01-03")], COLUMNS
    )
    summary = load(
        file, home.storage, home.settings, preset=PRESET, arrival="2024-01-02", at=LATER, day=day(2)
    )
    assert (summary.num_read, summary.num_deletions, summary.num_known) == (3, 1, 2)
    assert set(home.said) == {"b", "c", "d"}


def test_a_history_may_delete_what_it_had(home: Home) -> None:
    home.load(*HISTORY[:3], gone("d"), arrival="history")
    assert set(home.said) == {"a", "b", "c"}
