"""Every location on disk, in one place, and the one way to write: aside, then rename.

A home holds one source. Everything below it is either complete or absent: a kill at any moment
leaves the old state or the new one.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

PRIVATE_FOLDER = 0o700
PRIVATE_FILE = 0o600

CHANGES_FOLDER = "_changes"
"""Below a night's embeddings; readers of Parquet folders pass over such a name."""


@dataclass(frozen=True)
class Storage:
    """The folders and files of one source's home.

    A checkpoint that is not live yet works in a lane of its own: what depends on the checkpoint
    lies below `candidates/<checkpoint id>/`, what does not is the home's.

    Attributes:
        home: the folder that holds everything, `<data root>/<source name>`.
        lane: the candidate's checkpoint id; empty for the live checkpoint.
    """

    home: Path
    lane: str = ""

    def of_candidate(self, checkpoint_id: str) -> Storage:
        """Return the storage in which a candidate works."""
        return replace(self, lane=checkpoint_id)

    @property
    def lane_folder(self) -> Path:
        """Where what depends on the checkpoint lies."""
        return self.home / "candidates" / self.lane if self.lane else self.home

    @property
    def raw(self) -> Path:
        """Raw files that the simulator wrote."""
        return self.home / "raw"

    @property
    def events(self) -> Path:
        """Canonical events: `events/arrival=<key>/load=<id>/`; `load.json` names what counts."""
        return self.home / "events"

    @property
    def quarantine(self) -> Path:
        """Rejected rows with the reason: `quarantine/arrival=<key>/load=<id>/*.parquet`."""
        return self.home / "quarantine"

    @property
    def source_schema(self) -> Path:
        """What the source showed in each arrival: columns, types, event types."""
        return self.home / "source_schema.json"

    @property
    def warehouse(self) -> Path:
        """The DuckDB file that dbt builds; analysts never open it."""
        return self.home / "warehouse.duckdb"

    @property
    def analytics(self) -> Path:
        """The DuckDB file that analysts open; replaced in one rename."""
        return self.home / "analytics.duckdb"

    @property
    def replaced_analytics(self) -> Path:
        """Second names of replaced `analytics.duckdb` files that somebody still has open."""
        return self.home / "replaced_analytics"

    @property
    def scratch(self) -> Path:
        """Spill files and folders under construction; safe to delete when nothing runs."""
        return self.home / "scratch"

    @property
    def vocabulary(self) -> Path:
        """The vocabulary that the next checkpoint is trained with."""
        return self.home / "vocabulary"

    @property
    def training_sequences(self) -> Path:
        """Sequences up to `trained_through`, which pretraining reads."""
        return self.home / "sequences" / "training"

    @property
    def checkpoints(self) -> Path:
        """One folder per checkpoint id."""
        return self.home / "checkpoints"

    @property
    def training_curves(self) -> Path:
        """TensorBoard event files of trainings, if tensorboard is installed."""
        return self.home / "training_curves"

    @property
    def live_checkpoint(self) -> Path:
        """The pointer to the checkpoint that nightly embeddings use: `{"checkpoint_id": …}`."""
        return self.checkpoints / "live.json"

    @property
    def feature_store(self) -> Path:
        """Feast's registry, its online store and the offline Parquet files."""
        return self.home / "feature_store"

    @property
    def ledgers(self) -> Path:
        """What the online store holds of each user, version by version."""
        return self.feature_store / "ledgers"

    def alignment(self, checkpoint_id: str) -> Path:
        """The map that takes a checkpoint's vectors into the space of the one before it."""
        return self.home / "alignments" / f"{checkpoint_id}.safetensors"

    def marts(self, cutoff: datetime) -> Path:
        """Marts that belong to a cutoff: `user_rfm.parquet`, `labels.parquet` and so on."""
        return self.home / "marts" / cutoff_folder(cutoff)

    @property
    def events_sessionized(self) -> Path:
        """All events with gaps and sessions, in Parquet: see layers.py."""
        return self.home / "marts" / "events_sessionized"

    def sequences(self, cutoff: datetime) -> Path:
        """Token sequences as of a cutoff: `bucket=<k>.parquet`."""
        return self.lane_folder / "sequences" / cutoff_folder(cutoff)

    def states(self, cutoff: datetime) -> Path:
        """Users' states after their last event before the cutoff: `bucket=<k>.parquet`."""
        return self.lane_folder / "states" / cutoff_folder(cutoff)

    def embeddings(self, cutoff: datetime) -> Path:
        """Embeddings of the live checkpoint at a cutoff: `bucket=<k>.parquet`."""
        return self.lane_folder / "embeddings" / cutoff_folder(cutoff)

    def changes(self, cutoff: datetime) -> Path:
        """What a night has to publish anew; inside its embeddings, and renamed with them."""
        return self.embeddings(cutoff) / CHANGES_FOLDER

    def control_embeddings(self, cutoff: datetime) -> Path:
        """Embeddings of an untrained encoder at a cutoff: the control of every comparison."""
        return self.home / "controls" / "untrained" / cutoff_folder(cutoff)

    def control_states(self, cutoff: datetime) -> Path:
        """States behind `control_embeddings`."""
        return self.home / "controls" / "untrained_states" / cutoff_folder(cutoff)

    def predictions(self, cutoff: datetime) -> Path:
        """Calibrated scores of every user at a cutoff: `predictions.parquet`."""
        return self.lane_folder / "predictions" / cutoff_folder(cutoff)

    def segments(self, cutoff: datetime) -> Path:
        """Every user's segment at a cutoff: `segments.parquet` and `profiles.json`."""
        return self.lane_folder / "segments" / cutoff_folder(cutoff)

    def similar_users(self, cutoff: datetime) -> Path:
        """Every user's nearest neighbours at a cutoff: `similar_users.parquet`, and their index."""
        return self.all_similar_users / cutoff_folder(cutoff)

    @property
    def all_similar_users(self) -> Path:
        """Similar users of every cutoff, a folder each."""
        return self.lane_folder / "similar_users"

    @property
    def drift(self) -> Path:
        """Figures of drift, `cutoff=<date>/<checkpoint id>.json`, and the bins of RFM."""
        return self.lane_folder / "drift"

    def reports(self, cutoff: datetime) -> Path:
        """`comparison.json` and `report.html` of a night."""
        return self.home / "reports" / f"{cutoff:%Y-%m-%d}"


def cutoff_folder(cutoff: datetime) -> str:
    """Return the Hive-style folder name of a cutoff, `cutoff=2011-11-09`."""
    return f"cutoff={cutoff:%Y-%m-%d}"


def make_private_folder(folder: Path) -> Path:
    """Make a folder, readable by its owner alone, with its parents; return it."""
    folder.mkdir(parents=True, exist_ok=True, mode=PRIVATE_FOLDER)
    return folder


def aside_of(target: Path) -> Path:
    """Return an unused hidden name beside the target, which says whose it is.

    `remove_leftovers` removes what bears such a name once the process that made it is gone.
    """
    return target.with_name(f".{target.name}.{os.getpid()}-{uuid4().hex[:8]}.aside")


@contextmanager
def writing_file(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`; on success rename it into place, else remove it."""
    make_private_folder(target.parent)
    aside = aside_of(target)
    try:
        yield aside
        aside.chmod(PRIVATE_FILE)
        _flush_to_disk(aside)
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def writing_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `target`; on success swap it in, else remove it.

    A folder cannot be renamed over a full one, so the old one steps aside first: a kill between
    the two renames leaves no folder under the name, which every reader treats as "not built yet".
    """
    make_private_folder(target.parent)
    aside = make_private_folder(aside_of(target))
    old = aside_of(target)
    try:
        yield aside
        if target.exists():
            target.rename(old)
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def remove_leftovers(home: Path) -> int:
    """Remove what killed processes left under construction; return how many things went."""
    found = sorted(home.rglob(".*.aside")) if home.exists() else []
    leftovers = [path for path in found if path.exists() and not _is_being_written(path)]
    for path in leftovers:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return len(leftovers)


def _is_being_written(aside: Path) -> bool:
    """Tell whether the process that made a temporary name still lives."""
    pid = aside.name.rsplit(".", 2)[-2].split("-")[0]
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return int(pid) != os.getpid()


@contextmanager
def working_alone(storage: Storage) -> Iterator[None]:
    """Wait until nobody else changes the home's events or warehouse, and keep others out.

    Between threads and processes; the lock goes with the process, however it ends.
    """
    make_private_folder(storage.home)
    with (storage.home / ".writer.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def write_json(target: Path, content: Any) -> None:
    """Write JSON with sorted keys, atomically."""
    with writing_file(target) as aside:
        aside.write_text(json.dumps(content, indent=2, sort_keys=True, default=str) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text())


def _flush_to_disk(path: Path) -> None:
    """Make sure that a rename never outlives the content it points to."""
    with path.open("rb") as handle:
        os.fsync(handle.fileno())
