"""The variables that tie the dbt project to one source, one machine and one night."""

from __future__ import annotations

import glob
from datetime import datetime

from behavior_pipeline.ingest.presets import Preset
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage
from behavior_pipeline.windows import EvaluationWindows


def dbt_variables(
    settings: Settings, preset: Preset, storage: Storage, windows: EvaluationWindows
) -> dict[str, object]:
    """Return every variable of `dbt_sql/dbt_project.yml`, apart from `warehouse_path`.

    Cutoffs are written `YYYY-MM-DD 00:00:00+00`.

    Raises:
        ValueError: if a cutoff is no midnight in UTC. The models count by UTC days, which says
            exactly what is before a cutoff only where the cutoff begins a day.
    """
    tasks = preset.tasks
    return {
        "events_glob": f"{glob.escape(str(storage.events.absolute()))}/arrival=*/*.parquet",
        "memory_limit": settings.memory_limit,
        "threads": settings.threads,
        "temp_directory": str(storage.scratch.absolute() / "spill"),
        "num_buckets": settings.num_buckets,
        "session_gap_seconds": preset.session_gap_seconds,
        "qualifying_event_types": _listed(tasks.qualifying_event_types),
        "propensity_event_types": _listed(tasks.propensity_event_types),
        "propensity_column": tasks.propensity_column,
        "observation_cutoffs": [_written(cutoff) for cutoff in windows.cutoffs],
        "train_cutoff": _written(windows.train_cutoff),
        "horizon_days": windows.horizon.days,
        "lookback_days": windows.lookback.days,
        "num_targets": settings.num_targets,
    }


def _listed(values: tuple[str, ...] | None) -> list[str] | None:
    """Return a list, which JSON knows, or None for every value."""
    return None if values is None else list(values)


def _written(cutoff: datetime) -> str:
    """Write a cutoff as the models read it."""
    offset = cutoff.utcoffset()
    if offset is None or offset.total_seconds() or cutoff.time().isoformat() != "00:00:00":
        raise ValueError(f"A cutoff must be a midnight in UTC, not {cutoff.isoformat()}")
    return f"{cutoff:%Y-%m-%d} 00:00:00+00"
