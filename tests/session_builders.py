"""Small logs with somebody's sessions in them, and the way to compare ours with those."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from behavior_pipeline.ingest.presets import Preset, parse_preset
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage
from behavior_pipeline.studies.session_agreement import compare_sessions
from behavior_pipeline.studies.session_figures import SessionStudy

START = datetime(2024, 1, 1, 23, 30, tzinfo=UTC)  # sessions run across midnight
PRESET = """
name: portal
description: Page views of the tests.
columns: {user_id: who, event_type: what, occurred_at: {column: at, latest: 2024-06-01}}
session_gap_seconds: 1800
tasks: {propensity_column: event_type, horizon_days: 3, lookback_days: 7}
"""


class View(NamedTuple):
    """A page view: who, minutes after the start (None for no time at all), their session."""

    user: str
    minute: float | None
    session: str | None


def views(user: str, minutes: Sequence[float], sessions: Sequence[str | None]) -> list[View]:
    return [View(user, *pair) for pair in zip(minutes, sessions, strict=True)]


def portal(*, has_ids: bool = False) -> Preset:
    text = PRESET.replace("{user_id", "{event_id: key, user_id") if has_ids else PRESET
    return parse_preset(text, "portal")


def write_views(file: Path, rows: Sequence[View], keys: Sequence[str] | None = None) -> Path:
    """Write a log."""
    times = [None if row.minute is None else START + timedelta(minutes=row.minute) for row in rows]
    columns = {
        "key": pa.array(keys or [str(number) for number in range(len(rows))], pa.string()),
        "who": pa.array([row.user for row in rows], pa.string()),
        "what": pa.array(["view"] * len(rows), pa.string()),
        "at": pa.array(times, pa.timestamp("us", tz="UTC")),
        "visit": pa.array([row.session for row in rows], pa.string()),
    }
    pq.write_table(pa.table(columns), file)
    return file


def compare(
    rows: Sequence[View], folder: Path, settings: Settings, gaps: Sequence[int] = (30,)
) -> SessionStudy:
    """Compare our sessions of a log with its column `visit`."""
    file = write_views(folder / "views.parquet", rows)
    return compare_sessions(
        portal(), str(file), "visit", gaps, Storage(folder / "portal"), settings
    )
