"""Loads that would teach nothing are refused before anything is written."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import duckdb

from behavior_pipeline.errors import PipelineError
from behavior_pipeline.ingest.presets import Preset
from behavior_pipeline.ingest.sources import Source
from behavior_pipeline.settings import Settings
from behavior_pipeline.sql import parquet

_SHOWN_CHARACTERS = 80


def refuse_bad_load(
    connection: duckdb.DuckDBPyConnection,
    preset: Preset,
    source: Source,
    settings: Settings,
    day: date | None,
    is_bulk: bool,
) -> None:
    """Refuse a load whose staged rows show a wrong mapping or hold nothing to learn.

    The replay of a dump (`day` is given) is not judged by its share of bad rows: the dump was
    judged as a whole, and single days of it may well be bad.

    Raises:
        PipelineError: if too many rows are quarantined, or a bulk load has one event type.
    """
    if day is None:
        _refuse_many_bad_rows(connection, source, settings.max_quarantined_share)
    if is_bulk:
        _refuse_single_event_type(connection, preset, source)


def refuse_lost_history(
    connection: duckdb.DuckDBPyConnection, known: list[Path], path: str
) -> None:
    """Refuse a history that lacks events of the one it would replace.

    Files that landed once and were cleared away since are no reason to forget what they held.

    Raises:
        PipelineError: with the number of events that would be lost.
    """
    if not known:
        return
    row = connection.execute(
        f"SELECT count(*) FROM {parquet(known)} AS known ANTI JOIN "
        "(SELECT event_id FROM stored UNION ALL FROM deletions) USING (event_id)"
    ).fetchone()
    if row is not None and row[0]:
        raise PipelineError(
            f"{row[0]:,} events that were loaded before are not in '{path}' any more; loading it "
            "would lose them.",
            "Give a path that has them all, use `nightly` for new days, or another --data-root.",
        )


def _refuse_many_bad_rows(
    connection: duckdb.DuckDBPyConnection, source: Source, max_share: float
) -> None:
    """Refuse a load in which most rows break the contract, naming the most frequent reason."""
    num_read = source.num_rows + source.num_malformed
    worst = connection.execute(
        "SELECT reason, count(*), (SELECT count(*) FROM quarantined) FROM quarantined "
        "GROUP BY reason ORDER BY count(*) DESC, reason LIMIT 1"
    ).fetchone()
    if worst is None or worst[2] <= max_share * num_read:
        return
    reason, num_worst, num_bad = worst
    raise PipelineError(
        f"{num_bad:,} of {num_read:,} rows of '{source.path}' break the contract, which is more "
        f"than {max_share:.0%}.\nIn {num_worst:,} of them {reason}; "
        f"{_first_offender(connection, reason)}",
        "Correct the preset's 'columns' or the file. If the rows are really that bad, raise "
        "max_quarantined_share.",
    )


def _first_offender(connection: duckdb.DuckDBPyConnection, reason: str) -> str:
    """Describe the first row with a reason: file, row, column and value."""
    (row,) = connection.execute(
        "SELECT source_file, row_number, column_name, raw_row FROM quarantined WHERE reason = ? "
        "ORDER BY source_file, row_number LIMIT 1",
        [reason],
    ).fetchall()
    file, number, column, raw = row
    place = f"the first is row {number} of '{file}'"
    if column is None:
        return f"{place}: {_shorten(raw)}."
    content = json.loads(raw)
    values = ", ".join(f"'{name}' holds {_shown(content, name)}" for name in column.split(", "))
    return f"{place}, where column {values}."


def _shown(content: dict[str, object], name: str) -> str:
    """Return a value as people read it."""
    value = content.get(name)
    return "nothing" if value in (None, "") else _shorten(f"'{value}'")


def _shorten(text: str) -> str:
    """Cut a text so that a message stays on one screen."""
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"


def _refuse_single_event_type(
    connection: duckdb.DuckDBPyConnection, preset: Preset, source: Source
) -> None:
    """Refuse a history in which every event is the same."""
    types = connection.execute("SELECT DISTINCT event_type FROM accepted LIMIT 2").fetchall()
    if len(types) == 1:
        names = ", ".join(preset.columns.event_type.source_columns) or "a constant"
        raise PipelineError(
            f"Every event of '{source.path}' is a '{types[0][0]}' (event_type is taken from "
            f"{names}): there is nothing to learn.",
            "Map event_type to a column with several values, or join a second column to it.",
        )
