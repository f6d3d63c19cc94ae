"""How well our sessions agree with sessions that somebody else gave to the same events.

Our rule is that of `int_event_gaps` and `int_session_starts`: of a user's events, in the order of
`occurred_at` and `event_id`, one begins a session where the gap before it is longer than the
session gap. Both sides are partitions of the same events, so all that is compared follows from
their contingency table: how many events lie in session i of ours and in session j of theirs.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

import duckdb

from behavior_pipeline.contracts import CANONICAL_EVENTS
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.ingest.files import find_files
from behavior_pipeline.ingest.mapping import check_columns, text_value
from behavior_pipeline.ingest.presets import ColumnMapping, Columns, Preset
from behavior_pipeline.ingest.readers import open_source
from behavior_pipeline.ingest.sources import MALFORMED_LINES, Source, unreadable
from behavior_pipeline.ingest.validation import judged_rows
from behavior_pipeline.progress import Report, report_nothing
from behavior_pipeline.settings import Settings
from behavior_pipeline.sql import open_engine
from behavior_pipeline.storage import Storage, aside_of, make_private_folder
from behavior_pipeline.studies.session_figures import (
    QUANTILES,
    Agreement,
    SessionStudy,
    TheirSessions,
)

MAX_GAP_MINUTES: Final = 60 * 24 * 365
_MICROSECONDS_PER_MINUTE: Final = 60_000_000
_NOT_OF_THE_ROW: Final = {"event_id", "ingested_at", "user_bucket"}
_GAPS_WAY_OUT: Final = "Give minutes as whole numbers above 0, such as --gaps 20,30,60."


def parse_gaps(text: str) -> tuple[int, ...]:
    """Return minutes from a list such as "10,30,60": ascending, each once.

    Raises:
        PipelineError: naming what is no whole number of minutes above 0.
    """
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        is_number = part.isascii() and part.isdigit() and len(part) <= len(str(MAX_GAP_MINUTES))
        if not (is_number and 0 < int(part) <= MAX_GAP_MINUTES):
            raise PipelineError(f"'{part}' in --gaps is no session gap in minutes.", _GAPS_WAY_OUT)
    return tuple(sorted({int(part) for part in parts}))


def compare_sessions(
    preset: Preset,
    path: str,
    session_column: str,
    gaps: Sequence[int],
    storage: Storage,
    settings: Settings,
    report: Report = report_nothing,
) -> SessionStudy:
    """Compare our sessions, under each gap, with those in a column of the source.

    Args:
        preset: maps the source's columns; rows that break its contract are left out.
        path: a file, a folder or a glob.
        session_column: column of the source; events where it is empty are not compared.
        gaps: session gaps in minutes, ascending.
        storage: its scratch folder takes what does not fit into memory; nothing else is written.
        settings: memory and threads.
        report: told of reading and of each gap.

    Raises:
        PipelineError: if there is nothing to read, a column is missing, or no event has a session.
    """
    found = find_files(path)
    engine = open_engine(settings.memory_limit, settings.threads, storage.scratch)
    with engine as connection, _workspace(storage.scratch) as workspace:
        report(0, len(gaps) + 1, "reading")
        try:
            source = open_source(connection, found, workspace)
            check_columns(preset.columns, source.columns, source.path)
            _check_session_column(session_column, source)
            _stage(connection, preset.columns, source, session_column)
        except (duckdb.IOException, duckdb.InvalidInputException) as error:
            raise unreadable(found.path, error) from None
        counts = _counts(connection, source)
        if not counts["num_events"]:
            raise PipelineError(
                f"No event of '{source.path}' has a value in '{session_column}'.",
                "Name the column that holds the given sessions with --session-column.",
            )
        agreements = []
        for done, gap in enumerate(gaps, start=1):
            report(done, len(gaps) + 1, f"gap of {gap} minutes")
            agreements.append(_agreement(connection, gap))
        theirs = _their_sessions(connection)
        report(len(gaps) + 1, len(gaps) + 1, "done")
    return SessionStudy(
        source=preset.name,
        session_column=session_column,
        preset_gap_seconds=preset.session_gap_seconds,
        theirs=theirs,
        agreements=tuple(agreements),
        **counts,
    )


@contextmanager
def _workspace(scratch: Path) -> Iterator[Path]:
    """Yield a folder for mended copies of files, and remove it."""
    folder = make_private_folder(aside_of(scratch / "study"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_session_column(name: str, source: Source) -> None:
    """Refuse a column that the source does not have."""
    if name in source.columns:
        return
    close = get_close_matches(name, list(source.columns), n=1, cutoff=0.5)
    hint = f"Did you mean '{close[0]}'? " if close else ""
    raise PipelineError(
        f"'{source.path}' has no column '{name}'.\nIts columns are: {', '.join(source.columns)}.",
        f"{hint}Name the column that holds the given sessions with --session-column.",
    )


def _stage(
    connection: duckdb.DuckDBPyConnection, columns: Columns, source: Source, session_column: str
) -> None:
    """Make the tables `judged` (every row), and `events` (accepted ones, in numbers only)."""
    session = text_value(ColumnMapping(column=session_column), source.columns)
    others = [name for name in CANONICAL_EVENTS.schema.names if name not in _NOT_OF_THE_ROW]
    order = ", ".join(others)  # keeps the row that loading keeps
    repeat = (
        f"reason IS NULL AND row_number() OVER (PARTITION BY reason, event_id ORDER BY {order}) > 1"
        if columns.event_id
        else "false"  # an id made of the row: identical rows are events of their own
    )
    connection.execute(
        "CREATE TEMP TABLE judged AS SELECT user_id, event_id, reason, "
        f"nullif({session}, '') AS session, epoch_us(occurred_at) AS occurred_us, "
        f"{repeat} AS is_repeat FROM ({judged_rows(columns, source.columns, source.plain_rows)})"
    )
    connection.execute(_EVENTS)


_EVENTS: Final = """
    CREATE TEMP TABLE events AS
    WITH accepted AS (FROM judged WHERE reason IS NULL AND NOT is_repeat),
    users AS (
        SELECT user_id, row_number() OVER () AS user_number
        FROM (SELECT DISTINCT user_id FROM accepted)
    ),
    sessions AS (
        SELECT session, row_number() OVER () AS theirs
        FROM (SELECT DISTINCT session FROM accepted WHERE session IS NOT NULL)
    )
    SELECT
        user_number, theirs, occurred_us,
        occurred_us - lag(occurred_us) OVER history AS gap_us,
        lag(theirs) OVER history AS previous_theirs
    FROM accepted JOIN users USING (user_id) LEFT JOIN sessions USING (session)
    WINDOW history AS (PARTITION BY user_number ORDER BY occurred_us, event_id)
"""

# Events of a user at one instant are peers in the running count, and so in one session, whichever
# of them stands first. `theirs` may hold users of several sessions of ours, hence user and number.
_SIZED_CELLS: Final = """
    WITH numbered AS (
        SELECT
            user_number, theirs,
            count(*) FILTER (gap_us > $gap_us)
                OVER (PARTITION BY user_number ORDER BY occurred_us) AS ours
        FROM events
    ),
    cells AS (
        SELECT user_number, ours, theirs, count(*) AS num_both
        FROM numbered WHERE theirs IS NOT NULL
        GROUP BY user_number, ours, theirs
    ),
    sized AS (
        SELECT
            num_both,
            sum(num_both) OVER our_session AS size_of_ours,
            count(*) OVER our_session AS num_theirs_in_ours,
            row_number() OVER our_session AS place_in_ours,
            sum(num_both) OVER their_session AS size_of_theirs,
            count(*) OVER their_session AS num_ours_in_theirs,
            row_number() OVER their_session AS place_in_theirs
        FROM cells
        WINDOW
            our_session AS (PARTITION BY user_number, ours),
            their_session AS (PARTITION BY theirs)
    )
    SELECT
        sum(num_both) AS num_events,
        count(*) FILTER (place_in_ours = 1) AS num_ours,
        count(*) FILTER (place_in_theirs = 1) AS num_theirs,
        count(*) FILTER (num_both = size_of_ours AND num_both = size_of_theirs) AS num_exact,
        coalesce(sum(num_both) FILTER (num_ours_in_theirs > 1), 0) AS num_split_events,
        coalesce(sum(num_both) FILTER (num_theirs_in_ours > 1), 0) AS num_merged_events,
        sum(num_both * (num_both - 1) // 2) AS num_pairs,
        sum(num_both * (size_of_ours - 1)) // 2 AS num_our_pairs,
        sum(num_both * (size_of_theirs - 1)) // 2 AS num_their_pairs
    FROM sized
"""

_PLACES: Final = """
    SELECT
        count(*) FILTER (previous_theirs <> theirs AND gap_us <= $gap_us) AS num_missed_boundaries,
        count(*) FILTER (previous_theirs = theirs AND gap_us > $gap_us) AS num_cut_gaps
    FROM events
"""


def _agreement(connection: duckdb.DuckDBPyConnection, gap: int) -> Agreement:
    """Count what the two partitions share under a gap in minutes."""
    values = {"gap_us": gap * _MICROSECONDS_PER_MINUTE}
    counts = _fetch(connection, _SIZED_CELLS, values) | _fetch(connection, _PLACES, values)
    return Agreement(gap_minutes=gap, **{name: int(count) for name, count in counts.items()})


def _counts(connection: duckdb.DuckDBPyConnection, source: Source) -> dict[str, Any]:
    """Count the rows of every fate; they add up to the rows read."""
    reasons = connection.execute(
        "SELECT reason, count(*) FROM "
        f"(SELECT reason FROM judged UNION ALL SELECT reason FROM {MALFORMED_LINES}) "
        "WHERE reason IS NOT NULL GROUP BY reason ORDER BY reason"
    ).fetchall()
    counts = _fetch(
        connection,
        "SELECT count(*) FILTER (theirs IS NULL) AS num_without_session, "
        "count(theirs) AS num_events, "
        "count(DISTINCT user_number) FILTER (theirs IS NOT NULL) AS num_users FROM events",
    )
    repeated = _fetch(connection, "SELECT count(*) FILTER (is_repeat) AS num_repeated FROM judged")
    num_read = source.num_rows + source.num_malformed
    num_fates = sum(count for _, count in reasons) + repeated["num_repeated"]
    if num_fates + counts["num_events"] + counts["num_without_session"] != num_read:
        raise AssertionError(f"of {num_read} rows read, some have no fate or two: {counts}")
    return {"num_read": num_read, "reasons": dict(reasons), **repeated, **counts}


def _their_sessions(connection: duckdb.DuckDBPyConnection) -> TheirSessions:
    """Describe the given sessions."""
    spans = _fetch(connection, _SPANS)
    inside = _gaps(connection, "previous_theirs = theirs")
    between = _gaps(connection, "previous_theirs <> theirs")
    return TheirSessions(
        num_boundaries=between["num_gaps"],
        num_gaps_inside=inside["num_gaps"],
        minutes_inside=_minutes(inside),
        minutes_between=_minutes(between),
        **spans,
    )


_SPANS: Final = """
    WITH spans AS (
        SELECT
            theirs, user_number, min(occurred_us) AS begin_us, max(occurred_us) AS end_us,
            count(*) OVER (PARTITION BY theirs) AS num_users
        FROM events WHERE theirs IS NOT NULL GROUP BY theirs, user_number
    ),
    ordered AS (
        SELECT
            theirs, num_users,
            begin_us < max(end_us) OVER (
                PARTITION BY user_number ORDER BY begin_us, end_us, theirs
                ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
            ) AS is_overlapping
        FROM spans
    )
    SELECT
        count(DISTINCT theirs) FILTER (num_users > 1) AS num_several_users,
        count(DISTINCT theirs) FILTER (is_overlapping) AS num_overlapping
    FROM ordered
"""


def _gaps(connection: duckdb.DuckDBPyConnection, condition: str) -> dict[str, Any]:
    """Return the number of gaps under a condition and their quantiles in microseconds."""
    return _fetch(
        connection,
        f"SELECT count(*) AS num_gaps, quantile_disc(gap_us, {list(QUANTILES)}) AS quantiles "
        f"FROM events WHERE {condition}",
    )


def _minutes(gaps: Mapping[str, Any]) -> tuple[float, ...]:
    """Return quantiles in minutes."""
    return tuple(value / _MICROSECONDS_PER_MINUTE for value in gaps["quantiles"] or [])


def _fetch(
    connection: duckdb.DuckDBPyConnection, query: str, values: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the one row that a query answers, by column."""
    answer = connection.execute(query, values)
    names = [column[0] for column in answer.description or []]
    ((*row,),) = answer.fetchall()
    return dict(zip(names, row, strict=True))
