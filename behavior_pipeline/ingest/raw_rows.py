"""Whom a quarantined row names, as far as its raw text lets it be recognised."""

from __future__ import annotations

import json
import re
from typing import Any, Final

from behavior_pipeline.ingest.presets import ColumnMapping

SEPARATORS: Final = r"[\s,;|\"'{}\[\]():=]+"
"""What stands between the values of a line that is no row; the same for RE2 and for Python."""

_SEPARATOR: Final = re.compile(SEPARATORS)
_JOINT: Final = ":"


def users_named(mapping: ColumnMapping, raw_row: str | None) -> frozenset[str]:
    """Return the users that a raw row may name.

    Of a row that was read it is the mapped id; of a line that could not be read, every value in it:
    a line too many is removed rather than one too few.
    """
    try:
        content = json.loads(raw_row or "")
    except ValueError:
        content = None
    if not isinstance(content, dict):
        return frozenset(_SEPARATOR.split(raw_row or "")) - {""}
    return frozenset({_mapped(mapping, content)}) - {""}


def _mapped(mapping: ColumnMapping, content: dict[str, Any]) -> str:
    """Return the id that `mapping.text_value` makes of a row, empty if it has none."""
    if mapping.constant is not None:
        text = mapping.constant
    else:
        values = [_text(content.get(name)) for name in mapping.source_columns]
        given = [value for value in values if value]
        text = _JOINT.join(given) if mapping.join else next(iter(given), "")
    return text[: mapping.prefix] if mapping.prefix else text


def _text(value: Any) -> str:
    """Write a value as SQL does: an integral number has no `.0`."""
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)
