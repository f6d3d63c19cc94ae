from __future__ import annotations

import duckdb
import pytest
from hypothesis import given
from hypothesis import strategies as st

from behavior_pipeline.ingest.type_changes import (
    INTEGER_TEXTS,
    is_same_type,
    keeps_values,
    keeps_writing,
)

KEPT = [
    ("INTEGER", "BIGINT"), ("UTINYINT", "SMALLINT"), ("UINTEGER", "UBIGINT"),
    ("FLOAT", "DOUBLE"), ("INTEGER", "DOUBLE"), ("SMALLINT", "FLOAT"),
    ("DATE", "TIMESTAMP"), ("TIMESTAMP_MS", "TIMESTAMP"), ("DECIMAL(5,2)", "DECIMAL(7,3)"),
    ("SMALLINT[]", "INTEGER[]"), ("DOUBLE", "VARCHAR"), ("TIMESTAMP", "VARCHAR"),
]  # fmt: skip
NOT_KEPT = [
    ("BIGINT", "INTEGER"), ("BIGINT", "UBIGINT"), ("UBIGINT", "BIGINT"), ("BIGINT", "DOUBLE"),
    ("DOUBLE", "FLOAT"), ("INTEGER", "FLOAT"), ("DOUBLE", "BIGINT"), ("TIMESTAMP", "DATE"),
    ("TIMESTAMP", "TIMESTAMP WITH TIME ZONE"), ("DECIMAL(5,2)", "DECIMAL(6,4)"),
    ("VARCHAR", "BIGINT"), ("VARCHAR", "DATE"), ("BOOLEAN", "BIGINT"), ("INTEGER", "INTEGER[]"),
]  # fmt: skip
WRITTEN = [("INTEGER", "BIGINT"), ("INTEGER", "DOUBLE"), ("BIGINT", INTEGER_TEXTS)]
SIGNED = ["TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT"]
NUMBERS = [*SIGNED, *(f"U{name}" for name in SIGNED), "FLOAT", "DOUBLE"]


@pytest.mark.parametrize(("old", "new"), KEPT)
def test_a_wider_type_keeps_the_values(old: str, new: str) -> None:
    assert keeps_values(old, new, is_text=False)
    assert not is_same_type(old, new)


@pytest.mark.parametrize(("old", "new"), NOT_KEPT)
def test_another_type_does_not(old: str, new: str) -> None:
    assert not keeps_values(old, new, is_text=False)
    assert not keeps_values(old, new, is_text=True)


@pytest.mark.parametrize(("old", "new"), [*KEPT, *WRITTEN, ("BIGINT", "VARCHAR")])
def test_what_is_used_as_it_is_written_keeps_only_integers(old: str, new: str) -> None:
    is_integer = old.removesuffix("[]") in NUMBERS[:10]
    assert keeps_values(old, new, is_text=True) == (is_integer and new != "VARCHAR")


@given(old=st.sampled_from(NUMBERS), new=st.sampled_from(NUMBERS), exponent=st.integers(0, 127))
def test_a_number_that_is_kept_comes_back_from_the_wider_type(
    old: str, new: str, exponent: int
) -> None:
    if not keeps_values(old, new, is_text=False):
        return
    number = 2**exponent - 1
    query = (
        f"SELECT TRY_CAST({number} AS {old}), "
        f"TRY_CAST(TRY_CAST(TRY_CAST({number} AS {old}) AS {new}) AS {old})"
    )
    ((before, after),) = duckdb.sql(query).fetchall()
    assert before == after


def test_only_integers_are_written_alike_in_another_type() -> None:
    assert keeps_writing("INTEGER", "BIGINT")
    assert keeps_writing("BIGINT", INTEGER_TEXTS)
    assert keeps_writing("VARCHAR", INTEGER_TEXTS)
    assert not keeps_writing("DATE", "TIMESTAMP")
    assert not keeps_writing("FLOAT", "DOUBLE")
    assert not keeps_writing("BIGINT", "VARCHAR")


def test_what_shows_no_type_cannot_differ() -> None:
    assert is_same_type(None, "BIGINT")
    assert is_same_type("BIGINT", None)
    assert is_same_type("VARCHAR", INTEGER_TEXTS)
