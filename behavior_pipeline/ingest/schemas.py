"""What a source showed in each load: its columns, their types, its event types.

One file keeps a record per arrival of what was found in it alone. What was known before an arrival
is put together from the arrivals before it in their own order, so it does not depend on the order
in which they were loaded, and loading an old arrival again judges it as the first time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, Final

import duckdb

from behavior_pipeline.ingest.arrivals import EVENT_COLUMNS, HISTORY, arrival_rank
from behavior_pipeline.ingest.files import Kind
from behavior_pipeline.ingest.mapping import source_columns
from behavior_pipeline.ingest.presets import Columns, Preset
from behavior_pipeline.ingest.sources import Source
from behavior_pipeline.ingest.type_changes import INTEGER_TEXTS, TEXT
from behavior_pipeline.sql import quote_identifier
from behavior_pipeline.storage import Storage, read_json, write_json

MAX_EVENT_TYPES: Final = 1000
"""A source with more types in a load has no closed set of them: their drift is not told."""

TEXT_COLUMNS: Final = frozenset(
    {"event_id", "user_id", "event_type", "item_id", "category", "location", "context"}
)
"""Canonical columns that take a value as it is written."""

_TYPE_OF_NOTHING: Final = "INTEGER"  # what DuckDB shows for a Parquet column of nulls only
_IS_NO_INTEGER: Final = "TRY_CAST({0} AS HUGEINT)::VARCHAR IS DISTINCT FROM {0}"


@dataclass(frozen=True)
class SourceSchema:
    """What a source showed in one load, or in all loads up to one.

    Attributes:
        kind: of the files: `parquet`, `csv` or `jsonl`.
        columns: type by name, as DuckDB names it, or INTEGER_TEXTS; None where no type is shown:
            texts have none, nor has a column without a value.
        past_columns: columns of loads before that the newest one lacks, likewise.
        event_types: accepted rows by event type; None if there are more than MAX_EVENT_TYPES.
    """

    kind: Kind
    columns: dict[str, str | None]
    event_types: dict[str, int] | None
    past_columns: dict[str, str | None] = field(default_factory=dict)

    def followed_by(self, newer: SourceSchema) -> SourceSchema:
        """Return what is known after a newer load: its columns, and everything ever seen."""
        older, newest = self.ever_seen, newer.ever_seen
        types = {name: newest.get(name) or older.get(name) for name in {**older, **newest}}
        counts = None
        if self.event_types is not None and newer.event_types is not None:
            counts = dict(Counter(self.event_types) + Counter(newer.event_types))
        return SourceSchema(
            newer.kind,
            {name: types[name] for name in newer.columns},
            counts,
            {name: type_ for name, type_ in types.items() if name not in newer.columns},
        )

    @property
    def ever_seen(self) -> dict[str, str | None]:
        """Type by name of all columns, those that have gone included."""
        return self.past_columns | self.columns

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "kind": self.kind,
            "columns": self.columns,
            "event_types": self.event_types,
            "past_columns": self.past_columns,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> SourceSchema:
        """Read what `to_json` returned."""
        return cls(**content)


@dataclass(frozen=True)
class KnownSchemas:
    """What every arrival showed.

    Attributes:
        arrivals: what each arrival showed when it was last loaded.
        replaced: what the history showed before it was last loaded with something else: nothing
            comes before the history, so it is compared with itself.
    """

    arrivals: dict[str, SourceSchema]
    replaced: SourceSchema | None = None

    def with_arrival(self, arrival: str, found: SourceSchema) -> KnownSchemas:
        """Return the same after a load of the arrival."""
        former, replaced = self.arrivals.get(arrival), self.replaced
        if arrival == HISTORY and former is not None and former != found:
            replaced = former
        return replace(self, arrivals={**self.arrivals, arrival: found}, replaced=replaced)

    def before(self, arrival: str) -> SourceSchema | None:
        """Return what was known before an arrival, None before the very first."""
        if arrival == HISTORY:
            return self.replaced
        earlier = [self.arrivals[key] for key in self.up_to(arrival) if key != arrival]
        return reduce(SourceSchema.followed_by, earlier) if earlier else None

    def up_to(self, arrival: str) -> list[str]:
        """Return the arrivals that were loaded, from the oldest to this one."""
        ranked = sorted(self.arrivals, key=arrival_rank)
        return [key for key in ranked if arrival_rank(key) <= arrival_rank(arrival)]

    def last_seen(self, arrival: str) -> dict[str, str]:
        """Return, for each column ever seen, the newest arrival up to this one that had it."""
        return {name: key for key in self.up_to(arrival) for name in self.arrivals[key].columns}

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "arrivals": {key: found.to_json() for key, found in self.arrivals.items()},
            "replaced": self.replaced.to_json() if self.replaced else None,
        }


def read_schemas(storage: Storage) -> KnownSchemas:
    """Read what is known of a source, nothing before its first load."""
    if not storage.source_schema.is_file():
        return KnownSchemas({})
    content = read_json(storage.source_schema)
    replaced = content["replaced"]
    return KnownSchemas(
        {key: SourceSchema.from_json(found) for key, found in content["arrivals"].items()},
        SourceSchema.from_json(replaced) if replaced else None,
    )


def write_schemas(known: KnownSchemas, storage: Storage) -> None:
    """Replace what is known of a source, in one rename."""
    write_json(storage.source_schema, known.to_json())


def shown_columns(source: Source, kind: Kind) -> dict[str, str | None]:
    """Return the source's columns with their types; CSV and JSON lines show none."""
    is_typed = kind == "parquet"
    return {name: column.type if is_typed else None for name, column in source.columns.items()}


def observe(
    connection: duckdb.DuckDBPyConnection, preset: Preset, source: Source, kind: Kind
) -> SourceSchema:
    """Return what a load shows.

    Args:
        connection: holds the canonical rows of the load in the table `accepted`.
        preset: tells which columns are mapped.
        source: the raw files.
        kind: of the files.
    """
    columns = shown_columns(source, kind)
    for canonical, name in _plainly_mapped(preset.columns).items():
        columns[name] = _seen_type(connection, canonical, columns[name])
    rows = connection.execute(
        "SELECT event_type, count(*) FROM accepted GROUP BY event_type ORDER BY event_type LIMIT ?",
        [MAX_EVENT_TYPES + 1],
    ).fetchall()
    return SourceSchema(kind, columns, dict(rows) if len(rows) <= MAX_EVENT_TYPES else None)


def _plainly_mapped(columns: Columns) -> dict[str, str]:
    """Return the canonical columns that are one column of the source as it is, with its name."""
    plain = {}
    for canonical in Columns.model_fields:
        mapping = getattr(columns, canonical)
        names = source_columns(mapping)
        is_kept = canonical in EVENT_COLUMNS  # a tombstone's mark is no column of events
        if is_kept and len(names) == 1 and getattr(mapping, "prefix", None) is None:
            plain[canonical] = names[0]
    return plain


def _seen_type(
    connection: duckdb.DuckDBPyConnection, canonical: str, type_: str | None
) -> str | None:
    """Return what the values of a mapped column say about its type, which its file does not.

    Each query ends at the first value that answers it.
    """
    name = quote_identifier(canonical)
    if type_ == _TYPE_OF_NOTHING and not _is_any(connection, f"{name} IS NOT NULL"):
        return None
    if type_ != TEXT or canonical not in TEXT_COLUMNS:
        return type_
    is_other = f"{name} IS NOT NULL AND {_IS_NO_INTEGER.format(name)}"
    return TEXT if _is_any(connection, is_other) else INTEGER_TEXTS


def _is_any(connection: duckdb.DuckDBPyConnection, condition: str) -> bool:
    """Tell whether any accepted row meets a condition."""
    found = connection.execute(f"SELECT 1 FROM accepted WHERE {condition} LIMIT 1").fetchall()
    return bool(found)
