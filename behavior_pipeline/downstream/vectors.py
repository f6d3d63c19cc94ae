"""Reading embeddings bucket by bucket, so that never all users' vectors are in memory at once."""

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

from behavior_pipeline.contracts import COLD_START_USER
from behavior_pipeline.errors import PipelineError

BATCH_ROWS: Final = 8192


@dataclass(frozen=True)
class VectorFolder:
    """One folder of embeddings: what all of its files agree on.

    Attributes:
        files: `bucket=<k>.parquet`, in the order of their names.
        width: number of dimensions.
        checkpoint_id: the encoder behind every row.
    """

    files: tuple[Path, ...]
    width: int
    checkpoint_id: str


def open_vectors(folder: Path) -> VectorFolder:
    """Look at every file of a folder of embeddings.

    Raises:
        PipelineError: if there is none, or rows come from more than one checkpoint.
    """
    files = tuple(sorted(folder.glob("bucket=*.parquet")))
    if not files:
        raise PipelineError(
            f"There are no embeddings in {folder}.", "Run the embeddings stage for this cutoff."
        )
    checkpoints = {name for file in files for name in _checkpoints(file)}
    if len(checkpoints) != 1:
        raise PipelineError(
            f"The embeddings in {folder} come from {len(checkpoints)} checkpoints, not one.",
            "Embeddings of two checkpoints never mix: embed this cutoff again.",
        )
    return VectorFolder(files, _width(files[0]), checkpoints.pop())


def iterate_vectors(file: Path) -> Iterator[tuple[pa.Array, NDArray[np.float32]]]:
    """Yield the users of one bucket and their (B, D) vectors, a batch at a time.

    The reserved cold-start user is left out.
    """
    columns = ["user_id", "embedding"]
    for batch in pq.ParquetFile(file).iter_batches(BATCH_ROWS, columns=columns):
        users = batch.filter(pc.not_equal(batch["user_id"], COLD_START_USER))
        if users.num_rows:
            yield users["user_id"], as_matrix(users["embedding"])


def load_vectors(folder: VectorFolder, user_ids: pa.Array) -> NDArray[np.float32]:
    """Return the (N, D) vectors of the users, in their order.

    Raises:
        PipelineError: if a user has none.
    """
    vectors = np.zeros((len(user_ids), folder.width), dtype=np.float32)
    is_found = np.zeros(len(user_ids), dtype=np.bool_)
    for file in folder.files:
        for ids, matrix in iterate_vectors(file):
            places = pc.index_in(ids, value_set=user_ids)
            is_wanted = places.is_valid().to_numpy(zero_copy_only=False)
            rows = places.drop_null().to_numpy()
            vectors[rows] = matrix[is_wanted]
            is_found[rows] = True
    if not is_found.all():
        raise PipelineError(
            f"{(~is_found).sum():,} of {len(user_ids):,} users of the population have no embedding "
            f"in {folder.files[0].parent}.",
            "Run the embeddings stage for this cutoff again.",
        )
    return vectors


def as_matrix(column: pa.Array) -> NDArray[np.float32]:
    """Return a column of N lists of D numbers as an (N, D) matrix."""
    values = column.flatten().to_numpy(zero_copy_only=False)
    matrix: NDArray[np.float32] = values.astype(np.float32, copy=False).reshape(len(column), -1)
    return matrix


def _checkpoints(file: Path) -> set[str]:
    """Return the checkpoint ids in one file, which may be empty."""
    column = pq.read_table(file, columns=["checkpoint_id"], read_dictionary=["checkpoint_id"])
    return set(pc.unique(column["checkpoint_id"].cast(pa.string())).to_pylist())


def _width(file: Path) -> int:
    """Return the number of dimensions that the schema of a file declares."""
    return int(pq.read_schema(file).field("embedding").type.list_size)
