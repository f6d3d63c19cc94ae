"""The state of an unfinished training, in one safetensors file that is replaced in one rename.

The file's tensors are weights, optimizer, averages and best weights; its header carries the rest
as JSON: steps, and with them the place in the data, and history. There are no random states to
keep: every micro-batch seeds the random streams by its own number (`parallel.seed_for`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from behavior_pipeline.errors import PipelineError
from behavior_pipeline.storage import make_private_folder, writing_file

STATE_FILE: Final = ".unfinished-training.safetensors"
"""Name of the state in the folder of checkpoints."""

_LAYOUT: Final = 1
"""Counts up when states of an earlier version of this code cannot be read any more."""

_DIGEST_LENGTH: Final = 16
_FOOTER_BYTES: Final = 8  # at a Parquet file's end: length of its footer, and the magic


@dataclass(frozen=True)
class TrainingState:
    """What a training needs to go on.

    Attributes:
        tensors: by name.
        facts: JSON values by name.
    """

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]

    def below(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors whose names begin with a prefix, without it."""
        names = [name for name in self.tensors if name.startswith(prefix)]
        return {name.removeprefix(prefix): self.tensors[name] for name in names}


class StateFile:
    """Where the state of an unfinished training is, and of which training it is.

    Args:
        folder: the folder of checkpoints.
        training: what tells this training from others, as JSON values by name.
    """

    def __init__(self, folder: Path, training: Mapping[str, Any]) -> None:
        self.path = folder / STATE_FILE
        self.training = json.loads(json.dumps({"layout": _LAYOUT, **training}, default=str))

    @property
    def digest(self) -> str:
        """16 hex digits that tell this training from others."""
        content = json.dumps(self.training, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:_DIGEST_LENGTH]

    def write(self, state: TrainingState) -> None:
        """Replace the state on disk; a kill at any moment leaves the old one or the new one."""
        header = {"training": json.dumps(self.training), "facts": json.dumps(state.facts)}
        tensors = {name: value.detach().cpu().contiguous() for name, value in state.tensors.items()}
        make_private_folder(self.path.parent)
        with writing_file(self.path) as aside:
            save_file(_apart(tensors), aside, metadata=header)

    def read(self) -> TrainingState | None:
        """Return the state on disk; None if there is none.

        Raises:
            PipelineError: if it is that of another training, or no state at all.
        """
        header = self._header()
        if header is None:
            return None
        self.check()
        with safe_open(self.path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return TrainingState(tensors, header["facts"])

    def check(self) -> None:
        """Refuse the state on disk if it is not one of this training.

        Raises:
            PipelineError: saying in what the trainings differ.
        """
        header = self._header()
        if header is not None and (other := self._differences(header["training"])):
            raise PipelineError(
                f"{self.path} is the state of another training: {'; '.join(other)}.", _WAY_OUT
            )

    def is_own(self) -> bool:
        """Tell whether what is on disk, if anything, is a state of this training."""
        try:
            self.check()
        except PipelineError:
            return False
        return True

    def _header(self) -> dict[str, Any] | None:
        """Return the JSON in the state's header; None if there is no state."""
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                header = file.metadata()
            return {name: json.loads(header[name]) for name in ("training", "facts")}
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise PipelineError(f"{self.path} is no state of a training.", _WAY_OUT) from error

    def discard(self) -> None:
        """Remove the state, if there is one."""
        self.path.unlink(missing_ok=True)

    def _differences(self, training: Mapping[str, Any]) -> list[str]:
        """Say in words how the training of a state differs from this one."""
        names = sorted({*training, *self.training})
        return [
            f"{name} {training.get(name)}, not {self.training.get(name)}"
            for name in names
            if training.get(name) != self.training.get(name)
        ]


_WAY_OUT: Final = (
    "Start that training again with the same arguments, or discard its state with --fresh."
)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors no two of which share memory, as safetensors wants them."""
    seen: set[int] = set()
    apart: dict[str, Tensor] = {}
    for name, value in tensors.items():
        is_shared = value.data_ptr() in seen
        seen.add(value.data_ptr())
        apart[name] = value.clone() if is_shared else value
    return apart


def digest_of_files(files: Sequence[Path]) -> str:
    """Return 16 hex digits that tell sequence files apart: their names, sizes and footers.

    A Parquet footer holds the sizes and ranges of all columns of all row groups, so that the data
    themselves need not be read.
    """
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        digest.update(_footer(path))
    return digest.hexdigest()[:_DIGEST_LENGTH]


def digest_of_folder(folder: Path) -> str:
    """Return 16 hex digits of the content of a small folder's files."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        digest.update(f"{path.name}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:_DIGEST_LENGTH]


def _footer(path: Path) -> bytes:
    """Return a Parquet file's footer."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _FOOTER_BYTES))
        length = int.from_bytes(file.read(4), "little")
        file.seek(max(0, size - _FOOTER_BYTES - length))
        return file.read(length)
