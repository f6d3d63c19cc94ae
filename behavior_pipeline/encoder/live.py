"""Which checkpoint nightly embeddings use: one small pointer file, replaced in one rename."""

from __future__ import annotations

from pathlib import Path

from behavior_pipeline.errors import PipelineError
from behavior_pipeline.storage import read_json, write_json

LIVE = "live"
CANDIDATE = "candidate"
UNTRAINED = "untrained"


def point_to(checkpoints_folder: Path, role: str, checkpoint_id: str) -> None:
    """Let a role (`live`, `candidate` or the control `untrained`) mean a checkpoint from now on."""
    write_json(checkpoints_folder / f"{role}.json", {"checkpoint_id": checkpoint_id})


def pointed_to(checkpoints_folder: Path, role: str) -> str | None:
    """Return the checkpoint that a role means now; None if it means none."""
    pointer = checkpoints_folder / f"{role}.json"
    return str(read_json(pointer)["checkpoint_id"]) if pointer.exists() else None


def checkpoint_folder(checkpoints_folder: Path, role: str = LIVE) -> Path:
    """Return the folder of the checkpoint that a role means now.

    Raises:
        PipelineError: if nothing has been trained yet.
    """
    checkpoint_id = pointed_to(checkpoints_folder, role)
    if checkpoint_id is None:
        raise PipelineError(
            f"There is no {role} checkpoint in {checkpoints_folder} yet.",
            "Run `behavior-pipeline pretrain` (or the job `pretraining`) first.",
        )
    return checkpoints_folder / checkpoint_id
