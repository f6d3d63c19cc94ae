"""Versions of what is published: which checkpoint is behind each, and which one is live.

A version is one checkpoint with its alignment. Each has online tables and a history of its own, so
that vectors of two checkpoints never lie beside one another. `versions.json` says which one is
live; it is replaced in one rename, and all else (Feast's registry, the pointer that nightly
embeddings follow) is made from it: see `promotion.py`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from behavior_pipeline.errors import PipelineError
from behavior_pipeline.storage import Storage, read_json, write_json

FIRST: Final = 1  # the version of a home's first checkpoint

VERSIONED: Final = ("user_embedding", "user_predictions", "user_segment", "similar_users")
"""Views whose values depend on the checkpoint: each version has its own."""


@dataclass(frozen=True)
class Version:
    """One checkpoint on its way through the feature store.

    Attributes:
        number: counts from 1; the `N` of Feast's `view@vN`.
        checkpoint_id: the encoder behind all its values; None until the first are published.
        untrained_id: the control with the same vocabulary; None for the home's first.
        aligned_to: the checkpoint into whose space its vectors are turned; None for the first.
        created_at: when it became a candidate, ISO 8601 in UTC.
        promoted_at: when it went live, likewise; None if it never did.
        gates: what each gate found, by its name; all must have passed before it may go live.
    """

    number: int
    checkpoint_id: str | None = None
    untrained_id: str | None = None
    aligned_to: str | None = None
    created_at: str | None = None
    promoted_at: str | None = None
    gates: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def failed_gates(self) -> list[str]:
        """Names of the gates that hold it back."""
        return [name for name, outcome in sorted(self.gates.items()) if not outcome["passed"]]


@dataclass(frozen=True)
class Versions:
    """All versions of a home.

    Attributes:
        live: number of the version that services read.
        earlier: versions that were live before it, the newest last: what a rollback returns to.
        candidate: the version that waits at the gates, if any.
        known: every version that the online store holds, by number.
    """

    live: int = FIRST
    earlier: tuple[int, ...] = ()
    candidate: int | None = None
    known: dict[int, Version] = field(default_factory=lambda: {FIRST: Version(FIRST)})

    @property
    def live_version(self) -> Version:
        """The version that services read."""
        return self.known[self.live]

    @property
    def candidate_version(self) -> Version:
        """The version that waits at the gates.

        Raises:
            PipelineError: if there is none.
        """
        if self.candidate is None:
            raise PipelineError(
                "There is no candidate.",
                "Run `behavior-pipeline pretrain` and then `behavior-pipeline candidate`.",
            )
        return self.known[self.candidate]

    def with_version(self, version: Version) -> Versions:
        """Return the versions with one of them added or replaced."""
        return replace(self, known=self.known | {version.number: version})

    def state_of(self, number: int) -> str:
        """Say in a word what a version is: live, candidate, earlier or set aside."""
        if number == self.live:
            return "live"
        if number == self.candidate:
            return "candidate"
        return "earlier" if number in self.earlier else "set aside"


def versions_file(storage: Storage) -> Path:
    """Return the file that says which version is live."""
    return storage.feature_store / "versions.json"


def read_versions(storage: Storage) -> Versions:
    """Return a home's versions; a home without the file has the first one alone."""
    path = versions_file(storage)
    if not path.exists():
        return Versions()
    content = read_json(path)
    return Versions(
        live=content["live"],
        earlier=tuple(content["earlier"]),
        candidate=content["candidate"],
        known={version["number"]: Version(**version) for version in content["known"]},
    )


def write_versions(storage: Storage, versions: Versions) -> None:
    """Replace the versions, atomically; the caller holds `exclusive(storage)`."""
    content = asdict(versions) | {
        "known": [asdict(version) for _, version in sorted(versions.known.items())]
    }
    write_json(versions_file(storage), content)


def record_checkpoint(storage: Storage, number: int, checkpoint_id: str) -> None:
    """Bind a version to the checkpoint of the first rows published under it.

    The caller holds `exclusive(storage)`.

    Raises:
        PipelineError: if the version holds another checkpoint's rows, or there is no such version.
    """
    versions = read_versions(storage)
    version = known_version(versions, number)
    if version.checkpoint_id is None:
        write_versions(
            storage, versions.with_version(replace(version, checkpoint_id=checkpoint_id))
        )
    elif version.checkpoint_id != checkpoint_id:
        raise PipelineError(
            f"Version {number} holds values of the checkpoint {version.checkpoint_id}; those of "
            f"{checkpoint_id} would mix with them.",
            "Bring the other checkpoint in as a candidate: `behavior-pipeline candidate`, then "
            "`behavior-pipeline promote`.",
        )


def known_version(versions: Versions, number: int) -> Version:
    """Return a version.

    Raises:
        PipelineError: if there is no such version.
    """
    if number not in versions.known:
        known = ", ".join(str(other) for other in sorted(versions.known))
        raise PipelineError(f"There is no version {number}.", f"Known versions: {known}.")
    return versions.known[number]
