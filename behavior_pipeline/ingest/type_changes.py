"""Which changes of a column's type keep its values: rules on DuckDB's names of types."""

from __future__ import annotations

import re
from typing import Final

TEXT: Final = "VARCHAR"
INTEGER_TEXTS: Final = "VARCHAR of integers"
"""A text column whose every value is written as a column of integers would write it."""

_INTEGERS: Final = {
    name: (is_signed, bits)
    for is_signed, prefix in ((True, ""), (False, "U"))
    for name, bits in {
        f"{prefix}TINYINT": 8, f"{prefix}SMALLINT": 16, f"{prefix}INTEGER": 32,
        f"{prefix}BIGINT": 64, f"{prefix}HUGEINT": 128,
    }.items()
}  # fmt: skip
_FLOATS: Final = {"FLOAT": (24, 0), "DOUBLE": (53, 1)}  # bits of an exact integer, rank
_TIMES: Final = ("DATE", "TIMESTAMP_S", "TIMESTAMP_MS", "TIMESTAMP", "TIMESTAMP_NS")
_DECIMAL: Final = re.compile(r"DECIMAL\((\d+),(\d+)\)")
_LIST: Final = "[]"


def is_same_type(old: str | None, new: str | None) -> bool:
    """Tell whether there is nothing to report; a type that is not shown (None) cannot differ."""
    return old is None or new is None or _plain(old) == _plain(new)


def keeps_values(old: str, new: str, *, is_text: bool) -> bool:
    """Tell whether every value of the old type means the same in the new one.

    Args:
        old: type before.
        new: type now, INTEGER_TEXTS included.
        is_text: whether the value is used as it is written, as an id is: then only integers keep
            it, as integers, as floats that hold them exactly (`7.0` is read as `7`) and as text
            in which nothing but integers was seen. Of a number or a time that is text now, what
            cannot be read goes to quarantine, so nothing changes in silence.
    """
    if is_text and old.removesuffix(_LIST) not in _INTEGERS:
        return is_same_type(old, new)
    if new in {TEXT, INTEGER_TEXTS}:
        return not is_text or new == INTEGER_TEXTS
    if old.endswith(_LIST) and new.endswith(_LIST):
        return keeps_values(old.removesuffix(_LIST), new.removesuffix(_LIST), is_text=is_text)
    return (
        is_same_type(old, new)
        or _is_wider_number(old, new)
        or _is_wider_decimal(old, new)
        or (old in _TIMES and new in _TIMES and _TIMES.index(old) < _TIMES.index(new))
    )


def keeps_writing(old: str, new: str) -> bool:
    """Tell whether the same value is written with the same characters, so that hashes stay."""
    if old in _INTEGERS:
        return new in _INTEGERS or new == INTEGER_TEXTS
    return is_same_type(old, new)


def _plain(type_: str) -> str:
    """Return a type as DuckDB names it."""
    return TEXT if type_ == INTEGER_TEXTS else type_


def _is_wider_number(old: str, new: str) -> bool:
    """Tell whether a number fits exactly into another type of numbers."""
    if old in _FLOATS:
        return new in _FLOATS and _FLOATS[new][1] > _FLOATS[old][1]
    if old not in _INTEGERS:
        return False
    was_signed, old_bits = _INTEGERS[old]
    if new in _FLOATS:
        return old_bits <= _FLOATS[new][0]
    if new not in _INTEGERS:
        return False
    is_signed, new_bits = _INTEGERS[new]
    if was_signed == is_signed:
        return new_bits >= old_bits
    return is_signed and new_bits > old_bits


def _is_wider_decimal(old: str, new: str) -> bool:
    """Tell whether a decimal has room for all digits of another, before and after the point."""
    narrow, wide = _DECIMAL.fullmatch(old), _DECIMAL.fullmatch(new)
    if narrow is None or wide is None:
        return False
    old_digits, old_scale = (int(number) for number in narrow.groups())
    new_digits, new_scale = (int(number) for number in wide.groups())
    return new_scale >= old_scale and new_digits - new_scale >= old_digits - old_scale
