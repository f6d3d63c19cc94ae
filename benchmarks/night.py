"""Makes a night's arrival for some users of a simulated history, as a landing folder holds it."""

from __future__ import annotations

from pathlib import Path

import duckdb

from behavior_pipeline.sql import file_list, quote_text

_NEW_FROM = 2 * 10**18
_REPEATS_OF_TEN = 2
_CORRECTIONS_OF_TEN = 1
_LATE_OF_TEN = 2


def write_night(raw: Path, day: str, share: float, file: Path, seed: int) -> int:
    """Write one day's events of a share of the users to a raw Parquet file; return the users.

    Each such user's last ten events come again with new ids and times: most on the day itself, some
    late by up to 30 days; some come again as they were (repeats), some with another amount
    (corrections).

    Args:
        raw: folder of the simulated history.
        day: `YYYY-MM-DD` on which they arrive.
        share: share of the history's users, 0 to 1.
        file: raw Parquet file in the columns of the history.
        seed: chooses the users.
    """
    files = file_list(sorted(raw.glob("*.parquet")))
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        connection.execute(
            "CREATE TABLE chosen AS SELECT user_id FROM (SELECT DISTINCT user_id "
            f"FROM read_parquet({files}) WHERE user_id IS NOT NULL) "
            f"WHERE hash(user_id || {quote_text(str(seed))}) % 1000000 < {int(share * 1_000_000)}"
        )
        connection.execute(f"CREATE TABLE base AS {_last_ten(files)}")
        connection.execute(
            f"COPY ({_arrived(day)}) TO {quote_text(str(file))} (FORMAT parquet, COMPRESSION zstd)"
        )
        ((users,),) = connection.execute("SELECT count(*) FROM chosen").fetchall()
    return int(users)


def _last_ten(files: str) -> str:
    """Return SQL of each chosen user's last ten events, numbered."""
    return (
        "SELECT *, row_number() OVER (PARTITION BY user_id ORDER BY event_time, event_id) AS n "
        f"FROM read_parquet({files}) SEMI JOIN chosen USING (user_id) "
        "WHERE event_time IS NOT NULL AND event_type IS NOT NULL "
        "QUALIFY row_number() OVER (PARTITION BY user_id ORDER BY event_time DESC, event_id DESC)"
        " <= 10"
    )


def _arrived(day: str) -> str:
    """Return SQL of what arrives: a part as it was, a part corrected, the others new."""
    kept = _REPEATS_OF_TEN + _CORRECTIONS_OF_TEN
    late = f"n % 10 < {kept + _LATE_OF_TEN}"
    age = f"to_days(CASE WHEN {late} THEN 1 + CAST(hash(event_id) % 30 AS INTEGER) ELSE 0 END)"
    moved = (
        f"TIMESTAMPTZ '{day} 00:00:00+00' + (event_time - date_trunc('day', event_time)) - {age}"
    )
    return (
        f"SELECT * EXCLUDE n FROM base WHERE n % 10 < {_REPEATS_OF_TEN} UNION ALL "
        "SELECT * EXCLUDE n REPLACE (coalesce(amount, 0) + 1 AS amount) FROM base "
        f"WHERE n % 10 BETWEEN {_REPEATS_OF_TEN} AND {kept - 1} UNION ALL "
        f"SELECT * EXCLUDE n REPLACE ({_NEW_FROM} + event_id AS event_id, {moved} AS event_time) "
        f"FROM base WHERE n % 10 >= {kept}"
    )
