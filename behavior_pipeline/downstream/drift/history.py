"""The history of drift: a file per night and checkpoint, each written whole.

Measuring a night again replaces its file, nights may come in any order, and a verdict is never
stored: it follows from the files of its own night and of those before.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from behavior_pipeline.storage import Storage, cutoff_folder, read_json, write_json


@dataclass(frozen=True)
class NightFigures:
    """What was measured of one night; a figure that could not be is left out.

    Attributes:
        cutoff: the night's observation cutoff.
        checkpoint_id: encoder behind its embeddings.
        measured_at: when.
        previous_cutoff: the night that it was compared with, None for the first.
        previous_checkpoint_id: encoder behind the embeddings of that night.
        figures: by name, as in `figures.py`.
        event_counts: the night's arrivals by event type, None if that was not recorded.
        rfm: users by bin of each column of RFM, see `stability.py`.
    """

    cutoff: datetime
    checkpoint_id: str
    measured_at: datetime
    previous_cutoff: datetime | None = None
    previous_checkpoint_id: str | None = None
    figures: dict[str, float] = field(default_factory=dict)
    event_counts: dict[str, int] | None = None
    rfm: dict[str, list[int]] = field(default_factory=dict)

    @property
    def follows_its_eve(self) -> bool:
        """Whether it was compared with the night just before."""
        return self.previous_cutoff is not None and (self.cutoff - self.previous_cutoff).days == 1

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        times = {
            name: moment.isoformat() if moment else None
            for name, moment in asdict(self).items()
            if name in _TIMES
        }
        return asdict(self) | times

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> NightFigures:
        """Read what `to_json` returned."""
        times = {
            name: datetime.fromisoformat(content[name]) if content[name] else None
            for name in _TIMES
        }
        return cls(**(content | times))


_TIMES = ("cutoff", "measured_at", "previous_cutoff")


def row_path(storage: Storage, cutoff: datetime, checkpoint_id: str) -> Path:
    """Return where the figures of a night and checkpoint are."""
    return storage.drift / cutoff_folder(cutoff) / f"{checkpoint_id}.json"


def write_figures(storage: Storage, night: NightFigures) -> Path:
    """Write a night's figures in place of those that it had under the same checkpoint."""
    target = row_path(storage, night.cutoff, night.checkpoint_id)
    write_json(target, night.to_json())
    return target


def read_history(storage: Storage, through: datetime | None = None) -> list[NightFigures]:
    """Return the nights measured, in order, up to and with one.

    Of a night that was measured under several checkpoints, the one measured last counts: that is
    what the night was published with.
    """
    newest: dict[datetime, NightFigures] = {}
    for path in sorted(storage.drift.glob("cutoff=*/*.json")):
        night = NightFigures.from_json(read_json(path))
        other = newest.get(night.cutoff)
        if other is None or other.measured_at <= night.measured_at:
            newest[night.cutoff] = night
    nights = [newest[cutoff] for cutoff in sorted(newest)]
    return [night for night in nights if through is None or night.cutoff <= through]
