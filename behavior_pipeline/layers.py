"""Sessionized events on disk: a base, and layers that replace the users touched since.

    events_sessionized/
      current.json                  which base and layers count, replaced in one rename
      base=<id>/bucket=<kkk>.parquet    every user, by bucket
      layer=<id>/events.parquet         all events of the users that were rebuilt later
      layer=<id>/users.parquet          who they are, also those without an event left

A user's events are those of the newest layer that lists the user, or else of the base. Versions
count the builds, so that whoever made something of version v knows whom to make anew. Files are
never changed; those that nothing points to any more are removed a build later, so that a reader of
the version before is not disturbed.
"""

from __future__ import annotations

import shutil
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from behavior_pipeline.errors import PipelineError
from behavior_pipeline.sql import parquet
from behavior_pipeline.storage import read_json, write_json

CURRENT_FILE: Final = "current.json"
EVENTS_FILE: Final = "events.parquet"
USERS_FILE: Final = "users.parquet"


@dataclass(frozen=True)
class Layer:
    """A base or a layer: the name of its folder, and the version that it came with."""

    id: str
    version: int


@dataclass(frozen=True)
class Layers:
    """The version of the sessionized events that counts.

    Attributes:
        folder: `storage.events_sessionized`.
        base: every user as of its version.
        layers: users rebuilt since, from old to new.
        num_buckets: buckets of users that the base is split into.
    """

    folder: Path
    base: Layer
    layers: tuple[Layer, ...]
    num_buckets: int

    @property
    def version(self) -> int:
        """The newest version."""
        return self.layers[-1].version if self.layers else self.base.version

    def base_files(self, bucket: int | None = None) -> list[Path]:
        """Return the files of the base, of one bucket or of all."""
        pattern = "bucket=*.parquet" if bucket is None else bucket_file(bucket)
        return sorted((self.folder / f"base={self.base.id}").glob(pattern))

    def layer_folder(self, layer: Layer) -> Path:
        """Return the folder of a layer."""
        return self.folder / f"layer={layer.id}"

    def users_files(self, after_version: int) -> list[Path] | None:
        """Return who was rebuilt after a version; None if that may have been anybody."""
        if after_version < self.base.version:
            return None
        newer = [layer for layer in self.layers if layer.version > after_version]
        return [self.layer_folder(layer) / USERS_FILE for layer in newer]

    def parts(self, bucket: int | None = None) -> list[tuple[list[Path], list[Path]]]:
        """Return the base and each layer: files of events, and who is in later layers instead."""
        parts = [(self.base_files(bucket), self.users_files(self.base.version) or [])]
        for layer in self.layers:
            file = self.layer_folder(layer) / EVENTS_FILE
            parts.append(([file], self.users_files(layer.version) or []))
        return [part for part in parts if part[0]]

    def relation(self, bucket: int | None = None) -> str:
        """Return SQL of all events, each user's from where they count."""
        parts = []
        for files, later in self.parts(bucket):
            conditions = [] if bucket is None else [f"user_bucket = {int(bucket)}"]
            if later:
                conditions.append(f"user_id NOT IN (SELECT user_id FROM {parquet(later)})")
            where = f" WHERE {' AND '.join(conditions)}" if conditions else ""
            parts.append(f"(SELECT * FROM {parquet(files)}{where})")
        return " UNION ALL BY NAME ".join(parts)

    @property
    def folder_names(self) -> set[str]:
        """The names of the folders that this version needs."""
        return {f"base={self.base.id}"} | {f"layer={layer.id}" for layer in self.layers}

    @property
    def are_there(self) -> bool:
        """Whether all those folders are on disk."""
        return all((self.folder / name).is_dir() for name in self.folder_names)

    def document(self) -> dict[str, Any]:
        """Return everything but the folder, for JSON."""
        return {
            "base": asdict(self.base),
            "layers": [asdict(layer) for layer in self.layers],
            "num_buckets": self.num_buckets,
        }


def bucket_file(bucket: int) -> str:
    """Return the name of a bucket's file."""
    return f"bucket={bucket:03d}.parquet"


def layers_of(folder: Path, document: dict[str, Any]) -> Layers:
    """Return what `Layers.document` described."""
    return Layers(
        folder,
        Layer(**document["base"]),
        tuple(Layer(**layer) for layer in document["layers"]),
        document["num_buckets"],
    )


def read_layers(folder: Path) -> Layers:
    """Return the version that counts.

    Raises:
        PipelineError: if there are no sessionized events yet.
    """
    current = folder / CURRENT_FILE
    if not current.is_file():
        raise PipelineError(
            f"There are no sessionized events in {folder}.", "Build the warehouse first."
        )
    return layers_of(folder, read_json(current))


def point_to_layers(layers: Layers) -> None:
    """Let a version count from now on."""
    current = layers.folder / CURRENT_FILE
    if not current.is_file() or read_json(current) != layers.document():
        write_json(current, layers.document())


def remove_unused(
    layers: Layers, before: Layers | None, read: AbstractSet[str] = frozenset()
) -> None:
    """Remove folders that neither this version nor the one before it points to, nor a reader needs.

    The one before stays for a build, for those who are reading it.
    """
    used = layers.folder_names | (before.folder_names if before else set()) | read
    for folder in layers.folder.glob("*=*"):
        if folder.name not in used:
            shutil.rmtree(folder, ignore_errors=True)
