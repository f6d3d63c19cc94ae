"""Mapping presets: how a source's columns become canonical events, and what its tasks are.

A preset is YAML and holds no SQL: every transformation is one of the few named below, so that
someone else's preset can be run without being read as code.
"""

from __future__ import annotations

from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from behavior_pipeline.errors import PipelineError


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ColumnMapping(_Strict):
    """Where a canonical column comes from: exactly one of the five sources below.

    Attributes:
        column: source column whose value is taken.
        first_of: source columns of which the first with a value is taken.
        product_of: source columns whose product is taken (numeric).
        constant: the same text for every row.
        prefix: keep only so many leading characters.
        join: source columns whose values are joined with `:`, skipping nulls.
    """

    column: str | None = None
    first_of: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    product_of: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    join: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    constant: str | None = None
    prefix: PositiveInt | None = None

    @property
    def source_columns(self) -> tuple[str, ...]:
        """The source columns that this mapping reads."""
        single = (self.column,) if self.column is not None else ()
        return single + (self.first_of or ()) + (self.product_of or ()) + (self.join or ())

    @model_validator(mode="after")
    def _take_one_source(self) -> ColumnMapping:
        sources = (self.column, self.first_of, self.product_of, self.join, self.constant)
        if sum(source is not None for source in sources) != 1:
            raise ValueError("give exactly one of column, first_of, product_of, join, constant")
        return self


class TimeMapping(_Strict):
    """Where `occurred_at` comes from.

    Attributes:
        column: source column.
        unit: how the value is written: a timestamp, ISO text, or a number since 1970.
        format: strptime format of texts that are not ISO 8601.
        earliest, latest: rows outside `[earliest, latest)` come from broken clocks: quarantined;
            a time without a zone is UTC.
    """

    column: str
    unit: Literal["timestamp", "seconds", "milliseconds", "microseconds"] = "timestamp"
    format: str | None = None
    earliest: datetime | None = None
    latest: datetime | None = None

    @field_validator("earliest", "latest")
    @classmethod
    def _read_naive_as_utc(cls, value: datetime | None) -> datetime | None:
        return value.replace(tzinfo=UTC) if value and value.tzinfo is None else value


class DeletionMapping(_Strict):
    """Which rows are tombstones: they delete the event of their id and need nothing else.

    Attributes:
        column: source column that tells.
        values: what it holds in a tombstone, in any case.
    """

    column: str
    values: Annotated[tuple[str, ...], Field(min_length=1)] = ("true", "t", "1", "yes")


def _as_mapping(value: object) -> object:
    """Let `item_id: sku` stand for `item_id: {column: sku}`."""
    return {"column": value} if isinstance(value, str) else value


class Columns(_Strict):
    """One mapping per canonical column; a column left out is null."""

    user_id: ColumnMapping
    event_type: ColumnMapping
    occurred_at: TimeMapping
    event_id: ColumnMapping | None = None
    item_id: ColumnMapping | None = None
    category: ColumnMapping | None = None
    location: ColumnMapping | None = None
    context: ColumnMapping | None = None
    amount: ColumnMapping | None = None
    codes: ColumnMapping | None = None
    is_deleted: DeletionMapping | None = None

    @model_validator(mode="after")
    def _need_ids_to_delete(self) -> Columns:
        if self.is_deleted is not None and self.event_id is None:
            raise ValueError("is_deleted needs event_id: a tombstone names the event it deletes")
        return self

    @field_validator("*", mode="before")
    @classmethod
    def _accept_plain_names(cls, value: object) -> object:
        return _as_mapping(value)


class Tasks(_Strict):
    """What counts, in this source, for the tasks downstream.

    Attributes:
        qualifying_event_types: events that make a user active: churn, RFM, population, value;
            null means every type.
        propensity_event_types: events that count as taking a target; null means qualifying ones.
        propensity_column: canonical column whose 30 most frequent values are the targets.
        horizon_days: length of the label window.
        lookback_days: a user with a qualifying event so many days before a cutoff is in the
            population.
    """

    qualifying_event_types: tuple[str, ...] | None = None
    propensity_event_types: tuple[str, ...] | None = None
    propensity_column: Literal["event_type", "item_id", "category", "location", "context"]
    horizon_days: int
    lookback_days: int


class Preset(_Strict):
    """Everything the pipeline must know about a source.

    Attributes:
        name: names the source's home on disk.
        description: one sentence for people.
        is_simulated: no person made these events; every report says so.
        columns: the mapping.
        ignored_event_types: kept as events, left out of token sequences.
        session_gap_seconds: a longer silence ends a session.
        tasks: what counts downstream.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
    description: str
    is_simulated: bool = False
    columns: Columns
    ignored_event_types: tuple[str, ...] = ()
    session_gap_seconds: PositiveInt = 1800
    tasks: Tasks


def preset_names() -> list[str]:
    """Return the names of the presets that ship with the package."""
    folder = resources.files("behavior_pipeline.ingest") / "presets"
    return sorted(
        path.name.removesuffix(".yaml") for path in folder.iterdir() if path.name.endswith(".yaml")
    )


def load_preset(source: str) -> Preset:
    """Load a shipped preset by name, or anyone's own by the path of its YAML file.

    Raises:
        PipelineError: if there is no such preset, or it is not valid.
    """
    if source in preset_names():
        text = (
            resources.files("behavior_pipeline.ingest") / "presets" / f"{source}.yaml"
        ).read_text()
        return parse_preset(text, source)
    path = Path(source)
    if path.suffix not in {".yaml", ".yml"} or not path.is_file():
        raise PipelineError(
            f"There is no preset '{source}', and no YAML file of that name.",
            f"Use one of {', '.join(preset_names())}, or the path of your own preset.",
        )
    try:
        return parse_preset(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise PipelineError(
            f"The preset {path} is not a UTF-8 text: {error.reason} at byte {error.start}.",
            "Save it as UTF-8.",
        ) from None


def parse_preset(text: str, origin: str) -> Preset:
    """Parse a preset; `origin` names it in messages.

    Raises:
        PipelineError: naming the key at fault.
    """
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise PipelineError(f"The preset {origin} is not valid YAML: {error}") from None
    try:
        return Preset.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the file"
        raise PipelineError(
            f"The preset {origin} is not valid at '{key}': {first['msg']}.",
            "The keys are described in docs/presets.md.",
        ) from None
