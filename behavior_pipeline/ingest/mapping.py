"""A preset's mapping as SQL: one expression per canonical column.

Only what a preset may say is written here, so a preset can never be read as SQL: column names
were replaced by `v0`, `v1`, … in the reader, constants are quoted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Final

from behavior_pipeline.errors import PipelineError
from behavior_pipeline.ingest.presets import ColumnMapping, Columns, DeletionMapping, TimeMapping
from behavior_pipeline.ingest.sources import SourceColumn
from behavior_pipeline.sql import quote_text

Sources = Mapping[str, SourceColumn]

NO_TEXT: Final = "NULL::VARCHAR"
_JOINT: Final = ":"
_MICROSECONDS: Final = {"seconds": 1_000_000, "milliseconds": 1_000, "microseconds": 1}
_FLOATS: Final = frozenset({"FLOAT", "DOUBLE"})
_NUMBERS: Final = _FLOATS | {
    "TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT",
    "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT", "UHUGEINT",
}  # fmt: skip
_EXACT_FLOAT: Final = 2**53  # floats hold every integer up to here
_MAX_SHOWN: Final = 30  # columns in a message: one screen
# What Python's datetime can hold, in microseconds since 1970: years 1 to 9999.
_FIRST_MICROSECOND: Final = -62_135_596_800_000_000
_LAST_MICROSECOND: Final = 253_402_300_799_999_999


@dataclass(frozen=True)
class Amount:
    """SQL of a number: its value (DOUBLE), and for each column whether it holds no number."""

    value: str
    faults: tuple[tuple[str, str], ...]


def check_columns(
    columns: Columns, sources: Sources, path: str, last_seen: Mapping[str, str] | None = None
) -> None:
    """Check that the source has every column that the preset names.

    Args:
        columns: the preset's mapping.
        sources: the columns that are there.
        path: names the source in messages.
        last_seen: the newest arrival that had a column, by column.

    Raises:
        PipelineError: naming the first missing column, the closest one that is there and, of a
            column that was there before, the arrival that had it and the columns that are new.
    """
    for canonical in Columns.model_fields:
        mapping = getattr(columns, canonical)
        for name in source_columns(mapping):
            if name in sources:
                continue
            if last_seen and name in last_seen:
                raise _vanished_column(canonical, name, sources, path, last_seen)
            raise _missing_column(canonical, name, sources, path)


def source_columns(
    mapping: ColumnMapping | TimeMapping | DeletionMapping | None,
) -> tuple[str, ...]:
    """Return the source columns that a mapping reads."""
    if isinstance(mapping, TimeMapping | DeletionMapping):
        return (mapping.column,)
    return mapping.source_columns if mapping else ()


def content_text(sources: Sources) -> str:
    """Return SQL for a row's content as one text, the same whatever the format of its file.

    Each value that is there stands as `name:bytes:text`, in the order of the names. The lengths
    keep unlike rows apart; null and empty values are left out, so that a column that a newer
    export adds without a value changes no row.
    """
    parts = []
    for name in sorted(sources):
        text = _plain_text(sources[name])
        parts.append(f"{quote_text(name + ':')} || strlen({text}) || ':' || {text}")
    return f"concat_ws(',', {', '.join(parts)})"


def text_value(mapping: ColumnMapping | None, sources: Sources) -> str:
    """Return SQL for a mapped text; empty is null, and an integral float has no `.0`."""
    if mapping is None:
        return NO_TEXT
    if mapping.constant is not None:
        text = quote_text(mapping.constant)
    elif mapping.product_of:
        text = f"{number_value(mapping, sources).value}::VARCHAR"
    elif mapping.join:
        text = f"nullif(concat_ws('{_JOINT}', {_texts(mapping.join, sources)}), '')"
    else:
        text = f"coalesce({_texts(mapping.source_columns, sources)})"
    return f"left({text}, {mapping.prefix})" if mapping.prefix else text


def number_value(mapping: ColumnMapping | None, sources: Sources) -> Amount:
    """Return SQL for a mapped number; of a product with a null factor it is null."""
    if mapping is None:
        return Amount("NULL::DOUBLE", ())
    if mapping.product_of:
        factors = [_number(sources[name]) for name in mapping.product_of]
        product = "(" + " * ".join(factors) + ")"
        faults = [(name, _number_fault(sources[name])) for name in mapping.product_of]
        return Amount(product, (*faults, (mapping.product_of[0], f"NOT isfinite({product})")))
    if mapping.column:
        source = sources[mapping.column]
        return Amount(_number(source), ((mapping.column, _number_fault(source)),))
    text = text_value(mapping, sources)
    value = f"TRY_CAST({text} AS DOUBLE)"
    fault = f"({text} IS NOT NULL AND ({value} IS NULL OR NOT isfinite({value})))"
    return Amount(value, (((source_columns(mapping) or ("",))[0], fault),))


def time_value(mapping: TimeMapping, sources: Sources) -> str:
    """Return SQL for a time as TIMESTAMPTZ; null where it is no time of the years 1 to 9999."""
    source = sources[mapping.column]
    if mapping.format is not None:
        given = (
            f"TRY_CAST(try_strptime({_text(source)}, {quote_text(mapping.format)}) AS TIMESTAMPTZ)"
        )
    elif mapping.unit != "timestamp":
        return _epoch_time(_number(source), _MICROSECONDS[mapping.unit])
    elif source.type.startswith(("TIMESTAMP", "DATE")):
        given = f"TRY_CAST({source.expression} AS TIMESTAMPTZ)"
    else:
        given = f"TRY_CAST({source.expression}::VARCHAR AS TIMESTAMPTZ)"
    return f"CASE WHEN {_is_in_calendar(given)} THEN {given} END"


def codes_value(mapping: ColumnMapping | None, sources: Sources) -> str:
    """Return SQL for a list of small integers, from a list or a text such as `[1, 2]`."""
    if mapping is None or mapping.column is None:
        return "NULL::SMALLINT[]"
    source = sources[mapping.column]
    value = source.expression if source.type.endswith("[]") else _text(source)
    return f"TRY_CAST({value} AS SMALLINT[])"


def deletion_value(mapping: DeletionMapping | None, sources: Sources) -> str:
    """Return SQL that tells a tombstone."""
    if mapping is None:
        return "false"
    values = ", ".join(quote_text(value.lower()) for value in mapping.values)
    return f"coalesce(lower({_text(sources[mapping.column])}) IN ({values}), false)"


def is_given(name: str, sources: Sources) -> str:
    """Return SQL that tells whether a source column has a value; an empty text is none."""
    return _is_given(sources[name])


def _texts(names: Iterable[str], sources: Sources) -> str:
    """Return the texts of some columns, separated by commas."""
    return ", ".join(_text(sources[name]) for name in names)


def _text(source: SourceColumn) -> str:
    """Return SQL for a column as text: `12346` for an integer in a column of floats.

    A column of texts is taken as it is: "1.0" may be a version.
    """
    value = source.expression
    if source.type in _FLOATS:
        is_integer = f"{value} = trunc({value}) AND abs({value}) <= {_EXACT_FLOAT}"
        return (
            f"CASE WHEN isnan({value}) THEN NULL WHEN {is_integer} "
            f"THEN {value}::BIGINT::VARCHAR ELSE {value}::VARCHAR END"
        )
    if source.type in _NUMBERS:
        return f"{value}::VARCHAR"
    return _plain_text(source)


def _plain_text(source: SourceColumn) -> str:
    """Return SQL for a value as DuckDB writes it; an empty text is null."""
    if source.type == "VARCHAR":
        return f"nullif({source.expression}, '')"
    return f"{source.expression}::VARCHAR"


def _is_given(source: SourceColumn) -> str:
    """Return SQL that tells whether there is a value; an empty text is none."""
    empty = " AND {0} <> ''" if source.type == "VARCHAR" else ""
    return f"({{0}} IS NOT NULL{empty})".format(source.expression)


def _number(source: SourceColumn) -> str:
    """Return SQL for a column as DOUBLE, null where it is no number."""
    if source.type in _NUMBERS or source.type.startswith("DECIMAL"):
        return f"{source.expression}::DOUBLE"
    return f"TRY_CAST({source.expression}::VARCHAR AS DOUBLE)"


def _number_fault(source: SourceColumn) -> str:
    """Return SQL that tells a value that is there but is no finite number."""
    number = _number(source)
    return f"({_is_given(source)} AND ({number} IS NULL OR NOT isfinite({number})))"


def _epoch_time(number: str, scale: int) -> str:
    """Return SQL for a count since 1970; a double holds microseconds of this era exactly."""
    micros = f"round({number} * {scale})"
    in_calendar = f"{micros} BETWEEN {_FIRST_MICROSECOND} AND {_LAST_MICROSECOND}"
    return f"CASE WHEN {in_calendar} THEN make_timestamp({micros}::BIGINT)::TIMESTAMPTZ END"


def _is_in_calendar(time: str) -> str:
    """Return SQL that tells a time of the years 1 to 9999, which also leaves out infinity."""
    first, last = "'0001-01-01 00:00:00+00'", "'9999-12-31 23:59:59.999999+00'"
    return f"{time} BETWEEN TIMESTAMPTZ {first} AND TIMESTAMPTZ {last}"


def _missing_column(canonical: str, name: str, sources: Sources, path: str) -> PipelineError:
    """Return the error for a column that the preset names but the source lacks."""
    return PipelineError(
        f"'{path}' has no column '{name}', from which the preset takes {canonical}.\n"
        f"Its columns are: {_shown(sources)}.",
        f"{_hint(name, sources)}Correct the preset's 'columns', or use the preset that fits this "
        "source.",
    )


def _vanished_column(
    canonical: str, name: str, sources: Sources, path: str, last_seen: Mapping[str, str]
) -> PipelineError:
    """Return the error for a column that the preset names and that the source had before."""
    new = [other for other in sources if other not in last_seen]
    news = f" New in it: {_shown(new)}." if new else ""
    return PipelineError(
        f"'{path}' has no column '{name}' any more, from which the preset takes {canonical}: the "
        f"arrival '{last_seen[name]}' still had it.\nIts columns are: {_shown(sources)}.{news}",
        f"{_hint(name, sources)}Ask for the column back, or correct the preset's 'columns'.",
    )


def _shown(names: Iterable[str]) -> str:
    """Return names for people, as many as fit on a screen."""
    listed = list(names)
    return ", ".join(listed[:_MAX_SHOWN]) + (", …" if len(listed) > _MAX_SHOWN else "")


def _hint(name: str, sources: Sources) -> str:
    """Return a question after the closest column, if there is one."""
    close = get_close_matches(name, list(sources), n=1, cutoff=0.5)
    return f"Did you mean '{close[0]}'? " if close else ""
