"""Each kind of drift, from the files of two loads to its outcome."""

from __future__ import annotations

from datetime import UTC, date, datetime
from itertools import permutations
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ingest_builders import COLUMNS, ROWS, home, load, quarantine, shop, write_rows

from behavior_pipeline.errors import PipelineError
from behavior_pipeline.ingest.drift import Drift, DriftItem, Severity, compare, drift_of
from behavior_pipeline.ingest.presets import Preset
from behavior_pipeline.ingest.schemas import (
    MAX_EVENT_TYPES,
    KnownSchemas,
    SourceSchema,
    read_schemas,
    write_schemas,
)
from behavior_pipeline.ingest.unseen import UnseenType, find_unseen_types
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage

NIGHT = "2024-01-05"
HISTORY = "history"
AT = datetime(2024, 1, 5, 12, tzinfo=UTC)
REPORTED, WARNED, BLOCKING = Severity

COUNTS = st.dictionaries(st.sampled_from(["view", "buy", "refund"]), st.integers(1, 50))
TYPES = st.sampled_from([None, "INTEGER", "BIGINT", "DOUBLE", "VARCHAR", "TIMESTAMP"])
SCHEMAS = st.builds(
    SourceSchema,
    kind=st.sampled_from(["parquet", "csv", "jsonl"]),
    columns=st.dictionaries(st.sampled_from([*COLUMNS, "coupon", "size"]), TYPES),
    event_types=st.none() | COUNTS,
)
ARRIVALS = st.dictionaries(
    st.sampled_from([HISTORY, "2024-01-05", "2024-01-06", "2023-12-31"]), SCHEMAS, min_size=1
)


def typed(**changes: pa.Array | None) -> pa.Table:
    """Three rows with types of their own; a column that is changed to None is left out."""
    columns: dict[str, pa.Array | None] = {
        "who": pa.array([1, 2, 3], pa.int64()),
        "what": pa.array(["view", "buy", "view"]),
        "at": pa.array([AT] * 3, pa.timestamp("us", "UTC")),
        "sku": pa.array(["a", "b", "c"]),
        "price": pa.array([1.0, 2.5, None], pa.float64()),
        "shelf": pa.array([1, 2, 3], pa.int32()),
        "since": pa.array([date(2024, 1, 1)] * 3, pa.date32()),
        **changes,
    }
    return pa.table({name: values for name, values in columns.items() if values is not None})


def load_table(
    table: pa.Table, storage: Storage, settings: Settings, arrival: str, preset: Preset
) -> Drift:
    """Load a table as the Parquet file of an arrival; return the drift that was found."""
    file = storage.home.parent / f"{arrival}.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file)
    summary = load(file, storage, settings, arrival=arrival, preset=preset)
    drift = drift_of(read_schemas(storage), arrival, preset)
    assert summary.drift == drift.lines
    return drift


def found(drift: Drift) -> list[tuple[str, str, str, Severity]]:
    """What a test is about."""
    return [(item.change, item.name, item.details, item.severity) for item in drift.items]


TEXT_IDS = {"who": pa.array(["1", "2", "3"])}
CASES: dict[str, tuple[dict[str, pa.Array | None], list[tuple[str, str, str, Severity]]]] = {
    "nothing": ({}, []),
    "a new column": (
        {"coupon": pa.array(["x", None, None])},
        [("new column", "coupon", "VARCHAR", REPORTED)],
    ),
    "a vanished column": (
        {"shelf": None},
        [("vanished column", "shelf", "INTEGER before", REPORTED)],
    ),
    "a wider integer": (
        {"shelf": pa.array([1, 2, 3], pa.int64())},
        [("changed type", "shelf", "INTEGER → BIGINT", REPORTED)],
    ),
    "a day with a time": (
        {"since": pa.array([datetime(2024, 1, 1)] * 3, pa.timestamp("us"))},  # noqa: DTZ001
        [("changed type", "since", "DATE → TIMESTAMP", REPORTED)],
    ),
    "ids as texts of the same values": (
        TEXT_IDS,
        [("changed type", "who", "BIGINT → VARCHAR of integers", REPORTED)],
    ),
    "ids as other texts": (
        {"who": pa.array(["1", "2", "0003"])},
        [("changed type", "who", "BIGINT → VARCHAR", WARNED)],
    ),
    "a mapped integer instead of a float": (
        {"price": pa.array([1, 2, None], pa.int64())},
        [("changed type", "price", "DOUBLE → BIGINT", WARNED)],
    ),
    "a mapped number as text": (
        {"price": pa.array(["1.0", "2.5", None])},
        [("changed type", "price", "DOUBLE → VARCHAR", REPORTED)],
    ),
    "a mapped column without a value": ({"price": pa.nulls(3)}, []),
    "an unmapped number as flag": (
        {"shelf": pa.array([True, False, True])},
        [("changed type", "shelf", "INTEGER → BOOLEAN", REPORTED)],
    ),
    "a new event type": (
        {"what": pa.array(["view", "refund", "buy"])},
        [("new event type", "refund", "1 of 3 events (33.3%)", REPORTED)],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_found_in_a_night(case: str, storage: Storage, settings: Settings) -> None:
    changes, expected = CASES[case]
    first = load_table(typed(), storage, settings, HISTORY, shop())
    assert first == Drift()
    drift = load_table(typed(**changes), storage, settings, NIGHT, shop())
    assert found(drift) == expected


def test_rows_that_no_longer_map_are_quarantined_and_the_type_is_warned_of(
    storage: Storage, settings: Settings
) -> None:
    load_table(typed(price=pa.array([1, 2, 3], pa.int64())), storage, settings, HISTORY, shop())
    flags = pa.array(["1.5", "many", "2"])
    drift = load_table(typed(price=flags), storage, settings, NIGHT, shop())
    assert found(drift) == [("changed type", "price", "BIGINT → VARCHAR", REPORTED)]
    assert [row["reason"] for row in quarantine(storage, NIGHT)] == ["amount is not a number"]


def test_a_refused_load_names_the_types_that_changed(storage: Storage, settings: Settings) -> None:
    load_table(typed(), storage, settings, HISTORY, shop())
    before = storage.source_schema.read_bytes()
    seconds = typed(at=pa.array([1_704_456_000] * 3, pa.int64()))
    words = r"(?s)3 of 3 rows.*Not as in the load before: changed type 'at', .*ZONE → BIGINT"
    with pytest.raises(PipelineError, match=words) as caught:
        load_table(seconds, storage, settings, NIGHT, shop())
    assert caught.value.way_out
    assert storage.source_schema.read_bytes() == before


def test_a_history_whose_ids_change_with_a_type_is_explained(
    storage: Storage, settings: Settings
) -> None:
    load_table(typed(), storage, settings, HISTORY, shop())
    wider = typed(since=pa.array([datetime(2024, 1, 1)] * 3, pa.timestamp("us")))  # noqa: DTZ001
    with pytest.raises(PipelineError, match=r"(?s)would lose them.*'since', DATE → TIMESTAMP"):
        load_table(wider, storage, settings, HISTORY, shop())


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_a_mapped_column_that_vanished_is_refused_and_was_there_before(
    kind: str, tmp_path: Path, storage: Storage, settings: Settings
) -> None:
    load(write_rows(tmp_path / f"a.{kind}", ROWS), storage, settings)
    renamed = [name if name != "price" else "cost" for name in COLUMNS]
    file = write_rows(tmp_path / f"b.{kind}", ROWS, renamed)
    words = (
        r"(?s)no column 'price' any more.*takes amount: .*'history' still had it.*New in it: cost"
    )
    with pytest.raises(PipelineError, match=words):
        load(file, storage, settings, arrival=NIGHT)
    assert not (storage.events / f"arrival={NIGHT}").exists()
    assert set(read_schemas(storage).arrivals) == {HISTORY}


def test_a_mapped_column_that_was_never_there_is_no_drift(
    tmp_path: Path, storage: Storage, settings: Settings
) -> None:
    file = write_rows(tmp_path / "a.csv", ROWS, ["who", "what", "at", "sku", "cost"])
    with pytest.raises(PipelineError, match=r"no column 'price', from which"):
        load(file, storage, settings)


def test_another_format_changes_no_type(
    tmp_path: Path, storage: Storage, settings: Settings
) -> None:
    load_table(typed(), storage, settings, HISTORY, shop())
    names = [*COLUMNS, "shelf", "since"]
    rows = [("1", "view", "2024-01-05", "a", "1.0", "1", "2024-01-01")]
    load(write_rows(tmp_path / "a.csv", rows, names), storage, settings, arrival="2024-01-05")
    known = read_schemas(storage)
    assert found(drift_of(known, "2024-01-05", shop())) == [
        ("other kind of files", "csv", "parquet before", REPORTED)
    ]
    back = load_table(typed(shelf=None), storage, settings, "2024-01-06", shop())
    assert found(back) == [  # types are those before the CSV file
        ("other kind of files", "parquet", "csv before", REPORTED),
        ("vanished column", "shelf", "INTEGER before", REPORTED),
    ]


def test_csv_shows_columns_and_event_types(
    tmp_path: Path, storage: Storage, settings: Settings
) -> None:
    load(write_rows(tmp_path / "a.csv", ROWS, COLUMNS), storage, settings)
    rows = [("9", "refund", "2024-01-05", "a", "x1", "now")]
    file = write_rows(tmp_path / "b.csv", [*rows, ROWS[0] + (None,)], [*COLUMNS, "coupon"])
    load(file, storage, settings, arrival=NIGHT)
    drift = drift_of(read_schemas(storage), NIGHT, shop())
    assert found(drift) == [("new column", "coupon", "no type shown", REPORTED)]  # x1: quarantined
    outcome = "the preset does not read it; a row that comes again gets a new event id"
    assert drift.items[0].outcome.startswith(outcome)


def test_a_column_is_reported_once_when_it_goes_and_not_when_it_returns(
    storage: Storage, settings: Settings
) -> None:
    load_table(typed(), storage, settings, HISTORY, shop())
    without = typed(shelf=None)
    nights = ["2024-01-05", "2024-01-06", "2024-01-07", "2024-01-08"]
    tables = [without, without, typed(), typed(shelf=pa.array([1.5, 2, 3]))]
    drifts = [
        found(load_table(table, storage, settings, night, shop()))
        for night, table in zip(nights, tables, strict=True)
    ]
    assert drifts == [
        [("vanished column", "shelf", "INTEGER before", REPORTED)],
        [],
        [],
        [("changed type", "shelf", "INTEGER → DOUBLE", REPORTED)],
    ]


def test_an_old_arrival_loaded_again_is_compared_with_what_came_before_it(
    storage: Storage, settings: Settings
) -> None:
    load_table(typed(), storage, settings, HISTORY, shop())
    wide = typed(coupon=pa.array(["x", "y", "z"]))
    load_table(wide, storage, settings, "2024-01-06", shop())
    assert load_table(typed(), storage, settings, "2024-01-05", shop()) == Drift()
    again = load_table(wide, storage, settings, "2024-01-06", shop())
    assert found(again) == [("new column", "coupon", "VARCHAR", REPORTED)]


def test_a_history_is_compared_with_itself_and_loading_it_again_says_the_same(
    storage: Storage, settings: Settings
) -> None:
    preset = shop(item_id="sku\n  event_id: sku")
    assert load_table(typed(), storage, settings, HISTORY, preset) == Drift()
    grown = typed(coupon=pa.array(["x", "y", "z"]))
    expected = [("new column", "coupon", "VARCHAR", REPORTED)]
    for _ in range(2):
        assert found(load_table(grown, storage, settings, HISTORY, preset)) == expected


def test_the_order_of_loading_changes_nothing(settings: Settings) -> None:
    tables = {
        HISTORY: typed(),
        "2024-01-05": typed(coupon=pa.array([1, 2, 3])),
        "2024-01-06": typed(shelf=None, what=pa.array(["view", "refund", "buy"])),
    }
    files, drifts = set(), []
    for order in permutations(tables):
        with home() as (_, storage):
            for arrival in order:
                load_table(tables[arrival], storage, settings, arrival, shop())
            files.add(storage.source_schema.read_bytes())
            known = read_schemas(storage)
            drifts.append([drift_of(known, arrival, shop()) for arrival in tables])
    assert len(files) == 1
    assert all(drift == drifts[0] for drift in drifts)
    assert [len(drift.items) for drift in drifts[0]] == [0, 1, 3]


@given(arrivals=ARRIVALS, order=st.randoms(use_true_random=False))
def test_records_do_not_depend_on_the_order_and_survive_the_file(
    arrivals: dict[str, SourceSchema], order: Any
) -> None:
    keys = list(arrivals)
    order.shuffle(keys)
    known = KnownSchemas({})
    for key in [*keys, *keys]:  # loading again changes nothing
        known = known.with_arrival(key, arrivals[key])
    assert known == KnownSchemas(arrivals)
    with home() as (_, storage):
        write_schemas(known, storage)
        assert read_schemas(storage) == known


@given(first=SCHEMAS, second=SCHEMAS, third=SCHEMAS)
def test_following_is_associative(
    first: SourceSchema, second: SourceSchema, third: SourceSchema
) -> None:
    left = first.followed_by(second).followed_by(third)
    assert left == first.followed_by(second.followed_by(third))


@given(schema=SCHEMAS, others=st.lists(SCHEMAS, max_size=3))
def test_what_was_seen_before_is_never_new(
    schema: SourceSchema, others: list[SourceSchema]
) -> None:
    known = schema
    for other in others:
        known = known.followed_by(other)
    changes = {item.change for item in compare(known, schema, shop()).items}
    assert changes.isdisjoint({"new column", "new event type"})
    assert compare(schema, schema, shop()) == Drift()
    assert compare(None, schema, shop()) == Drift()


def test_a_column_that_a_later_preset_reads_and_an_arrival_lacked_is_blocking() -> None:
    before = SourceSchema("csv", {"who": None, "coupon": None}, {})
    now = SourceSchema("csv", {"who": None}, {})
    (item,) = compare(before, now, shop(item_id="coupon")).items
    assert item == DriftItem(
        "vanished column",
        "coupon",
        "no type shown before",
        "the preset takes item_id from it",
        BLOCKING,
    )


def test_a_missing_event_type_counts_only_where_it_was_to_be_expected() -> None:
    known = SourceSchema("csv", {}, {"view": 800, "buy": 150, "zoom": 40, "rare": 10})
    tasks = "{qualifying_event_types: [buy], propensity_column: item_id, "
    counting = shop(tasks=tasks + "horizon_days: 3, lookback_days: 7}")
    large = compare(known, SourceSchema("csv", {}, {"view": 200}), counting)
    assert found(large) == [
        ("vanished event type", "buy", "15.0% of past events, none of 200", WARNED),
        ("vanished event type", "zoom", "4.0% of past events, none of 200", REPORTED),
    ]
    assert compare(known, SourceSchema("csv", {}, {"view": 30}), counting) == Drift()
    assert compare(known, SourceSchema("csv", {}, {}), counting) == Drift()


def test_event_types_without_end_are_not_listed(
    tmp_path: Path, storage: Storage, settings: Settings
) -> None:
    rows = [("1", f"t{number}", "2024-01-01", "a", "1") for number in range(MAX_EVENT_TYPES + 1)]
    load(write_rows(tmp_path / "a.csv", rows), storage, settings)
    load(write_rows(tmp_path / "b.csv", ROWS), storage, settings, arrival=NIGHT)
    known = read_schemas(storage)
    assert known.arrivals[HISTORY].event_types is None
    assert drift_of(known, NIGHT, shop()) == Drift()
    assert find_unseen_types(known, HISTORY, (), ()).arrived_share is None


def test_unseen_types_of_a_night_and_their_share() -> None:
    known = KnownSchemas(
        {
            "2024-01-06": SourceSchema("csv", {}, {"later": 9}),
            "2024-01-05": SourceSchema("csv", {}, {"view": 60, "refund": 30, "beat": 900}),
            HISTORY: SourceSchema("csv", {}, {"view": 99_000, "refund": 5, "old": 7}),
        }
    )
    unseen = find_unseen_types(known, NIGHT, ("view", "buy"), ("beat",))
    assert unseen.arrived_share == pytest.approx(30 / 90)
    assert unseen.types == (
        UnseenType("refund", 30, 35, HISTORY),
        UnseenType("old", 0, 7, HISTORY),
    )
    assert find_unseen_types(known, "2024-01-07", (), ()).arrived_share is None
    empty = known.with_arrival("2024-01-07", SourceSchema("csv", {}, {}))
    assert find_unseen_types(empty, "2024-01-07", (), ()).arrived_share == 0
