"""A night links an earlier folder and tokenizes the users that are not in it as they are."""

from __future__ import annotations

import shutil
from datetime import datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sequence_builders import (
    CUTOFF,
    START,
    EventRow,
    add_layer,
    event,
    events_frame,
    write_events_sessionized,
)

from behavior_pipeline.contracts import SEQUENCES
from behavior_pipeline.layers import read_layers
from behavior_pipeline.sequences import files
from behavior_pipeline.sequences.files import (
    MAX_TOUCHED_FILES,
    SequencesSummary,
    sequence_files,
    write_sequences,
)
from behavior_pipeline.sequences.reading import (
    MANIFEST,
    TOUCHED_FOLDER,
    count_users,
    latest_event_at,
    read_bucket,
    touched_files,
)
from behavior_pipeline.sequences.tokenization import tokenize
from behavior_pipeline.sequences.vocabulary import Vocabulary, build_vocabulary
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage, read_json

DAY = timedelta(days=1)
USERS = [f"u{number:02d}" for number in range(20)]
ROWS = [
    event(user, 10 * hour + number, f"{user} {hour}", item_id=f"i{(hour + number) % 3}")
    for number, user in enumerate(USERS)
    for hour in range(4)
]


class Home:
    """A home whose sequences of one night are written."""

    def __init__(self, storage: Storage, settings: Settings) -> None:
        self.storage, self.settings, self.rows = storage, settings, list(ROWS)
        write_events_sessionized(storage, events_frame(ROWS))
        self.vocabulary = build_vocabulary(storage, settings, ("adjust",), START + DAY)
        self.write(CUTOFF)

    def folder(self, cutoff: datetime) -> Path:
        return self.storage.sequences(cutoff)

    def touch(self, *users: str, without: str = "", more: tuple[EventRow, ...] = ()) -> None:
        """Rebuild some users: with more events, and without those of one of them."""
        self.rows = [row for row in self.rows if row["user_id"] != without] + list(more)
        add_layer(self.storage, events_frame(self.rows), users)

    def write(self, cutoff: datetime, vocabulary: Vocabulary | None = None) -> SequencesSummary:
        """Write a night upon all the others, as the nightly job does."""
        folder = self.folder(cutoff)
        earlier = sorted(folder.parent.glob("cutoff=*"))
        return write_sequences(
            self.storage,
            self.settings,
            vocabulary or self.vocabulary,
            cutoff,
            folder,
            earlier=earlier,
        )

    def assert_fresh(self, cutoff: datetime) -> pa.Table:
        """Check that a folder reads as one that was written for everybody; return its rows."""
        found = read(self.folder(cutoff))
        expected = tokenize(events_frame(self.rows), self.vocabulary, cutoff, 512)
        assert found.sort_by("user_id").equals(expected)
        fresh = self.storage.home / "fresh"
        write_sequences(self.storage, self.settings, self.vocabulary, cutoff, fresh)
        assert found.equals(read(fresh))
        assert count_users(self.folder(cutoff)) == len(found) == count_users(fresh)
        assert latest_event_at(self.folder(cutoff)) == latest_event_at(fresh)
        return found


@pytest.fixture
def home(storage: Storage, settings: Settings) -> Home:
    return Home(storage, settings)


def read(folder: Path) -> pa.Table:
    """All rows in the order of files, each file's users in order."""
    tables = []
    for file in sequence_files(folder):
        chunks = [chunk.cast(SEQUENCES.schema) for chunk in read_bucket(file, chunk_users=3)]
        users = [user for chunk in chunks for user in chunk["user_id"].to_pylist()]
        assert users == sorted(set(users))
        tables += chunks
    return pa.concat_tables(tables)


def bucket_of_user(home: Home, user: str) -> Path:
    """The bucket file that holds a user."""
    (file,) = [
        file
        for file in sequence_files(home.folder(CUTOFF))
        if user in pq.read_table(file)["user_id"].to_pylist()
    ]
    return file


def test_a_quiet_night_is_links_and_another_cutoff(home: Home) -> None:
    summary = home.write(CUTOFF + DAY)
    assert (summary.num_users, summary.num_tokenized_users, summary.num_events) == (20, 0, 0)
    pairs = zip(
        *(sequence_files(home.folder(night)) for night in (CUTOFF, CUTOFF + DAY)), strict=True
    )
    assert all(one.samefile(other) for one, other in pairs)
    found = home.assert_fresh(CUTOFF + DAY)
    assert set(found["observation_cutoff"].to_pylist()) == {CUTOFF + DAY}
    assert set(read(home.folder(CUTOFF))["observation_cutoff"].to_pylist()) == {CUTOFF}


def test_users_touched_and_users_with_an_event_between_are_tokenized(home: Home) -> None:
    between = event("u05", 485, "between")
    home.rows.append(between)  # known before the first night, and after its cutoff
    write_events_sessionized(home.storage, events_frame(home.rows))
    home.write(CUTOFF)
    late = (event("u03", 7.5, "late"), event("someone new", 3, "new"))
    home.touch("u03", "someone new", more=late)
    summary = home.write(CUTOFF + DAY)
    assert (summary.num_users, summary.num_tokenized_users) == (21, 3)
    assert summary.num_events == 5 + 5 + 1
    touched = [
        user
        for file in sequence_files(home.folder(CUTOFF + DAY))
        for each in touched_files(file)
        for user in pq.read_table(each)["user_id"].to_pylist()
    ]
    assert sorted(touched) == ["someone new", "u03", "u05"]
    home.assert_fresh(CUTOFF + DAY)


def test_a_user_without_events_is_gone_and_may_come_back(home: Home) -> None:
    gone = [row for row in ROWS if row["user_id"] == "u02"]
    home.touch("u02", without="u02")
    assert home.write(CUTOFF + DAY).num_users == 19
    assert "u02" not in home.assert_fresh(CUTOFF + DAY)["user_id"].to_pylist()
    home.touch("u02", without="u02")  # nobody counts a user as gone twice
    assert home.write(CUTOFF + 2 * DAY).num_users == 19
    home.assert_fresh(CUTOFF + 2 * DAY)
    home.touch("u02", more=tuple(gone))
    assert home.write(CUTOFF + 3 * DAY).num_users == 20
    home.assert_fresh(CUTOFF + 3 * DAY)


def test_an_earlier_night_forgets_what_it_could_not_know(home: Home) -> None:
    """Its files link those of a later one, in which the same users have more."""
    late = event("u04", 485, "z"), event("after", 490, "z")
    home.rows.extend(late)
    write_events_sessionized(home.storage, events_frame(home.rows))
    home.write(CUTOFF + 2 * DAY)
    summary = home.write(CUTOFF)
    assert (summary.num_users, summary.num_tokenized_users) == (20, 1)
    found = home.assert_fresh(CUTOFF)
    latest = max(row["occurred_at"] for row in ROWS)
    assert latest_event_at(home.folder(CUTOFF)) == latest
    assert "after" not in found["user_id"].to_pylist()


def test_the_same_night_again_after_a_late_event(home: Home) -> None:
    home.touch("u09", more=(event("u09", 1.5, "late"),))
    assert home.write(CUTOFF).num_tokenized_users == 1
    home.assert_fresh(CUTOFF)
    assert home.write(CUTOFF).num_tokenized_users == 0
    home.assert_fresh(CUTOFF)


def test_touched_users_join_the_base_before_they_are_many(home: Home) -> None:
    file = bucket_of_user(home, "u01").name
    base = (home.folder(CUTOFF) / file).read_bytes()
    for night in range(1, MAX_TOUCHED_FILES + 2):
        more = event("u01", 480 + 24 * night - 1, f"night {night}")
        home.touch("u01", more=(more,))
        assert home.write(CUTOFF + night * DAY).num_tokenized_users == 1
        folder = home.folder(CUTOFF + night * DAY)
        expected = night if night < MAX_TOUCHED_FILES else night - MAX_TOUCHED_FILES
        assert len(touched_files(folder / file)) == expected
        home.assert_fresh(CUTOFF + night * DAY)
    assert (home.folder(CUTOFF) / file).read_bytes() == base  # files are never changed


@pytest.mark.parametrize("case", ["vocabulary", "length", "base", "share"])
def test_everybody_is_tokenized_where_nothing_usable_is_there(home: Home, case: str) -> None:
    vocabulary = home.vocabulary
    if case == "vocabulary":
        home.vocabulary = build_vocabulary(home.storage, home.settings, (), CUTOFF)
        assert home.vocabulary.vocabulary_id != vocabulary.vocabulary_id
    if case == "length":
        home.settings = home.settings.model_copy(update={"max_sequence_events": 3})
    if case == "base":
        write_events_sessionized(home.storage, events_frame(ROWS))
    if case == "share":
        home.touch(*USERS[:7])
    summary = home.write(CUTOFF + DAY)
    assert summary.num_tokenized_users == summary.num_users == 20
    assert not (home.folder(CUTOFF + DAY) / TOUCHED_FOLDER).exists()


@pytest.mark.parametrize("is_touched", [True, False])
def test_sequences_of_events_that_were_lost_are_not_built_upon(
    home: Home, *, is_touched: bool
) -> None:
    """The versions of events that begin anew have numbers that sequences know already."""
    if is_touched:
        home.touch("u01", more=(event("u01", 1.5, "late"),))
        home.write(CUTOFF)
    shutil.rmtree(home.storage.events_sessionized)
    home.rows = [row for row in ROWS if row["user_id"] != "u03"]
    write_events_sessionized(home.storage, events_frame(home.rows))
    assert read_layers(home.storage.events_sessionized).version == 1
    assert home.write(CUTOFF + DAY).num_tokenized_users == 19
    home.assert_fresh(CUTOFF + DAY)


def test_the_nearest_folder_is_built_upon(home: Home) -> None:
    more = [event(user, 480 + 24 * night - 1, "x") for night, user in ((1, "u01"), (2, "u02"))]
    home.rows.extend(more)
    write_events_sessionized(home.storage, events_frame(home.rows))
    home.write(CUTOFF)
    home.write(CUTOFF + 2 * DAY)
    assert home.write(CUTOFF + 3 * DAY).num_tokenized_users == 0
    manifest = read_json(home.folder(CUTOFF + 3 * DAY) / MANIFEST)
    assert manifest["cutoff"] == (CUTOFF + 3 * DAY).isoformat()
    home.assert_fresh(CUTOFF + 3 * DAY)


def test_an_interrupted_night_leaves_what_was_there(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read(home.folder(CUTOFF))
    home.touch("u01", "u02", "u03", more=(event("u01", 1.5, "late"),))
    monkeypatch.setattr(files, "_compact", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        home.write(CUTOFF)
    assert read(home.folder(CUTOFF)).equals(before)
    assert [path.name for path in home.folder(CUTOFF).parent.iterdir()] == ["cutoff=2024-01-21"]
