"""The rigid motion that takes a new checkpoint's vectors into the space of the one before it.

Two trainings give spaces that differ by a rotation and more: whatever was fitted on the old vectors
reads nonsense from the new ones. Among rotations (and reflections) with shifts, the one that brings
the vectors of the users whom both know closest together is the orthogonal Procrustes solution
(Schönemann, "A generalized solution of the orthogonal Procrustes problem", Psychometrika 31, 1966):
with centred vectors X of the new and Y of the old checkpoint and the singular value decomposition
X^T Y = U S V^T, it is R = U V^T. Lengths and distances between users stay what the encoder made.

Legend of shapes: n users, D numbers in an embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from behavior_pipeline.embeddings.states import Vectors, to_vectors
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.storage import writing_file

BLOCK_USERS: Final = 1_024  # multiplied together, always: no user's numbers depend on the others
_COLUMNS: Final = ["user_id", "embedding"]

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Alignment:
    """A rigid motion of vectors.

    Attributes:
        rotation: R, orthogonal, (D, D).
        own_mean: mean of the new checkpoint's vectors, (D,).
        mean: mean of the old one's, (D,).
        reference_id: the old checkpoint.
        num_users: users whom both know.
        explained: share of the old vectors' variance that the moved ones explain, at most 1.
    """

    rotation: Matrix
    own_mean: Matrix
    mean: Matrix
    reference_id: str
    num_users: int
    explained: float

    def apply(self, vectors: Vectors) -> Vectors:
        """Move vectors (n, D) into the old space."""
        return _moved(vectors, self.own_mean, self.rotation, self.mean)

    def undo(self, vectors: Vectors) -> Vectors:
        """Move vectors (n, D) back into the new checkpoint's own space."""
        return _moved(vectors, self.mean, self.rotation.T, self.own_mean)

    def save(self, path: Path) -> None:
        """Write it as safetensors, atomically."""
        facts = {
            "reference_id": self.reference_id,
            "num_users": str(self.num_users),
            "explained": repr(self.explained),
        }
        arrays = {"rotation": self.rotation, "own_mean": self.own_mean, "mean": self.mean}
        with writing_file(path) as aside:
            contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
            save_file(contiguous, aside, metadata=facts)

    @classmethod
    def load(cls, path: Path) -> Alignment | None:
        """Read it; None if there is no such file, as for a home's first checkpoint."""
        if not path.exists():
            return None
        with safe_open(path, framework="numpy") as file:
            facts = file.metadata()
            return cls(
                rotation=file.get_tensor("rotation"),
                own_mean=file.get_tensor("own_mean"),
                mean=file.get_tensor("mean"),
                reference_id=facts["reference_id"],
                num_users=int(facts["num_users"]),
                explained=float(facts["explained"]),
            )


def _moved(vectors: Vectors, start: Matrix, rotation: Matrix, end: Matrix) -> Vectors:
    """Return (vectors - start) rotation + end, block by block, in float64 on the way."""
    moved = np.empty_like(vectors)
    block = np.zeros((BLOCK_USERS, vectors.shape[1]))
    for begin in range(0, len(vectors), BLOCK_USERS):
        part = vectors[begin : begin + BLOCK_USERS]
        block[: len(part)] = part - start
        moved[begin : begin + BLOCK_USERS] = (block @ rotation + end)[: len(part)]
    return moved


def fit_alignment(own_folder: Path, reference_folder: Path, reference_id: str) -> Alignment:
    """Find the motion from one folder of embeddings to another, a bucket at a time.

    Args:
        own_folder: embeddings of the new checkpoint at a cutoff, in its own space.
        reference_folder: the old checkpoint's at the same cutoff, with the same buckets.
        reference_id: the old checkpoint.

    Raises:
        PipelineError: if the widths differ, or there is no user whom both know.
    """
    sums: _Sums | None = None
    for own, reference in _pairs(own_folder, reference_folder):
        if own.shape[1] != reference.shape[1]:
            raise PipelineError(
                f"Vectors of {own.shape[1]} numbers cannot be aligned with those of "
                f"{reference.shape[1]}.",
                "Train a checkpoint of the live one's preset, or start a home of its own.",
            )
        sums = sums or _Sums.of_width(own.shape[1])
        sums.add(own.astype(np.float64), reference.astype(np.float64))
    if sums is None or sums.num_users == 0:
        raise PipelineError(
            f"{own_folder} and {reference_folder} have no user in common.",
            "Embed the same cutoff with both checkpoints first.",
        )
    return sums.solution(reference_id)


def _pairs(own_folder: Path, reference_folder: Path) -> Iterator[tuple[Vectors, Vectors]]:
    """Yield the two vectors (n, D) of the users whom both know, bucket by bucket."""
    for path in sorted(own_folder.glob("bucket=*.parquet")):
        other = reference_folder / path.name
        if other.exists():
            yield _common(_known(path), _known(other))


def _known(path: Path) -> pa.Table:
    """Return the users of a bucket of whom there is an event."""
    return pq.read_table(path, columns=_COLUMNS, filters=~pc.field("is_cold_start"))


def _common(own: pa.Table, reference: pa.Table) -> tuple[Vectors, Vectors]:
    """Return the vectors of the users in both, in one order."""
    rows = pc.index_in(own["user_id"], value_set=reference["user_id"].combine_chunks())
    is_common = pc.is_valid(rows)
    chosen = pc.drop_null(rows)
    return _vectors(own.filter(is_common)), _vectors(reference.take(chosen))


def _vectors(table: pa.Table) -> Vectors:
    column = table["embedding"]
    return to_vectors(column, column.type.list_size)


@dataclass
class _Sums:
    """Running sums over users."""

    num_users: int
    own: Matrix
    reference: Matrix
    products: Matrix
    squares: float = 0.0
    own_squares: float = 0.0

    @classmethod
    def of_width(cls, width: int) -> _Sums:
        """Return empty sums."""
        return cls(0, np.zeros(width), np.zeros(width), np.zeros((width, width)))

    def add(self, own: Matrix, reference: Matrix) -> None:
        """Add users' vectors, (n, D) each."""
        self.num_users += len(own)
        self.own += own.sum(axis=0)
        self.reference += reference.sum(axis=0)
        self.products += own.T @ reference
        self.squares += float((reference**2).sum())
        self.own_squares += float((own**2).sum())

    def solution(self, reference_id: str) -> Alignment:
        """Solve the Procrustes problem of the centred vectors."""
        own_mean, mean = self.own / self.num_users, self.reference / self.num_users
        centred = self.products - self.num_users * np.outer(own_mean, mean)
        left, values, right = np.linalg.svd(centred)
        variance = self.squares - self.num_users * float(mean @ mean)
        own_variance = self.own_squares - self.num_users * float(own_mean @ own_mean)
        # |Y - X R|^2 = |X|^2 + |Y|^2 - 2 trace(R^T X^T Y), and the trace is the sum of values.
        rest = own_variance + variance - 2 * float(values.sum())
        explained = 1 - rest / variance if variance > 0 else 0.0
        return Alignment(left @ right, own_mean, mean, reference_id, self.num_users, explained)
