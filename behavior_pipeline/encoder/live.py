"""Which checkpoint nightly embeddings use: one small pointer file, replaced in one rename."""

from __future__ import annotations

from pathlib import Path

from behavior_pipeline.errors import PipelineError
from behavior_pipeline.storage import read_json, write_json

LIVE = "live"
UNTRAINED = "untrained"


def point_to(checkpoints_folder: Path, role: str, checkpoint_id: str) -> None:
    """Let a role (`live`, or the control `untrained`) mean a checkpoint from now on."""
    write_json(checkpoints_folder / f"{role}.json", {"checkpoint_id": checkpoint_id})


def checkpoint_folder(checkpoints_folder: Path, role: str = LIVE) -> Path:
    """Return the folder of the checkpoint that a role means now.

    Raises:
        PipelineError: if nothing has been trained yet.
    """
    pointer = checkpoints_folder / f"{role}.json"
    if not pointer.exists():
        raise PipelineError(
            f"There is no {role} checkpoint in {checkpoints_folder} yet.",
            "Run `behavior-pipeline pretrain` (or the job `pretraining`) first.",
        )
    return checkpoints_folder / str(read_json(pointer)["checkpoint_id"])
