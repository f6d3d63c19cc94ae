"""Candidates in, versions live, and back: each step is one rename of `versions.json`.

What services read follows from that file in a fixed order: Feast's registry is built aside and
renamed, then the pointer that nightly embeddings follow. A kill between the two leaves readers on
a whole version, old or new; whoever opens the store next completes the rest (`settle`). Nothing is
embedded or written anew: both versions' tables are there.
"""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from behavior_pipeline.encoder.live import CANDIDATE, LIVE, UNTRAINED, point_to, pointed_to
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.feature_store.exclusive import exclusive
from behavior_pipeline.feature_store.partition import OFFLINE_FILE
from behavior_pipeline.feature_store.published import PublishedView, read_published
from behavior_pipeline.feature_store.repository import apply_definitions, offline_folder
from behavior_pipeline.feature_store.retirement import retire
from behavior_pipeline.feature_store.versions import (
    VERSIONED,
    Version,
    Versions,
    read_versions,
    versions_file,
    write_versions,
)
from behavior_pipeline.storage import Storage, make_private_folder


def enlist(
    storage: Storage, checkpoint_id: str, untrained_id: str | None, now: datetime
) -> Version:
    """Make a checkpoint the candidate, with a version of its own; return the version.

    Enlisting the same checkpoint again keeps its version and forgets what its gates found. Another
    candidate is set aside. Versions that nobody can return to any more go (`retirement.py`).

    Raises:
        PipelineError: if the checkpoint is live, or was before and can be returned to.
    """
    with exclusive(storage):
        versions = read_versions(storage)
        live = versions.live_version.checkpoint_id
        _check_new(versions, checkpoint_id)
        version = replace(
            _version_for(versions, checkpoint_id, now), untrained_id=untrained_id,
            aligned_to=live, gates={},
        )  # fmt: skip
        versions = _with_live_control(storage, versions).with_version(version)
        write_versions(storage, replace(versions, candidate=version.number))
    retire(storage)
    return version


def _check_new(versions: Versions, checkpoint_id: str) -> None:
    """Refuse a checkpoint that is live, or was and can be returned to."""
    for number in (versions.live, *versions.earlier):
        if versions.known[number].checkpoint_id == checkpoint_id:
            raise PipelineError(
                f"The checkpoint {checkpoint_id} is version {number} already, which is "
                f"{versions.state_of(number)}.",
                "Train another one, or return to it with `behavior-pipeline rollback`.",
            )


def _with_live_control(storage: Storage, versions: Versions) -> Versions:
    """Record the live version's control, to which a rollback returns."""
    control = versions.live_version.untrained_id or pointed_to(storage.checkpoints, UNTRAINED)
    return versions.with_version(replace(versions.live_version, untrained_id=control))


def _version_for(versions: Versions, checkpoint_id: str, now: datetime) -> Version:
    """Return the version that a checkpoint has, or a new one."""
    for version in versions.known.values():
        if version.checkpoint_id == checkpoint_id:
            return version
    return Version(
        max(versions.known) + 1, checkpoint_id, created_at=now.astimezone(UTC).isoformat()
    )


def record_gates(storage: Storage, gates: dict[str, dict[str, Any]]) -> Version:
    """Add what gates found to the candidate's record; return the candidate.

    Args:
        storage: the home.
        gates: by name; `passed` says whether the candidate may go on.

    Raises:
        PipelineError: if there is no candidate.
    """
    with exclusive(storage):
        versions = read_versions(storage)
        version = versions.candidate_version
        version = replace(version, gates=version.gates | gates)
        write_versions(storage, versions.with_version(version))
    return version


def promote(storage: Storage, needed: tuple[str, ...], now: datetime) -> Versions:
    """Let services read the candidate from now on.

    Args:
        storage: the home.
        needed: names of the gates that it must have passed.
        now: recorded.

    Raises:
        PipelineError: if there is no candidate, a gate held it back or was never asked, or it is
            not published as far as the live version is.
    """
    with exclusive(storage):
        versions = read_versions(storage)
        version = versions.candidate_version
        _check_gates(version, needed)
        _check_fresh(storage, versions, version)
        _share_history(storage, versions.live, version.number)
        promoted = replace(version, promoted_at=now.astimezone(UTC).isoformat())
        after = replace(
            versions.with_version(promoted),
            live=version.number,
            earlier=(*versions.earlier, versions.live),
            candidate=None,
        )
        write_versions(storage, after)
    settle(storage)
    return after


def rollback(storage: Storage) -> Versions:
    """Let services read the version that was live before; the one they leave is set aside.

    Raises:
        PipelineError: if there is none, or its tables are gone.
    """
    with exclusive(storage):
        versions = read_versions(storage)
        if not versions.earlier or versions.earlier[-1] not in versions.known:
            raise PipelineError(
                "There is no earlier version to return to.", "See `behavior-pipeline versions`."
            )
        _share_history(storage, versions.live, versions.earlier[-1])
        after = replace(versions, live=versions.earlier[-1], earlier=versions.earlier[:-1])
        write_versions(storage, after)
    settle(storage)
    return after


def settle(storage: Storage) -> None:
    """Make Feast's registry and the pointers agree with `versions.json`, if they do not yet."""
    if not versions_file(storage).exists() and not read_published(storage):
        return  # nothing was ever published
    apply_definitions(storage)
    versions = read_versions(storage)
    live = versions.live_version
    if live.checkpoint_id is None:
        return
    _point(storage, LIVE, live.checkpoint_id)
    if live.untrained_id is not None:
        _point(storage, UNTRAINED, live.untrained_id)
    if (
        versions.candidate is None
        and pointed_to(storage.checkpoints, CANDIDATE) == live.checkpoint_id
    ):
        (storage.checkpoints / f"{CANDIDATE}.json").unlink(missing_ok=True)


def _point(storage: Storage, role: str, checkpoint_id: str) -> None:
    """Replace a pointer if it says something else."""
    if pointed_to(storage.checkpoints, role) != checkpoint_id:
        point_to(storage.checkpoints, role, checkpoint_id)


def _check_gates(version: Version, needed: tuple[str, ...]) -> None:
    """Refuse a candidate that a gate held back, or never looked at."""
    if failed := version.failed_gates:
        notes = "; ".join(f"{name}: {version.gates[name]['note']}" for name in failed)
        raise PipelineError(
            f"Version {version.number} is held back by {', '.join(failed)} ({notes}).",
            "Train another checkpoint, or mend what the gate found and run "
            "`behavior-pipeline candidate` again.",
        )
    if missing := [name for name in needed if name not in version.gates]:
        raise PipelineError(
            f"Version {version.number} has not been through {', '.join(missing)}.",
            "Run `behavior-pipeline candidate` first.",
        )


def _check_fresh(storage: Storage, versions: Versions, version: Version) -> None:
    """Refuse a candidate that lacks a view, or whose values are older than those it replaces."""
    live = read_published(storage, versions.live)
    candidate = read_published(storage, version.number)
    for view in VERSIONED:
        old, new = live.get(view), candidate.get(view, PublishedView())
        if old is None:
            continue
        if not new.is_online_complete or (new.online_cutoff or "") < (old.online_cutoff or ""):
            raise PipelineError(
                f"Version {version.number} has {view} of {new.online_cutoff or 'no cutoff'}; "
                f"the live one has {old.online_cutoff}.",
                f"Run `behavior-pipeline candidate --cutoff {old.online_cutoff}` first.",
            )


def _share_history(storage: Storage, left: int, entered: int) -> None:
    """Give a version that goes live the history of the one that it follows.

    What was served then is what joins must find then: partitions are linked, not copied, under
    the number of the version that wrote them. Where both have a cutoff, the newer writing wins.
    """
    for view in VERSIONED:
        source, target = (offline_folder(storage, view, number) for number in (left, entered))
        for path in sorted(source.glob("cutoff=*/*.parquet")):
            name = f"v{left}.parquet" if path.name == OFFLINE_FILE else path.name
            if name != f"v{entered}.parquet":
                _link(path, make_private_folder(target / path.parent.name) / name)


def _link(path: Path, target: Path) -> None:
    """Give a file a second name, replacing what bears it."""
    aside = target.with_name(f".{target.name}.{os.getpid()}-link.aside")
    aside.unlink(missing_ok=True)
    os.link(path, aside)
    aside.replace(target)
