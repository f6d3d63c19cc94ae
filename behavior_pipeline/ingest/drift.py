"""Schema drift: how what a load shows differs from what was known of its source, and what of it.

`docs/schema_drift.md` is the table of outcomes; the rules are here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Literal

import duckdb

from behavior_pipeline.errors import PipelineError
from behavior_pipeline.ingest.files import Kind
from behavior_pipeline.ingest.mapping import source_columns
from behavior_pipeline.ingest.presets import Columns, Preset
from behavior_pipeline.ingest.schemas import (
    TEXT_COLUMNS,
    KnownSchemas,
    SourceSchema,
    observe,
    read_schemas,
    shown_columns,
    write_schemas,
)
from behavior_pipeline.ingest.sources import Source
from behavior_pipeline.ingest.type_changes import (
    INTEGER_TEXTS,
    TEXT,
    is_same_type,
    keeps_values,
    keeps_writing,
)
from behavior_pipeline.storage import Storage

MIN_EXPECTED: Final = 5
"""An event type is missed only where so many of its events were to be expected: of a rarer one a
small night may well have none."""

_MAX_NAMED: Final = 10  # changes in a refusal: one screen
_NOT_READ: Final = "the preset does not read it"
_QUARANTINED: Final = "a value that cannot be read as that is in quarantine"
_READ_AS_BEFORE: Final = "its values are read as before; one that cannot be is in quarantine"
_NEW_IDS: Final = "; a row that comes again gets a new event id"

Change = Literal[
    "new column",
    "vanished column",
    "changed type",
    "other kind of files",
    "new event type",
    "vanished event type",
]
_Uses = dict[str, tuple[str, ...]]  # canonical columns by the source column that they are made of


class Severity(StrEnum):
    """How much a change matters, least first."""

    REPORTED = "reported"
    WARNED = "warned"
    BLOCKING = "blocking"


_BY_SEVERITY: Final = list(Severity)


@dataclass(frozen=True)
class DriftItem:
    """One thing that is not as it was.

    Attributes:
        change: what happened.
        name: of the column or the event type.
        details: types or counts.
        outcome: what the pipeline made of it.
        severity: see Severity.
    """

    change: Change
    name: str
    details: str
    outcome: str
    severity: Severity

    def __str__(self) -> str:
        """Return one line for people."""
        return f"{self.severity}: {self.change} '{self.name}', {self.details}: {self.outcome}"


@dataclass(frozen=True)
class Drift:
    """Everything that is not as it was, most severe first; nothing for a first load."""

    items: tuple[DriftItem, ...] = ()

    @property
    def severity(self) -> Severity | None:
        """The severity of the most severe item, None without any."""
        return self.items[0].severity if self.items else None

    @property
    def lines(self) -> list[str]:
        """One line for each item, for people."""
        return [str(item) for item in self.items]


def compare(known: SourceSchema | None, found: SourceSchema, preset: Preset) -> Drift:
    """Name what a load shows that was not known, and what was known that it does not show.

    Args:
        known: what was known before; None for a first load, which has nothing to differ from.
        found: what the load shows.
        preset: tells which columns are read and which event types count.
    """
    if known is None:
        return Drift()
    uses = _uses(preset.columns)
    items = [
        *_other_kind(known, found),
        *_new_columns(known, found, uses, preset),
        *_vanished_columns(known, found, uses, preset),
        *_changed_types(known, found, uses, preset),
        *_new_event_types(known, found, preset),
        *_vanished_event_types(known, found, preset),
    ]
    return Drift(tuple(sorted(items, key=lambda item: -_BY_SEVERITY.index(item.severity))))


def drift_of(known: KnownSchemas, arrival: str, preset: Preset) -> Drift:
    """Compare what a loaded arrival showed with what was known before it."""
    return compare(known.before(arrival), known.arrivals[arrival], preset)


def note_schema(
    connection: duckdb.DuckDBPyConnection,
    storage: Storage,
    arrival: str,
    preset: Preset,
    source: Source,
    kind: Kind,
) -> Drift:
    """Remember what a load shows and return how it differs from what was known before its arrival.

    To be called once the rows are judged and the load is not refused; doing it twice changes
    nothing, so a kill between here and the writing of events heals.

    Args:
        connection: holds the canonical rows of the load in the table `accepted`.
        storage: its file `source_schema.json` is replaced.
        arrival: "history" or "YYYY-MM-DD".
        preset: tells which columns are read and which event types count.
        source: the raw files.
        kind: of the files.
    """
    known = read_schemas(storage).with_arrival(arrival, observe(connection, preset, source, kind))
    write_schemas(known, storage)
    return drift_of(known, arrival, preset)


@contextmanager
def naming_changed_columns(
    storage: Storage, arrival: str, preset: Preset, source: Source, kind: Kind
) -> Iterator[None]:
    """Add to a refusal inside which columns are not as they were before: likely causes.

    Raises:
        PipelineError: the refusal.
    """
    try:
        yield
    except PipelineError as error:
        found = SourceSchema(kind, shown_columns(source, kind), event_types=None)
        known = read_schemas(storage).with_arrival(arrival, found)
        changes = [
            f"Not as in the load before: {item.change} '{item.name}', {item.details}."
            for item in drift_of(known, arrival, preset).items[:_MAX_NAMED]
        ]
        if not changes:
            raise
        raise PipelineError("\n".join([str(error.args[0]), *changes]), error.way_out) from None


def _uses(columns: Columns) -> _Uses:
    """Return the canonical columns that are made of each source column."""
    uses: _Uses = {}
    for canonical in Columns.model_fields:
        for name in source_columns(getattr(columns, canonical)):
            uses[name] = (*uses.get(name, ()), canonical)
    return uses


def _other_kind(known: SourceSchema, found: SourceSchema) -> Iterator[DriftItem]:
    """Report that files are written in another format; their types are then not compared."""
    if known.kind != found.kind:
        outcome = "rows keep their event ids as long as values are written alike"
        details = f"{known.kind} before"
        yield DriftItem("other kind of files", found.kind, details, outcome, Severity.REPORTED)


def _new_columns(
    known: SourceSchema, found: SourceSchema, uses: _Uses, preset: Preset
) -> Iterator[DriftItem]:
    """Report columns that no load before had."""
    for name in sorted(set(found.columns) - set(known.ever_seen)):
        outcome = _taken(uses[name]) if name in uses else _NOT_READ
        outcome += _new_ids(preset, "if it has a value here")
        details = found.columns[name] or "no type shown"
        yield DriftItem("new column", name, details, outcome, Severity.REPORTED)


def _vanished_columns(
    known: SourceSchema, found: SourceSchema, uses: _Uses, preset: Preset
) -> Iterator[DriftItem]:
    """Report columns that the load before had; one that the preset reads must not go."""
    for name in sorted(set(known.columns) - set(found.columns)):
        details = f"{known.columns[name] or 'no type shown'} before"
        outcome, severity = _NOT_READ + _new_ids(preset, "if it had a value"), Severity.REPORTED
        if name in uses:
            outcome, severity = _taken(uses[name]), Severity.BLOCKING
        yield DriftItem("vanished column", name, details, outcome, severity)


def _changed_types(
    known: SourceSchema, found: SourceSchema, uses: _Uses, preset: Preset
) -> Iterator[DriftItem]:
    """Report columns of another type; where both files show types."""
    before = known.ever_seen
    for name in sorted(set(before) & set(found.columns)):
        old, new = before[name], found.columns[name]
        if old is None or new is None or is_same_type(old, new):
            continue
        outcome, severity = _type_outcome(old, new, uses.get(name, ()))
        if not keeps_writing(old, new):
            outcome += _new_ids(preset, "unless its value is written alike")
        yield DriftItem("changed type", name, f"{old} → {new}", outcome, severity)


def _type_outcome(old: str, new: str, uses: tuple[str, ...]) -> tuple[str, Severity]:
    """Return what becomes of a column of another type."""
    if not uses:
        return _NOT_READ, Severity.REPORTED
    is_text = not TEXT_COLUMNS.isdisjoint(uses)
    if keeps_values(old, new, is_text=is_text):
        is_read = not is_text and new in {TEXT, INTEGER_TEXTS}
        return _READ_AS_BEFORE if is_read else "its values mean the same", Severity.REPORTED
    outcome = "the same thing may be written in another way now" if is_text else _QUARANTINED
    return f"{_taken(uses)}; {outcome}", Severity.WARNED


def _new_event_types(
    known: SourceSchema, found: SourceSchema, preset: Preset
) -> Iterator[DriftItem]:
    """Report event types that no load before had, most frequent first."""
    if known.event_types is None or found.event_types is None:
        return
    total = sum(found.event_types.values())
    for name, count in sorted(found.event_types.items(), key=lambda pair: (-pair[1], pair[0])):
        if name in known.event_types:
            continue
        is_ignored = name in preset.ignored_event_types
        outcome = (
            "no token: the preset ignores it" if is_ignored else "UNK until the next pretraining"
        )
        details = f"{count:,} of {total:,} events ({count / total:.1%})"
        yield DriftItem("new event type", name, details, outcome, Severity.REPORTED)


def _vanished_event_types(
    known: SourceSchema, found: SourceSchema, preset: Preset
) -> Iterator[DriftItem]:
    """Report event types of which events were to be expected, but none came."""
    if known.event_types is None or found.event_types is None:
        return
    past, total = sum(known.event_types.values()), sum(found.event_types.values())
    tasks = preset.tasks
    counting = {*(tasks.qualifying_event_types or ()), *(tasks.propensity_event_types or ())}
    for name, count in sorted(known.event_types.items(), key=lambda pair: (-pair[1], pair[0])):
        if name in found.event_types or count * total < MIN_EXPECTED * past:
            continue
        details = f"{count / past:.1%} of past events, none of {total:,}"
        if name in counting:
            outcome = "the preset's tasks count it: their labels see nobody do it now"
            yield DriftItem("vanished event type", name, details, outcome, Severity.WARNED)
        else:
            outcome = "its token stays known"
            yield DriftItem("vanished event type", name, details, outcome, Severity.REPORTED)


def _new_ids(preset: Preset, condition: str) -> str:
    """Say when a row gets another id: where the source gives none, it is a hash of the row."""
    return "" if preset.columns.event_id else f"{_NEW_IDS} {condition}"


def _taken(uses: tuple[str, ...]) -> str:
    """Say what the preset takes from a column."""
    return f"the preset takes {', '.join(uses)} from it"
