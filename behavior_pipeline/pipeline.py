"""Settings, preset and storage of one source, opened together."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from behavior_pipeline.errors import PipelineError
from behavior_pipeline.ingest.arrivals import events_span
from behavior_pipeline.ingest.places.fetch import check_path
from behavior_pipeline.ingest.presets import Preset, load_preset
from behavior_pipeline.settings import Settings, load_settings
from behavior_pipeline.storage import Storage, make_private_folder
from behavior_pipeline.windows import EvaluationWindows, check_positive_windows, plan_evaluation

SIMULATED = "simulated"


@dataclass(frozen=True)
class Pipeline:
    """What every stage is given: how to work, what the source means, where things are.

    Attributes:
        settings: see settings.py.
        preset: the source's mapping and tasks, with the settings' windows applied.
        storage: the source's home.
    """

    settings: Settings
    preset: Preset
    storage: Storage

    @property
    def raw_path(self) -> str:
        """Where the raw events are: the settings' path, or what the simulator writes.

        Raises:
            PipelineError: if the source needs a path and has none.
        """
        if self.settings.path is not None:
            return self.settings.path
        if self.preset.name == SIMULATED:
            return str(self.storage.raw / SIMULATED)
        raise PipelineError(
            f"The source '{self.preset.name}' needs its raw events.",
            "Say where they are with --path, BEHAVIOR_PATH or `path:` in pipeline.yaml.",
        )

    def windows(self, cutoff: datetime) -> EvaluationWindows:
        """Plan train and test cutoffs of a night from the span of what has arrived."""
        span = events_span(self.storage)
        tasks = self.preset.tasks
        return plan_evaluation(
            cutoff, span.first_event_at, span.known_through, tasks.horizon_days, tasks.lookback_days
        )


def open_pipeline(**overrides: Any) -> Pipeline:
    """Open the pipeline of the source that the settings name.

    Args:
        overrides: settings that win over `pipeline.yaml` and the environment.

    Raises:
        PipelineError: if a setting, the preset or the path is not valid, or the home cannot be
            made.
    """
    settings = load_settings(**overrides)
    if settings.path is not None:
        check_path(settings.path)  # before a run's record, a log or a message shows it
    preset = _with_windows(load_preset(settings.source), settings)
    home = settings.data_root.absolute() / preset.name
    try:
        make_private_folder(home)
    except OSError as error:
        raise PipelineError(
            f"The folder '{home}' cannot be made: {error.strerror}.",
            "Choose another place with --data-root, BEHAVIOR_DATA_ROOT or `data_root:`.",
        ) from None
    return Pipeline(settings, preset, Storage(home))


def _with_windows(preset: Preset, settings: Settings) -> Preset:
    """Return the preset with the settings' horizon and lookback where they are given."""
    given = {"horizon_days": settings.horizon_days, "lookback_days": settings.lookback_days}
    update = {name: days for name, days in given.items() if days is not None}
    tasks = preset.tasks.model_copy(update=update)
    check_positive_windows(tasks.horizon_days, tasks.lookback_days)
    return preset.model_copy(update={"tasks": tasks})
