from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from ingest_builders import (
    LATER,
    NOW,
    ROWS,
    Row,
    events,
    home,
    load,
    quarantine,
    shop,
    write_rows,
)

from behavior_pipeline.contracts import CANONICAL_EVENTS, COLD_START_USER, QUARANTINE
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.ingest.arrivals import LoadSummary, events_span, find_arrival
from behavior_pipeline.ingest.load import load_arrival
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage, read_json, remove_leftovers

BROKEN: list[tuple[Row, str]] = [
    ((None, "view", "2024-01-01", "a", "1"), "user_id is null or empty"),
    (("1", "", "2024-01-01", "a", "1"), "event_type is null or empty"),
    (("1", "view", None, "a", "1"), "occurred_at is null"),
    (("1", "view", "soon", "a", "1"), "occurred_at cannot be read as a time"),
    (("1", "view", "2019-12-31", "a", "1"), "occurred_at is before 2020-01-01T00:00:00+00:00"),
    (("1", "view", "2030-01-01", "a", "1"), "occurred_at is at or after 2030-01-01T00:00:00+00:00"),
    (("1", "view", "2024-01-01", "a", "lots"), "amount is not a number"),
    (("1", "view", "2024-01-01", "a", "nan"), "amount is not a number"),
    ((COLD_START_USER, "view", "2024-01-01", "a", "1"), "user_id is reserved"),
    ((None, None, None, "a", "x"), "user_id is null or empty"),  # the first reason wins
]
GOOD = st.tuples(
    st.sampled_from(["1", "2", "3"]),
    st.sampled_from(["view", "buy"]),
    st.sampled_from(["2024-01-01", "2024-01-02 10:00:00"]),
    st.sampled_from([None, "a", 'b "quoted"', "c, d\ne"]),
    st.sampled_from([None, "1.0", "2.5"]),
)
ANY_ROW = GOOD | st.sampled_from([row for row, _ in BROKEN])
ANCHORS: list[Row] = [ROWS[0], ROWS[2]]  # two event types, so that there is something to learn


def _loose(settings: Settings) -> Settings:
    return settings.model_copy(update={"max_quarantined_share": 1.0})


def test_files_follow_the_contracts(tmp_path: Path, storage: Storage, settings: Settings) -> None:
    rows = [*reversed(ROWS), BROKEN[0][0]]
    summary = load(write_rows(tmp_path / "a.csv", rows), storage, settings)
    assert summary == LoadSummary(
        num_read=6,
        num_accepted=5,
        num_stored=5,
        num_duplicates=0,
        num_known=0,
        num_corrected=0,
        num_deletions=0,
        num_quarantined=1,
        num_users=3,
        num_users_touched=3,
        first_event_at=datetime(2024, 1, 1, 10, tzinfo=UTC),
        last_event_at=datetime(2024, 1, 3, 23, 59, 59, 500_000, tzinfo=UTC),
        reasons={"user_id is null or empty": 1},
        late={},
    )
    (file,) = (storage.events / "arrival=history").glob("load=*/events.parquet")
    assert pq.ParquetFile(file).schema_arrow.equals(CANONICAL_EVENTS.schema, check_metadata=False)
    (bad,) = (storage.quarantine / "arrival=history").glob("load=*/quarantine.parquet")
    assert pq.ParquetFile(bad).schema_arrow.equals(QUARANTINE.schema, check_metadata=False)
    written = events(storage, "history")
    assert written == events(storage)  # in the contract's order
    assert {row["ingested_at"] for row in written} == {NOW}
    assert read_json(file.parents[1] / "load.json")["num_stored"] == 5
    assert oct(file.stat().st_mode)[-3:] == "600"


def test_broken_rows_are_quarantined_with_the_reason(
    tmp_path: Path, storage: Storage, settings: Settings
) -> None:
    file = write_rows(tmp_path / "a.csv", [*ANCHORS, *(row for row, _ in BROKEN)])
    load(file, storage, _loose(settings))
    assert [row["reason"] for row in quarantine(storage)] == [reason for _, reason in BROKEN]
    assert [row["row_number"] for row in quarantine(storage)] == list(range(3, 13))
    assert {row["quarantined_at"] for row in quarantine(storage)} == {NOW}


@hypothesis_settings(max_examples=12)
@given(rows=st.lists(ANY_ROW, max_size=25), seed=st.integers(0, 99), cut=st.integers(0, 25))
def test_shuffling_cutting_and_loading_twice_change_nothing(
    rows: list[Row], seed: int, cut: int
) -> None:
    settings = Settings(threads=1, memory_limit="1GB", max_quarantined_share=1.0)
    rows = [*ANCHORS, *rows]
    shuffled = random.Random(seed).sample(rows, len(rows))  # noqa: S311 - no secret
    with home() as (folder, storage):
        first = load(write_rows(folder / "a.csv", rows), storage, settings)
        expected, reasons = events(storage), first.reasons
        bad = {row for row, _ in BROKEN}
        assert len(expected) == sum(row not in bad for row in rows)
        kind = ("csv", "jsonl", "parquet")[seed % 3]
        parts = [part for part in (shuffled[:cut], shuffled[cut:]) if part]
        for number, part in enumerate(parts):
            write_rows(folder / "in" / f"{number}.{kind}", part)
        again = load(folder / "in", storage, settings, at=LATER)
        assert events(storage) == expected  # ingested_at included
        assert again.reasons == reasons
        night = load(folder / "in", storage, settings, arrival="2024-01-09", at=LATER)
        assert (night.num_inserted, night.num_repeated) == (0, first.num_accepted)
        assert events(storage) == expected


def test_identical_rows_are_events_of_their_own_and_get_stable_ids(
    tmp_path: Path, storage: Storage, settings: Settings
) -> None:
    load(write_rows(tmp_path / "a.csv", [*ROWS, ROWS[0]]), storage, settings)
    ids = {row["event_id"] for row in events(storage)}
    assert len(ids) == len(ROWS) + 1
    # printf 'at:19:2024-01-01 10:00:00,price:3:1.5,sku:1:a,what:4:view,who:1:1' | md5sum
    assert "92d3afe05dd968446a2148b48eff550a" in ids


def test_a_reload_replaces_the_night_and_only_it(
    tmp_path: Path, storage: Storage, settings: Settings
) -> None:
    load(write_rows(tmp_path / "a.csv", ROWS), storage, settings)
    more = ("9", "buy", "2024-01-05", "z", "1")
    file = write_rows(tmp_path / "b.csv", [*ROWS[:2], more])
    night = load(file, storage, settings, arrival="2024-01-05", at=LATER)
    assert (night.num_inserted, night.num_repeated) == (1, 2)
    other = ("8", "buy", "2024-01-05", "z", "1")
    load(write_rows(tmp_path / "b.csv", [other]), storage, settings, arrival="2024-01-05", at=LATER)
    assert [row["user_id"] for row in events(storage, "2024-01-05")] == ["8"]
    assert {row["ingested_at"] for row in events(storage, "history")} == {NOW}


def test_a_history_that_would_lose_events_is_refused(
    tmp_path: Path, storage: Storage, settings: Settings
) -> None:
    load(write_rows(tmp_path / "a.csv", ROWS), storage, settings)
    before = events(storage)
    with pytest.raises(PipelineError, match=r"2 events that were loaded before are not in"):
        load(write_rows(tmp_path / "a.csv", ROWS[2:]), storage, settings, at=LATER)
    assert events(storage) == before


def test_one_row_of_each_given_id_is_kept_by_a_total_order(
    tmp_path: Path, storage: Storage, settings: Settings
) -> None:
    preset = shop(item_id="sku\n  event_id: sku")
    rows: list[Row] = [
        ("2", "view", "2024-01-01", "x", "1"),
        ("1", "view", "2024-01-01", "x", "1"),
        ("1", "buy", "2024-01-02", "y", "1"),
        ("1", "buy", "2024-01-02", None, "1"),
    ]
    summary = load(write_rows(tmp_path / "a.csv", rows), storage, settings, preset=preset)
    kept = [(row["event_id"], row["user_id"]) for row in events(storage)]
    assert kept == [("y", "1"), ("x", "2")]  # the greater of the two rows of x
    assert (summary.num_repeated, summary.reasons) == (1, {"event_id is null or empty": 1})


def test_a_night_takes_its_day_of_a_dump(
    tmp_path: Path, storage: Storage, settings: Settings
) -> None:
    bad: Row = ("", "view", "2024-01-02 05:00:00", "a", "1")
    file = write_rows(tmp_path / "a.csv", [*ROWS, bad, BROKEN[3][0]])
    for number, counts in {1: (3, 3), 2: (2, 1), 3: (1, 1), 4: (0, 0)}.items():
        key, day = f"2024-01-0{number}", date(2024, 1, number)
        summary = load(file, storage, settings, arrival=key, day=day)
        assert (summary.num_read, summary.num_inserted) == counts
    whole = Storage(tmp_path / "whole")
    load(file, whole, settings)
    assert events(storage) == events(whole)


def test_a_night_with_a_date_in_its_path_takes_the_file_whole(
    tmp_path: Path, storage: Storage, settings: Settings
) -> None:
    write_rows(tmp_path / "2024-01-02.csv", ROWS)
    path = f"{tmp_path}/{{date}}.csv"
    summary = load(path, storage, settings, arrival="2024-01-02", day=date(2024, 1, 2))
    assert summary.num_inserted == len(ROWS)


class _KilledError(BaseException):
    """Stands for a kill: nothing in the package catches it."""


@pytest.mark.parametrize("kill_at", range(1, 6))
def test_a_kill_at_any_rename_leaves_the_load_before_and_heals(
    kill_at: int,
    tmp_path: Path,
    storage: Storage,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bad = BROKEN[0][0]
    old = write_rows(tmp_path / "old.csv", [*ROWS[:3], bad])
    new = write_rows(tmp_path / "new.csv", [*ROWS, bad, bad])
    load(old, storage, settings)
    before = events(storage)
    calls = 0

    def failing(move: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
        def counted(self: Path, target: Path) -> Path:
            nonlocal calls
            calls += 1
            if calls >= kill_at:
                raise _KilledError
            return move(self, target)

        return counted

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing(Path.rename))
        patch.setattr(Path, "replace", failing(Path.replace))
        patch.setattr(shutil, "rmtree", lambda *_args, **_kwargs: None)  # a kill cleans nothing
        if kill_at < 5:  # schemas, the folders of quarantine and events, the pointer
            with pytest.raises(_KilledError):
                load(new, storage, settings, at=LATER)
            assert events(storage) == before
        else:
            load(new, storage, settings, at=LATER)
    remove_leftovers(storage.home)
    killed = [(old, 1)] if kill_at < 5 else []  # what has been loaded is not taken back
    for file, num_bad in [*killed, (new, 2)]:
        summary = load_arrival(shop(), str(file), storage, settings, "history", LATER)
        assert summary.num_quarantined == num_bad
    assert len(events(storage)) == len(ROWS)
    assert len(quarantine(storage)) == 2


REFUSED = {
    "bad times": (
        [("1", "view", "soon", "a", "1")] * 3,
        r"row 3 of .*, where column 'at' holds 'soon'",
    ),
    "no users": (
        [(None, "buy", "2024-01-01", "a", "1")] * 3,
        r"user_id is null or empty;.*'who' holds nothing",
    ),
    "one event type": ([], r"Every event of .* is a 'view' .* nothing to learn"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_load_that_teaches_nothing_is_refused(
    case: str, tmp_path: Path, storage: Storage, settings: Settings
) -> None:
    rows, message = REFUSED[case]
    file = write_rows(tmp_path / "a.csv", [*ROWS[:2], *rows])
    with pytest.raises(PipelineError, match=f"(?s){message}") as caught:
        load(file, storage, settings)
    assert str(file) in str(caught.value)
    assert not storage.events.exists()


def test_the_share_that_may_be_quarantined_is_a_setting(
    tmp_path: Path, storage: Storage, settings: Settings
) -> None:
    file = write_rows(tmp_path / "a.csv", [*ANCHORS, BROKEN[0][0]])
    assert load(file, storage, settings).num_quarantined == 1
    strict = settings.model_copy(update={"max_quarantined_share": 0.2})
    with pytest.raises(PipelineError, match="more than 20%"):
        load(file, storage, strict)


def test_span_of_all_arrivals(tmp_path: Path, storage: Storage, settings: Settings) -> None:
    with pytest.raises(PipelineError, match="No events"):
        events_span(storage)
    load(write_rows(tmp_path / "a.csv", ROWS[:3]), storage, settings)
    load(write_rows(tmp_path / "a.csv", ROWS[3:]), storage, settings, arrival="2024-01-03")
    span = events_span(storage)
    assert span.num_events == 5
    assert span.first_event_at == datetime(2024, 1, 1, 10, tzinfo=UTC)
    assert span.last_event_at == datetime(2024, 1, 3, 23, 59, 59, 500_000, tzinfo=UTC)


def test_the_same_rows_give_the_same_bytes(
    tmp_path: Path, storage: Storage, settings: Settings
) -> None:
    file = write_rows(tmp_path / "a.csv", ROWS)
    other = Storage(tmp_path / "other")
    load(file, storage, settings)
    load(write_rows(tmp_path / "b.csv", ROWS[::-1]), other, settings)
    (one,), (two,) = (find_arrival(home, "history").event_files() for home in (storage, other))  # type: ignore[union-attr]
    assert one.read_bytes() == two.read_bytes()


def test_an_empty_file_is_a_day_without_events(
    tmp_path: Path, storage: Storage, settings: Settings
) -> None:
    load(write_rows(tmp_path / "a.csv", ROWS), storage, settings)
    (tmp_path / "2024-01-05.csv").write_text("")
    write_rows(tmp_path / "2024-01-06.parquet", [])
    for day in (5, 6):
        path = str(tmp_path / "{date}.*")
        summary = load(path, storage, settings, arrival=f"2024-01-0{day}", day=date(2024, 1, day))
        assert (summary.num_read, summary.num_stored, summary.num_users_touched) == (0, 0, 0)
    assert len(events(storage)) == len(ROWS)
    assert events_span(storage).known_through == datetime(2024, 1, 7, tzinfo=UTC)


def test_a_night_that_turns_out_empty_takes_back_what_it_brought(
    tmp_path: Path, storage: Storage, settings: Settings
) -> None:
    load(write_rows(tmp_path / "a.csv", ROWS), storage, settings)
    more: Row = ("9", "buy", "2024-01-05", "z", "1")
    file = write_rows(tmp_path / "2024-01-05.csv", [more])
    day, path = date(2024, 1, 5), str(tmp_path / "{date}.csv")
    load(path, storage, settings, arrival="2024-01-05", day=day)
    file.write_text("")
    summary = load(path, storage, settings, arrival="2024-01-05", day=day)
    assert summary.num_users_touched == 1
    assert {row["user_id"] for row in events(storage)} == {"1", "2", "3"}


def test_whether_a_missing_file_is_a_day_without_events_is_a_setting(
    tmp_path: Path, storage: Storage, settings: Settings
) -> None:
    day, path = date(2024, 1, 5), str(tmp_path / "{date}.csv")
    with pytest.raises(PipelineError, match="There is no file"):
        load(path, storage, settings, arrival="2024-01-05", day=day)
    lenient = settings.model_copy(update={"on_missing_arrival": "accept"})
    assert load(path, storage, lenient, arrival="2024-01-05", day=day).num_read == 0
    with pytest.raises(PipelineError, match="There is no file"):
        load(tmp_path / "a.csv", storage, lenient)
