from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ingest_builders import events, load, quarantine, write_rows

from behavior_pipeline.errors import PipelineError
from behavior_pipeline.ingest.presets import parse_preset
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage

PRESET = """
name: t
description: d
columns:
  user_id: {user}
  event_type: type
  occurred_at: {time}
  {more}
tasks: {{propensity_column: event_type, horizon_days: 1, lookback_days: 1}}
"""
NOON = datetime(2024, 1, 2, 12, tzinfo=UTC)


def run(
    tmp_path: Path,
    settings: Settings,
    table: dict[str, Any],
    *,
    user: str = "user",
    time: str = "{column: t}",
    more: str = "location: {constant: here}",
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Load a table; return its events by time of the row, and its quarantine."""
    size = len(next(iter(table.values())))
    filled: dict[str, Any] = {
        "user": ["u"] * size,
        "type": ["a", "b"] * size,
        "t": [NOON.replace(tzinfo=None)] * size,
    } | table
    arrays = {k: v if isinstance(v, pa.Array) else pa.array(v[:size]) for k, v in filled.items()}
    pq.write_table(pa.table(arrays), tmp_path / "t.parquet")
    storage = Storage(tmp_path / "home")
    preset = parse_preset(PRESET.format(user=user, time=time, more=more), "t")
    loose = settings.model_copy(update={"max_quarantined_share": 1.0})
    load(tmp_path / "t.parquet", storage, loose, preset=preset)
    return events(storage), quarantine(storage)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.array([7, 8]), ["7", "8"]),
        (pa.array([7.0, 8.5]), ["7", "8.5"]),
        (pa.array(["7.0", "7"]), ["7", "7.0"]),
        (pa.array([2**63, 1], pa.uint64()), ["1", "9223372036854775808"]),
    ],
)
def test_whole_numbers_become_texts_without_a_decimal_point_and_texts_stay(
    values: pa.Array, expected: list[str], tmp_path: Path, settings: Settings
) -> None:
    rows, _ = run(tmp_path, settings, {"user": values})
    assert [row["user_id"] for row in rows] == expected


@pytest.mark.parametrize(
    ("mapping", "expected"),
    [
        ("{join: [x, n, y]}", ["a:b", "c"]),
        ("{first_of: [y, x]}", ["b", "c"]),
        ("{column: x, prefix: 1}", ["a", "c"]),
        ('{constant: "it\'s"}', ["it's", "it's"]),
        ("{product_of: [p, q]}", ["6.0", None]),
        ("n", [None, None]),
    ],
)
def test_texts(
    mapping: str, expected: list[str | None], tmp_path: Path, settings: Settings
) -> None:
    table = {
        "user": ["1", "2"],
        "x": ["a", "c"],
        "y": ["b", ""],
        "n": pa.nulls(2, pa.string()),
        "p": [2, None],
        "q": [3.0, 4.0],
    }
    rows, _ = run(tmp_path, settings, table, more=f"category: {mapping}")
    assert [row["category"] for row in rows] == expected


@pytest.mark.parametrize(
    ("value", "time"),
    [
        (NOON, "t"),
        (pa.array([NOON], pa.timestamp("ns", "Europe/Paris")), "t"),
        (datetime(2024, 1, 2, 12), "t"),  # noqa: DTZ001 - naive means UTC
        ("2024-01-02 12:00:00", "t"),
        ("2024-01-02T12:00:00Z", "t"),
        ("2024-01-02T14:00:00+02:00", "t"),
        ("2024-01-02 12:00:00 UTC", "t"),
        ("02/01/24 12h", "{column: t, format: '%d/%m/%y %Hh'}"),
        (1704196800, "{column: t, unit: seconds}"),
        (1704196800.0, "{column: t, unit: seconds}"),
        ("1704196800000", "{column: t, unit: milliseconds}"),
        (1704196800000000, "{column: t, unit: microseconds}"),
    ],
)
def test_times(value: Any, time: str, tmp_path: Path, settings: Settings) -> None:
    column = value if isinstance(value, pa.Array) else [value]
    twice = pa.concat_arrays([pa.array(column)] * 2)
    rows, _ = run(tmp_path, settings, {"t": twice}, time=time)
    assert [row["occurred_at"] for row in rows] == [NOON, NOON]


@pytest.mark.parametrize(
    ("value", "time"),
    [
        ("tomorrow", "t"),
        ("infinity", "t"),
        ("290000-01-01", "t"),
        ("2024-13-01", "t"),
        (1704196800, "t"),
        (2**62, "{column: t, unit: seconds}"),
        (float("nan"), "{column: t, unit: seconds}"),
        ("1e300", "{column: t, unit: milliseconds}"),
        ("2024-01-02", "{column: t, format: '%d/%m/%y'}"),
    ],
)
def test_what_is_no_time_is_quarantined(
    value: Any, time: str, tmp_path: Path, settings: Settings
) -> None:
    rows, bad = run(tmp_path, settings, {"t": [value, value]}, time=time)
    assert rows == []
    assert {row["reason"] for row in bad} == {"occurred_at cannot be read as a time"}
    assert {row["column_name"] for row in bad} == {"t"}


def test_fractions_of_epoch_seconds_keep_their_microseconds(
    tmp_path: Path, settings: Settings
) -> None:
    table = {"t": ["1506825423.271737", "1506825423.000001"]}
    rows, _ = run(tmp_path, settings, table, time="{column: t, unit: seconds}")
    assert [row["occurred_at"].microsecond for row in rows] == [1, 271737]


@pytest.mark.parametrize(
    ("mapping", "fault"),
    [("a", ["a", "a"]), ("{product_of: [b, a]}", ["a", "a"]), ("{product_of: [b, c]}", ["b", "c"])],
)
def test_an_amount_that_is_no_number_is_quarantined_by_its_column(
    mapping: str, fault: list[str], tmp_path: Path, settings: Settings
) -> None:
    table = {"a": ["x", "inf", "", "2"], "b": [1e300, 1.0, 1.0, 1.0], "c": ["1e300", "y", "", "2"]}
    rows, bad = run(tmp_path, settings, table, more=f"amount: {mapping}")
    assert [row["column_name"] for row in bad] == fault
    assert {row["reason"] for row in bad} == {"amount is not a number"}
    assert sorted((row["amount"] for row in rows), key=str) == [2.0, None]


def test_codes_come_from_lists_and_texts(tmp_path: Path, settings: Settings) -> None:
    table = {"user": ["1", "2"], "k": [[1, 2], None]}
    rows, bad = run(tmp_path, settings, table, more="codes: k")
    assert [row["codes"] for row in rows] == [[1, 2], None]
    assert bad == []
    texts = tmp_path / "texts"  # a home of its own: a history keeps what it has
    texts.mkdir()
    rows, bad = run(texts, settings, {"k": ["[3, 4]", "[]", "[1, 99999]"]}, more="codes: k")
    assert sorted(row["codes"] for row in rows) == [[], [3, 4]]
    assert [row["reason"] for row in bad] == ["codes is not a list of small integers"]


def test_a_missing_column_is_named_with_the_closest(
    tmp_path: Path, storage: Storage, settings: Settings
) -> None:
    columns = ("who", "what", "at", "skuu", "price")
    file = write_rows(tmp_path / "a.csv", [("1", "view", "2024-01-01", "a", "1")], columns)
    with pytest.raises(PipelineError) as caught:
        load(file, storage, settings)
    message = str(caught.value)
    for part in (str(file), "'sku'", "item_id", ", ".join(columns), "Did you mean 'skuu'?"):
        assert part in message


@pytest.mark.parametrize("more", ["category: {}", "category: {column: a, constant: b}"])
def test_a_mapping_has_exactly_one_source(more: str) -> None:
    with pytest.raises(PipelineError, match="exactly one of"):
        parse_preset(PRESET.format(user="u", time="t", more=more), "t")
