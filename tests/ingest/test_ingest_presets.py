from __future__ import annotations

import re
from pathlib import Path

import pytest
from ingest_builders import LATER, events, load, quarantine, write_rows

from behavior_pipeline.errors import PipelineError
from behavior_pipeline.ingest.presets import (
    ColumnMapping,
    Columns,
    DeletionMapping,
    Preset,
    Tasks,
    TimeMapping,
    load_preset,
    parse_preset,
    preset_names,
)
from behavior_pipeline.ingest.sources import SourceColumn
from behavior_pipeline.ingest.validation import NOT_AN_OBJECT, rules
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage

DOCUMENT = (Path(__file__).parents[2] / "docs" / "presets.md").read_text()
EXAMPLES = re.findall(r"```yaml\n(.*?)```", DOCUMENT, re.DOTALL)

REAL = {
    "online_retail_ii": (
        "online_retail_ii.parquet",
        1_044_847,
        {"user_id is null or empty": 235_287},
    ),
    "globo_news": (
        "globo_news.parquet",
        2_988_181,
        {"occurred_at is at or after 2017-10-18T00:00:00+00:00": 712},
    ),
    "oss_commits": ("oss_commits.parquet", 1_332_223, {}),
    "travel_stackexchange": ("travel_stackexchange_events.parquet", 434_980, {}),
    "retailrocket": ("retailrocket_sample.csv", 9_385, {}),
}


def test_the_promised_presets_ship() -> None:
    assert {*REAL, "rees46"} <= set(preset_names())
    for name in preset_names():
        assert load_preset(name).name == name
        assert f"`{name}`" in DOCUMENT


@pytest.mark.realdata
@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_a_shipped_preset_loads_its_log_whole(
    name: str, realdata: Path, storage: Storage, settings: Settings
) -> None:
    file, num_read, reasons = REAL[name]
    two = settings.model_copy(update={"threads": 2, "memory_limit": "2GB"})
    summary = load(realdata / file, storage, two, preset=load_preset(name))
    assert (summary.num_read, summary.reasons) == (num_read, reasons)
    assert summary.num_inserted == num_read - sum(reasons.values())


@pytest.mark.realdata
def test_the_csv_sample_cut_shuffled_and_twice(
    realdata: Path, storage: Storage, settings: Settings, tmp_path: Path
) -> None:
    preset = load_preset("retailrocket")
    file = realdata / "retailrocket_sample.csv"
    load(file, storage, settings, preset=preset)
    before = events(storage)
    header, *lines = file.read_text().splitlines()
    for number, part in enumerate((lines[5000:][::-1], lines[:5000])):
        (tmp_path / f"part{number}.csv").write_text("\n".join([header, *part]))
    load(f"{tmp_path}/part*.csv", storage, settings, preset=preset, at=LATER)
    assert events(storage) == before


def test_rees46_reads_its_public_columns(
    tmp_path: Path, storage: Storage, settings: Settings
) -> None:
    columns = ["event_time", "event_type", "product_id", "category_id", "category_code"]
    columns += ["brand", "price", "user_id", "user_session"]
    code = "electronics.smartphone"
    rows = [
        ("2019-10-01 00:00:00 UTC", "view", "1", "20", None, "acer", "35.79", "5", "s"),
        ("2019-10-01 00:00:01 UTC", "purchase", "2", "21", code, None, "489.0", "5", "s"),
        ("never", "view", "2", "21", code, None, "489.0", "5", "s"),
    ]
    file = write_rows(tmp_path / "2019-Oct.csv.gz", rows, columns)
    load(file, storage, settings, preset=load_preset("rees46"))
    assert [(row["category"], row["context"], row["amount"]) for row in events(storage)] == [
        ("20", "acer", 35.79),
        (code, None, 489.0),
    ]
    assert [row["column_name"] for row in quarantine(storage)] == ["event_time"]


def test_the_examples_of_the_document_are_presets() -> None:
    assert len(EXAMPLES) == 2
    for example in EXAMPLES:
        assert parse_preset(example, "docs/presets.md").columns.user_id.column


def test_the_document_names_every_key_and_reason() -> None:
    for model in (Preset, Tasks, Columns, ColumnMapping, TimeMapping, DeletionMapping):
        for key in model.model_fields:
            assert re.search(rf"`(tasks\.)?{key}\b", DOCUMENT), key
    mapping = load_preset("rees46").columns.model_copy(
        update={"event_id": ColumnMapping(column="x"), "codes": ColumnMapping(column="x")}
    )
    sources = {name: SourceColumn("v", "VARCHAR") for name in ("x", "event_time", "price")}
    reasons = {rule.reason for rule in rules(mapping, sources)}
    for reason in reasons - {NOT_AN_OBJECT}:
        assert f"`{reason}`" in DOCUMENT


def test_an_unknown_key_is_named() -> None:
    with pytest.raises(PipelineError, match=r"columns\.color"):
        parse_preset(EXAMPLES[0].replace("  context:", "  color:"), "my.yaml")


TOMBSTONES = EXAMPLES[0].replace(
    "  user_id:", "  is_deleted: {column: op, values: [D]}\n  user_id:"
)


def test_tombstones_are_mapped() -> None:
    mapping = parse_preset(TOMBSTONES, "my.yaml").columns.is_deleted
    assert mapping == DeletionMapping(column="op", values=("D",))
    plain = parse_preset(TOMBSTONES.replace(", values: [D]", ""), "my.yaml").columns.is_deleted
    assert plain == DeletionMapping(column="op", values=("true", "t", "1", "yes"))
    short = parse_preset(TOMBSTONES.replace("{column: op, values: [D]}", "op"), "my.yaml")
    assert short.columns.is_deleted == plain


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  event_id: uuid", "  # uuid", r"'columns'.*is_deleted needs event_id"),
        ("values: [D]", "values: []", r"columns\.is_deleted\.values"),
        ("column: op, ", "", r"columns\.is_deleted\.column"),
        ("values: [D]", "equals: D", r"columns\.is_deleted\.equals"),
    ],
)
def test_a_mapping_of_tombstones_that_cannot_work_is_named(
    old: str, new: str, message: str
) -> None:
    assert old in TOMBSTONES
    with pytest.raises(PipelineError, match=message):
        parse_preset(TOMBSTONES.replace(old, new), "my.yaml")


def test_a_preset_that_is_no_utf_8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "shop.yaml"
    path.write_bytes("name: caf\u00e9\n".encode("latin-1"))
    with pytest.raises(PipelineError, match=r"shop\.yaml is not a UTF-8 text"):
        load_preset(str(path))
