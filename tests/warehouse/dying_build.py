"""A build that kills itself when one of its steps is called; tests start it as a program.

In a process that has threads, which a test's has by then, a fork may wait for ever.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from datetime import datetime
from itertools import count
from pathlib import Path

from night_builders import night_preset
from warehouse_builders import make_windows

from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage
from behavior_pipeline.warehouse import build as build_module
from behavior_pipeline.warehouse.workbench import Workbench


def main(
    home: str, settings: str, cutoff: str, step: str, model: str | None, time: int, share: float
) -> None:
    """Build the night of a cutoff until a step is called, of a model for the `time`-th time."""
    owner = Workbench if model else build_module
    original, times = getattr(owner, step), count(1)

    def dying(*arguments: object, **options: object) -> object:
        is_it = model is None or getattr(arguments[1], "name", "") == model
        if is_it and next(times) == time:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(owner, step, dying)
    build_module.MAX_TOUCHED_SHARE = share  # type: ignore[misc]
    windows = make_windows(datetime.fromisoformat(cutoff))
    settings_ = Settings.model_validate_json(settings)
    build_module.build_warehouse(Storage(Path(home)), settings_, night_preset(), windows)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
