"""The checks on schema drift, through Dagster."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from ingest_builders import COLUMNS, ROWS, SHOP, Row, write_rows
from sequence_builders import CUTOFF
from sequence_checkpoints import Home, history

from behavior_pipeline.defs.drift_checks import (
    MAX_ROWS,
    are_event_types_known,
    is_arrival_schema_as_known,
    is_history_schema_as_known,
    markdown_table,
)
from behavior_pipeline.defs.ingest import arrived_events, historical_events
from behavior_pipeline.defs.loggers import _show_failed_check
from behavior_pipeline.defs.partitions import nights
from behavior_pipeline.defs.resources import PipelineResource
from behavior_pipeline.encoder.live import LIVE, point_to
from behavior_pipeline.ingest.schemas import KnownSchemas, SourceSchema, write_schemas
from behavior_pipeline.sequences.files import unknown_share, write_sequences
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage
from behavior_pipeline.windows import partition_of

NIGHT = "2024-01-05"

Evaluation = dg.AssetCheckEvaluation


@pytest.fixture
def resource(tmp_path: Path, settings: Settings) -> PipelineResource:
    """A shop with a folder per day; a file that the preset stands in."""
    (tmp_path / "shop.yaml").write_text(SHOP)
    return PipelineResource(
        overrides={
            "source": str(tmp_path / "shop.yaml"),
            "path": str(tmp_path / "landing" / "{date}" / "*.csv"),
            "data_root": str(settings.data_root),
            "memory_limit": "1GB",
            "threads": 1,
        }
    )


@pytest.fixture
def land(tmp_path: Path) -> Callable[..., Path]:
    """Let files land in the folder of a day."""

    def land_rows(day: str, rows: list[Row], columns: tuple[str, ...] = COLUMNS) -> Path:
        return write_rows(tmp_path / "landing" / day / "events.csv", rows, columns)

    return land_rows


def run(resource: PipelineResource, *definitions: Any, night: str | None = None) -> Evaluation:
    """Execute assets and one check; return its evaluation."""
    result = dg.materialize(
        list(definitions),
        resources={"pipeline": resource},
        partition_key=night,
        raise_on_error=False,
    )
    (evaluation,) = result.get_asset_check_evaluations()
    is_held_back = not evaluation.passed and evaluation.severity is dg.AssetCheckSeverity.ERROR
    assert result.success != is_held_back
    return evaluation


def value(evaluation: Evaluation, name: str) -> Any:
    return evaluation.metadata[name].value


def test_a_first_history_and_the_one_after_it(
    resource: PipelineResource, land: Callable[..., Path]
) -> None:
    land("2024-01-01", ROWS)
    first = run(resource, historical_events, is_history_schema_as_known)
    assert first.passed
    assert value(first, "note") == "nothing was known before this load"
    land("2024-01-04", [("4", "view", "2024-01-04", "a", "1", "x")], (*COLUMNS, "coupon"))
    second = run(resource, historical_events, is_history_schema_as_known)
    assert second.passed  # reported
    assert value(second, "num_reported") == 1
    assert "| reported | new column | coupon | no type shown |" in value(second, "drift")


def test_a_night_that_is_warned_of_goes_on(
    resource: PipelineResource, land: Callable[..., Path]
) -> None:
    land("2024-01-01", ROWS * 10)
    run(resource, historical_events, is_history_schema_as_known)
    tasks = "{qualifying_event_types: [buy], propensity_column: event_type"
    text = SHOP.replace("{propensity_column: event_type", tasks)
    Path(resource.overrides["source"]).write_text(text)
    land(NIGHT, [("4", "purchase", NIGHT, "a", str(price)) for price in range(30)])
    night = run(resource, arrived_events, is_arrival_schema_as_known, night=NIGHT)
    assert (night.passed, night.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert (value(night, "num_warned"), value(night, "num_blocking")) == (1, 0)
    assert value(night, "gravest")[0].startswith("warned: vanished event type 'buy', 20.0%")
    assert "| new event type | purchase | 30 of 30 events (100.0%) |" in value(night, "drift")

    lines: list[tuple[str, bool]] = []

    class Terminal:
        def show_failed_check(self, name: str, found: str, *, is_blocking: bool) -> None:
            lines.append((name + found, is_blocking))

    class Event:
        asset_check_evaluation_data = night

    _show_failed_check(Terminal(), Event())  # type: ignore[arg-type]
    ((line, is_blocking),) = lines
    assert not is_blocking
    assert "vanished event type 'buy'" in line
    assert "| new event type |" not in line


def test_only_what_is_blocking_holds_a_night_back(
    resource: PipelineResource, land: Callable[..., Path]
) -> None:
    land("2024-01-01", [(*row, "x") for row in ROWS], (*COLUMNS, "coupon"))
    run(resource, historical_events, is_history_schema_as_known)
    land(NIGHT, [("4", "view", NIGHT, "a", "1")])
    night = run(resource, arrived_events, is_arrival_schema_as_known, night=NIGHT)
    assert night.passed
    assert "| reported | vanished column | coupon |" in value(night, "drift")
    Path(resource.overrides["source"]).write_text(SHOP.replace("sku", "coupon"))

    @dg.asset(name="arrived_events", partitions_def=nights)
    def loaded_before() -> None:
        """The night as it was loaded, before the preset was changed."""

    held = run(resource, loaded_before, is_arrival_schema_as_known, night=NIGHT)
    assert (held.passed, held.severity) == (False, dg.AssetCheckSeverity.ERROR)
    assert value(held, "num_blocking") == 1
    assert value(held, "gravest")[0].startswith("blocking: vanished column 'coupon'")


def test_an_arrival_without_a_record_says_so(resource: PipelineResource) -> None:
    @dg.asset(name="arrived_events", partitions_def=nights)
    def loaded_before() -> None:
        """A night that was loaded before schemas were recorded."""

    night = run(resource, loaded_before, is_arrival_schema_as_known, night=NIGHT)
    assert night.passed
    assert "load it again" in value(night, "note")


@dg.asset(name="sequences", partitions_def=nights)
def tokenized() -> None:
    """Sequences that are there already."""


@pytest.fixture
def checkpoint(tmp_path: Path, settings: Settings) -> tuple[Home, PipelineResource]:
    """A live checkpoint that knows view and buy, and the night's sequences: one token is UNK."""
    storage = Storage(settings.data_root / "shop")
    rows = [*history("ann", 20), *history("bob", 20)]
    home = Home.build(storage, settings, rows)
    point_to(storage.checkpoints, LIVE, home.checkpoint.name)
    rows[-1] |= {"event_type": "refund"}
    home.tokenize(rows, CUTOFF)
    (tmp_path / "shop.yaml").write_text(SHOP)
    overrides = {"source": str(tmp_path / "shop.yaml"), "data_root": str(settings.data_root)}
    return home, PipelineResource(overrides=overrides)


@pytest.mark.parametrize(
    ("arrived", "max_share", "is_known"),
    [
        ({"view": 99, "refund": 1}, 0.03, True),
        ({"view": 70, "refund": 30}, 0.03, False),  # alarmed by the arrivals, not by all tokens
        ({"view": 100}, 0.02, False),  # 1 of 40 tokens
        ({"view": 10, "adjust": 90}, 0.03, True),  # ignored types are no tokens
        (None, 0.03, True),
        (None, 0.02, False),
    ],
)
def test_event_types_the_checkpoint_does_not_know_raise_the_alarm(
    checkpoint: tuple[Home, PipelineResource],
    arrived: dict[str, int] | None,
    max_share: float,
    is_known: bool,
) -> None:
    home, resource = checkpoint
    night = partition_of(CUTOFF)
    counts = {"history": {"view": 99_000, "buy": 1_000}} | ({night: arrived} if arrived else {})
    records = {key: SourceSchema("csv", {}, found) for key, found in counts.items()}
    write_schemas(KnownSchemas(records), home.storage)
    overrides = resource.overrides | {"max_unknown_event_share": max_share}
    check = run(
        PipelineResource(overrides=overrides), tokenized, are_event_types_known, night=night
    )
    assert (check.passed, check.severity) == (is_known, dg.AssetCheckSeverity.WARN)
    assert value(check, "unknown_share_of_tokens") == pytest.approx(1 / 40)
    if arrived is None:
        assert "not recorded" in value(check, "note")
        return
    unseen = arrived.get("refund", 0)
    assert value(check, "unknown_share_arrived") == pytest.approx(unseen / 100)
    if unseen:
        expected = f"| refund | {unseen} | {unseen} | {night} |"
        assert expected in value(check, "unseen_event_types")


def test_the_share_from_the_files_is_that_of_the_summary(
    checkpoint: tuple[Home, PipelineResource],
) -> None:
    home, _ = checkpoint
    folder = home.storage.sequences(CUTOFF - timedelta(days=1))
    summary = write_sequences(
        home.storage, home.settings, home.vocabulary, CUTOFF - timedelta(days=1), folder
    )
    for field, share in summary.unknown_shares.items():
        assert unknown_share(folder, field) == share


def test_a_table_shows_names_as_they_are_and_is_cut() -> None:
    rows = [["a|b", "<i>*x*</i>\n`y`"], *itertools.repeat(["c", "d"], MAX_ROWS + 6)]
    lines = markdown_table(["one", "two"], rows).value.splitlines()
    assert lines[:3] == ["| one | two |", "| --- | --- |", r"| a\|b | \<i\>\*x\*\</i\> \`y\` |"]
    assert lines[-1] == "7 more"
