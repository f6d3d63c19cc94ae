"""Which rows break the contract, and why: the first rule that a row breaks is its reason."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final

from behavior_pipeline.contracts import COLD_START_USER
from behavior_pipeline.ingest.mapping import (
    NO_TEXT,
    Sources,
    codes_value,
    content_text,
    deletion_value,
    is_given,
    number_value,
    source_columns,
    text_value,
    time_value,
)
from behavior_pipeline.ingest.presets import Columns
from behavior_pipeline.sql import quote_text

NOT_AN_OBJECT: Final = "line is not a JSON object"
NO_USER: Final = "user_id is null or empty"
NO_EVENT_TYPE: Final = "event_type is null or empty"
NO_TIME: Final = "occurred_at is null"
BAD_TIME: Final = "occurred_at cannot be read as a time"
BAD_AMOUNT: Final = "amount is not a number"
BAD_CODES: Final = "codes is not a list of small integers"
RESERVED_USER: Final = "user_id is reserved"
NO_EVENT_ID: Final = "event_id is null or empty"


@dataclass(frozen=True)
class Rule:
    """A way to break the contract.

    Attributes:
        reason: in words.
        column_name: source column at fault, or None.
        condition: SQL that is true for a row that breaks it; null counts as false.
    """

    reason: str
    column_name: str | None
    condition: str


def judged_rows(columns: Columns, sources: Sources, rows: str) -> str:
    """Return SQL of canonical rows with `reason` and `column_name`, null for a good row.

    Beside the canonical columns (without `ingested_at`) stand `is_deleted`, true for a tombstone,
    and the columns of the relation. A tombstone needs nothing but its id.
    """
    checks = rules(columns, sources)
    reason = _first_broken(checks, [rule.reason for rule in checks])
    column_name = _first_broken(checks, [rule.column_name for rule in checks])
    mapped = ", ".join(f"{value} AS {name}" for name, value in _values(columns, sources).items())
    return (
        f"SELECT *, {reason} AS reason, {column_name} AS column_name "
        f"FROM (SELECT *, {mapped} FROM ({rows}))"
    )


def rules(columns: Columns, sources: Sources) -> list[Rule]:
    """Return every rule, in the order in which a row is judged."""
    content = _content_rules(columns, sources)
    if columns.is_deleted is not None:
        content = [
            replace(rule, condition=f"NOT is_deleted AND ({rule.condition})") for rule in content
        ]
    rules = [Rule(NOT_AN_OBJECT, None, "is_broken"), *content]
    if columns.event_id is not None:
        condition = "coalesce(event_id, '') = ''"
        rules.append(Rule(NO_EVENT_ID, _column(columns, "event_id"), condition))
    return rules


def _content_rules(columns: Columns, sources: Sources) -> list[Rule]:
    """Return the rules for what an event must say."""
    time = columns.occurred_at.column
    return [
        Rule(NO_USER, _column(columns, "user_id"), "coalesce(user_id, '') = ''"),
        Rule(NO_EVENT_TYPE, _column(columns, "event_type"), "coalesce(event_type, '') = ''"),
        Rule(NO_TIME, time, f"NOT {is_given(time, sources)}"),
        Rule(BAD_TIME, time, "occurred_at IS NULL"),
        *_clock_rules(columns),
        *_amount_rules(columns, sources),
        Rule(
            RESERVED_USER, _column(columns, "user_id"), f"user_id = {quote_text(COLD_START_USER)}"
        ),
        *_codes_rules(columns, sources),
    ]


def _values(columns: Columns, sources: Sources) -> dict[str, str]:
    """Return SQL for every canonical column but `ingested_at`."""
    texts = ("user_id", "event_type", "item_id", "category", "location", "context")
    values = {name: text_value(getattr(columns, name), sources) for name in texts}
    values["occurred_at"] = time_value(columns.occurred_at, sources)
    values["amount"] = number_value(columns.amount, sources).value
    values["codes"] = codes_value(columns.codes, sources)
    values["is_deleted"] = deletion_value(columns.is_deleted, sources)
    is_given_id = columns.event_id is not None
    values["event_id"] = (
        text_value(columns.event_id, sources) if is_given_id else f"md5({content_text(sources)})"
    )
    return values


def _column(columns: Columns, canonical: str) -> str | None:
    """Return the source columns of a canonical column, as people read them."""
    return ", ".join(source_columns(getattr(columns, canonical))) or None


def _clock_rules(columns: Columns) -> list[Rule]:
    """Return the rules against broken clocks."""
    mapping, rules = columns.occurred_at, []
    if mapping.earliest:
        rules.append(_clock_rule(mapping.column, "before", "<", mapping.earliest))
    if mapping.latest:
        rules.append(_clock_rule(mapping.column, "at or after", ">=", mapping.latest))
    return rules


def _clock_rule(column: str, words: str, operator: str, bound: datetime) -> Rule:
    """Return the rule for one side of `[earliest, latest)`."""
    limit = bound.isoformat()
    condition = f"occurred_at {operator} TIMESTAMPTZ {quote_text(limit)}"
    return Rule(f"occurred_at is {words} {limit}", column, condition)


def _amount_rules(columns: Columns, sources: Sources) -> list[Rule]:
    """Return a rule per source column of the amount, so that the one at fault is named."""
    faults = number_value(columns.amount, sources).faults
    return [Rule(BAD_AMOUNT, name or None, condition) for name, condition in faults]


def _codes_rules(columns: Columns, sources: Sources) -> list[Rule]:
    """Return the rule for codes: all of them are small integers."""
    if columns.codes is None or columns.codes.column is None:
        return []
    name = columns.codes.column
    has_hole = "list_contains(list_transform(codes, code -> code IS NULL), true)"
    condition = f"{is_given(name, sources)} AND (codes IS NULL OR {has_hole})"
    return [Rule(BAD_CODES, name, condition)]


def _first_broken(checks: list[Rule], answers: list[str | None]) -> str:
    """Return SQL that answers for the first broken rule, and null where none is."""
    cases = " ".join(
        f"WHEN {rule.condition} THEN {quote_text(answer) if answer is not None else NO_TEXT}"
        for rule, answer in zip(checks, answers, strict=True)
    )
    return f"CASE {cases} END"
