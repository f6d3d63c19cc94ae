"""The variables that tie the dbt project to one source, one machine and one night."""

from __future__ import annotations

import glob
from datetime import datetime

from behavior_pipeline.ingest.presets import Preset
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage
from behavior_pipeline.windows import EvaluationWindows


def task_variables(
    settings: Settings, preset: Preset, windows: EvaluationWindows
) -> dict[str, object]:
    """Return the variables that the models' SQL depends on, the same every night."""
    tasks = preset.tasks
    return {
        "session_gap_seconds": preset.session_gap_seconds,
        "qualifying_event_types": _listed(tasks.qualifying_event_types),
        "propensity_event_types": _listed(tasks.propensity_event_types),
        "propensity_column": tasks.propensity_column,
        "horizon_days": windows.horizon.days,
        "lookback_days": windows.lookback.days,
        "num_targets": settings.num_targets,
    }


def dbt_variables(
    settings: Settings, preset: Preset, storage: Storage, windows: EvaluationWindows
) -> dict[str, object]:
    """Return every variable of `dbt_sql/dbt_project.yml`, for dbt to run alone.

    `warehouse_path` is left out. Cutoffs are written `YYYY-MM-DD 00:00:00+00`.

    Raises:
        ValueError: if a cutoff is no midnight in UTC. The models count by UTC days, which says
            exactly what is before a cutoff only where the cutoff begins a day.
    """
    arrivals = f"{glob.escape(str(storage.events.absolute()))}/arrival=*"
    return task_variables(settings, preset, windows) | {
        "loads_glob": f"{arrivals}/load.json",
        "events_glob": f"{arrivals}/load=*/events*.parquet",
        "versions_glob": f"{arrivals}/load=*/versions.parquet",
        "memory_limit": settings.memory_limit,
        "threads": settings.threads,
        "temp_directory": str(storage.scratch.absolute() / "spill"),
        "observation_cutoffs": [written_cutoff(cutoff) for cutoff in windows.cutoffs],
        "train_cutoff": written_cutoff(windows.train_cutoff),
    }


def _listed(values: tuple[str, ...] | None) -> list[str] | None:
    """Return a list, which JSON knows, or None for every value."""
    return None if values is None else list(values)


def written_cutoff(cutoff: datetime) -> str:
    """Write a cutoff as the models read it.

    Raises:
        ValueError: if it is no midnight in UTC.
    """
    offset = cutoff.utcoffset()
    if offset is None or offset.total_seconds() or cutoff.time().isoformat() != "00:00:00":
        raise ValueError(f"A cutoff must be a midnight in UTC, not {cutoff.isoformat()}")
    return f"{cutoff:%Y-%m-%d} 00:00:00+00"
