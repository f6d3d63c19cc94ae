"""Our sessions beside somebody else's: small cases by hand, any case beside scikit-learn."""

from __future__ import annotations

import tempfile
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from session_builders import PRESET, View, compare, portal, views, write_views
from sklearn.metrics import adjusted_rand_score
from warehouse_builders import event, make_preset, make_windows, shop_events, write_events

from behavior_pipeline.errors import PipelineError
from behavior_pipeline.ingest.presets import load_preset, parse_preset
from behavior_pipeline.layers import read_layers
from behavior_pipeline.settings import Settings, load_settings
from behavior_pipeline.storage import Storage
from behavior_pipeline.studies.session_agreement import compare_sessions, parse_gaps
from behavior_pipeline.studies.session_figures import SessionStudy
from behavior_pipeline.warehouse.build import build_warehouse

V = views("v", [0, 5], ["c", "c"])  # one session on both sides in every case by hand


def compare_by_id(file: Path, settings: Settings) -> SessionStudy:
    """Compare with the source's own event ids, which decide the order of what is tied."""
    storage = Storage(file.parent / "portal")
    return compare_sessions(portal(has_ids=True), str(file), "visit", (30,), storage, settings)


def test_equal_partitions(tmp_path: Path, settings: Settings):
    study = compare([*views("u", [0, 10, 50, 60], ["a", "a", "b", "b"]), *V], tmp_path, settings)
    (found,) = study.agreements
    assert found.adjusted_rand_index == 1
    assert (found.num_events, found.num_ours, found.num_theirs, found.num_exact) == (6, 3, 3, 3)
    assert (found.num_split_events, found.num_merged_events) == (0, 0)
    assert (found.num_cut_gaps, found.num_missed_boundaries) == (0, 0)
    assert (study.num_users, study.theirs.num_boundaries, study.theirs.num_gaps_inside) == (2, 1, 3)
    assert study.theirs.minutes_between == (40,) * 6


def test_a_session_of_theirs_that_we_split(tmp_path: Path, settings: Settings):
    study = compare([*views("u", [0, 10, 50, 60], "aaaa"), *V], tmp_path, settings)
    (found,) = study.agreements
    # of 15 pairs we join 3, they join 7 and both join 3: 2 (3 * 15 - 3 * 7) / (10 * 15 - 2 * 21)
    assert (found.num_pairs, found.num_our_pairs, found.num_their_pairs) == (3, 3, 7)
    assert found.adjusted_rand_index == 48 / 108
    assert (found.num_ours, found.num_theirs, found.num_exact) == (3, 2, 1)
    assert (found.share_of_ours, found.share_of_theirs) == (1 / 3, 1 / 2)
    assert (found.share_split, found.share_merged) == (4 / 6, 0)
    assert (found.num_cut_gaps, found.num_missed_boundaries) == (1, 0)


def test_sessions_of_theirs_that_we_merge(tmp_path: Path, settings: Settings):
    study = compare([*views("u", [0, 10, 50, 60], "aabb"), *V], tmp_path, settings, (60,))
    (found,) = study.agreements
    assert (found.num_pairs, found.num_our_pairs, found.num_their_pairs) == (3, 7, 3)
    assert found.adjusted_rand_index == 48 / 108
    assert (found.num_ours, found.num_theirs, found.num_exact) == (2, 3, 1)
    assert (found.share_split, found.share_merged) == (0, 4 / 6)
    assert (found.num_cut_gaps, found.num_missed_boundaries) == (0, 1)


def test_a_gap_of_exactly_the_limit_stays_inside(tmp_path: Path, settings: Settings):
    moment = 1 / 60_000_000  # a microsecond
    study = compare(views("u", [0, 30, 60 + 2 * moment], "aab"), tmp_path, settings)
    assert study.agreements[0].adjusted_rand_index == 1
    assert study.agreements[0].num_ours == 2


@pytest.mark.parametrize(("keys", "num_missed"), [("0123", 2), ("0132", 1), ("0312", 1)])
def test_events_at_one_time_are_in_one_session(
    tmp_path: Path, settings: Settings, keys: str, num_missed: int
):
    rows = views("u", [0, 40, 40, 40], ["a", "b", "c", "b"])
    file = write_views(tmp_path / "views.parquet", rows, list(keys))
    found = compare_by_id(file, settings).agreements[0]
    assert (found.num_ours, found.num_theirs, found.num_exact) == (2, 3, 1)
    assert (found.num_merged_events, found.num_cut_gaps) == (3, 0)
    assert found.num_missed_boundaries == num_missed


def test_a_lonely_event_agrees(tmp_path: Path, settings: Settings):
    study = compare(views("u", [0], "a"), tmp_path, settings)
    assert study.agreements[0].adjusted_rand_index == 1
    assert (study.theirs.minutes_inside, study.theirs.minutes_between) == ((), ())


def test_their_sessions_may_overlap_and_span_users(tmp_path: Path, settings: Settings):
    rows = [*views("u", [0, 10, 5, 15], "aabb"), *views("v", [20], "b"), *views("w", [0, 5], "cd")]
    theirs = compare(rows, tmp_path, settings).theirs
    assert (theirs.num_several_users, theirs.num_overlapping) == (1, 1)
    assert (theirs.num_boundaries, theirs.num_gaps_inside) == (4, 0)


def test_rows_left_out_are_counted(tmp_path: Path, settings: Settings):
    late = 60 * 24 * 365
    rows = [
        *views("u", [0, None, late, 20, 40], ["a", "a", "a", None, "a"]),
        *views("", [0], "a"),
        *views("v", [0], [""]),
    ]
    study = compare(rows, tmp_path, settings)
    assert study.num_read == 7
    assert study.reasons == {
        "occurred_at is at or after 2024-06-01T00:00:00+00:00": 1,
        "occurred_at is null": 1,
        "user_id is null or empty": 1,
    }
    assert (study.num_without_session, study.num_events, study.num_users) == (2, 2, 1)
    # the event that their side does not place holds our session together
    assert study.agreements[0].num_ours == 1


def test_a_repeated_given_id_counts_once(tmp_path: Path, settings: Settings):
    rows = views("u", [0, 10, 10, 50], "aaab")
    file = write_views(tmp_path / "views.parquet", rows, keys=["1", "2", "2", "3"])
    study = compare_by_id(file, settings)
    assert (study.num_read, study.num_repeated, study.num_events) == (4, 1, 3)
    assert study.agreements[0].adjusted_rand_index == 1


def test_the_best_of_several_gaps(tmp_path: Path, settings: Settings):
    rows = views("u", [0, 20, 40, 100, 120, 300], "aaaaab")
    study = compare(rows, tmp_path, settings, (10, 30, 60, 90, 240))
    assert [found.num_ours for found in study.agreements] == [6, 3, 2, 2, 1]
    assert study.best.gap_minutes == 60
    assert study.preset_gap_seconds == 1800


@hypothesis_settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.sampled_from("uvw"), st.integers(0, 200), st.sampled_from("abcde")),
        min_size=1,
        max_size=40,
    ),
    st.integers(1, 60),
)
def test_any_partitions_agree_with_sklearn(rows: list[tuple[str, int, str]], gap: int):
    rows.sort()
    ours, number = [0], 0
    for before, after in pairwise(rows):
        number += before[0] != after[0] or after[1] - before[1] > gap
        ours.append(number)
    theirs = [row[2] for row in rows]
    groups = [{i for i, each in enumerate(side) if each == key} for side in (ours, theirs)
              for key in set(side)]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        settings = load_settings(memory_limit="1GB", threads=1)
        logged = [View(*row) for row in rows]
        found = compare(logged, Path(folder), settings, (gap,)).agreements[0]
    assert found.adjusted_rand_index == pytest.approx(adjusted_rand_score(theirs, ours), abs=1e-12)
    assert (found.num_ours, found.num_theirs) == (len(set(ours)), len(set(theirs)))
    assert found.num_exact == len(groups) - len({frozenset(group) for group in groups})


@pytest.mark.slow
def test_our_sessions_are_those_of_the_warehouse(tmp_path: Path, settings: Settings):
    storage = Storage(tmp_path / "shop")
    tied = [event("t1", "tied", "view", "2024-01-01 00:00"),
            event("t0", "tied", "view", "2024-01-01 00:30"),
            event("t2", "tied", "view", "2024-01-01 00:30"),
            event("t3", "tied", "view", "2024-01-01 01:00:00.000001")]  # fmt: skip
    write_events([*shop_events(), *tied], storage)
    build_warehouse(storage, settings, make_preset(), make_windows())
    files = read_layers(storage.events_sessionized).base_files()
    built = pa.concat_tables(pq.read_table(file, partitioning=None) for file in files)
    sessions = [f"{row['user_id']} {row['session_started_at']}" for row in built.to_pylist()]
    file = tmp_path / "sessionized.parquet"
    pq.write_table(built.append_column("visit", pa.array(sessions)), file)
    names = {"who": "user_id", "what": "event_type", "column: at": "column: occurred_at"}
    text = PRESET.replace("{user_id", "{event_id: event_id, user_id")
    for old, new in names.items():
        text = text.replace(old, new)
    preset = parse_preset(text, "test")
    study = compare_sessions(preset, str(file), "visit", (30, 31), storage, settings)
    assert study.num_events == built.num_rows
    same, other = study.agreements
    assert same.num_exact == same.num_ours == same.num_theirs == len(set(sessions))
    assert other.num_exact < other.num_theirs


def test_gaps_are_sorted_and_taken_once():
    assert parse_gaps("60, 10,30,10") == (10, 30, 60)


@pytest.mark.parametrize("text", ["", "10,,20", "0", "-5", "7.5", "ten", "²", "10;20", "9" * 5000])
def test_gaps_that_are_none_are_refused(text: str):
    with pytest.raises(PipelineError, match="no session gap in minutes") as caught:
        parse_gaps(text)
    assert "--gaps 20,30,60" in caught.value.way_out


def test_a_missing_session_column_is_named(tmp_path: Path, settings: Settings):
    file = write_views(tmp_path / "views.parquet", V)
    with pytest.raises(PipelineError, match="has no column 'visits'") as caught:
        compare_sessions(portal(), str(file), "visits", (30,), Storage(tmp_path / "x"), settings)
    assert "Did you mean 'visit'?" in caught.value.way_out


def test_no_event_with_a_session(tmp_path: Path, settings: Settings):
    with pytest.raises(PipelineError, match=r"No event of .* has a value in 'visit'"):
        compare(views("u", [0, 1], [None, ""]), tmp_path, settings)


def test_nothing_is_left_behind_and_progress_is_told(tmp_path: Path, settings: Settings):
    file = write_views(tmp_path / "views.parquet", V)
    storage, told = Storage(tmp_path / "portal"), []
    compare_sessions(
        portal(), str(file), "visit", (30, 60), storage, settings, lambda *step: told.append(step)
    )
    assert [step[:2] for step in told] == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert [path for path in storage.home.rglob("*") if path != storage.scratch] == []


@pytest.mark.realdata
@pytest.mark.slow
def test_the_gap_of_the_news_portal_agrees_best(
    realdata: Path, storage: Storage, settings: Settings
):
    preset = load_preset("globo_news")
    two = settings.model_copy(update={"threads": 2})
    file = str(realdata / "globo_news.parquet")
    gaps = (15, 30, 50, 60, 75, 120)
    study = compare_sessions(preset, file, "session_id", gaps, storage, two)
    assert timedelta(minutes=study.best.gap_minutes).total_seconds() == preset.session_gap_seconds
    assert (study.num_events, sum(study.reasons.values())) == (2_987_469, 712)
    assert study.agreements[1].num_exact == 995_488
    assert study.agreements[1].num_theirs == 1_048_568
    assert study.best.adjusted_rand_index == pytest.approx(0.94125, abs=5e-6)
