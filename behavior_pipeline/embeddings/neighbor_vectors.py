"""The vectors among which neighbours are sought: distinct, of length 1, in lists on disk.

Users with equal vectors are equally near to everyone, so a vector is kept once, however many users
have it. Vectors that lie near each other share a list, and a list is read at once: memory holds
some lists and never all vectors.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from behavior_pipeline.contracts import COLD_START_USER
from behavior_pipeline.embeddings.states import Vectors, to_vectors
from behavior_pipeline.errors import PipelineError

READ_ROWS: Final = 16_384
BLOCK_VECTORS: Final = 8_192  # vectors of a list where all lists are searched
SAMPLE_OF_LIST: Final = 64  # vectors that a list's centre is found from
ROUNDS: Final = 10  # of k-means
HASH_BYTES: Final = 16

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class EmbeddingFolder:
    """One cutoff's embeddings.

    Attributes:
        files: Parquet, in the order of their names.
        width: D.
        checkpoint_id: the encoder behind every row.
    """

    files: tuple[Path, ...]
    width: int
    checkpoint_id: str

    @classmethod
    def open(cls, folder: Path) -> EmbeddingFolder:
        """Look at a folder.

        Raises:
            PipelineError: if there are no embeddings, or of more than one checkpoint.
        """
        files = tuple(sorted(folder.glob("*.parquet")))
        if not files:
            raise PipelineError(f"There are no embeddings in {folder}.", "Embed this cutoff first.")
        found = {name for file in files for name in _checkpoints(file)}
        if len(found) != 1:
            raise PipelineError(
                f"The embeddings in {folder} come from {len(found)} checkpoints, not one.",
                "Vectors of two checkpoints never mix: embed this cutoff again.",
            )
        return cls(files, pq.read_schema(files[0]).field("embedding").type.list_size, found.pop())

    def batches(self) -> Iterator[tuple[pa.Array, Vectors, NDArray[np.bool_]]]:
        """Yield ids, vectors (n, D) of length 1 and whether each user can have neighbours, (n,).

        A cold-start user's vector is the prior, which says nothing of it: it is near nobody. The
        reserved cold-start user is left out.
        """
        columns = ["user_id", "embedding", "is_cold_start"]
        for path in self.files:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(READ_ROWS, columns=columns):
                    users = batch.filter(pc.not_equal(batch["user_id"], COLD_START_USER))
                    vectors, is_sound = _unit(to_vectors(users["embedding"], self.width))
                    is_cold = users["is_cold_start"].to_numpy(zero_copy_only=False)
                    yield users["user_id"], vectors, is_sound & ~is_cold


def _checkpoints(file: Path) -> list[str]:
    column = pq.read_table(file, columns=["checkpoint_id"], read_dictionary=["checkpoint_id"])
    found: list[str] = pc.unique(column["checkpoint_id"].cast(pa.string())).to_pylist()
    return found


def _unit(vectors: Vectors) -> tuple[Vectors, NDArray[np.bool_]]:
    """Return vectors (n, D) scaled to length 1, and which of them can be, (n,)."""
    with np.errstate(all="ignore"):
        lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
        is_sound = np.isfinite(lengths) & (lengths > 0)
        unit = (vectors / lengths[:, None]).astype(np.float32)
    return unit, is_sound


@dataclass(frozen=True)
class Members:
    """Which users have which vector.

    Attributes:
        user_ids: N ids in order, Arrow strings.
        vector_of: (N,) number of each user's vector, -1 for a user that can have no neighbours.
            Vectors are numbered by the first user that has them.
        users: those with a vector, by vector and within it in order.
        offsets: (V + 1,) where each vector's users begin in `users`.
        sample_order: (V,) vectors in an order that depends on their content alone.
        rows: (N,) place in the order of the ids of each row of the files.
    """

    user_ids: pa.Array
    vector_of: Integers
    users: Integers
    offsets: Integers
    sample_order: Integers
    rows: Integers

    @property
    def num_vectors(self) -> int:
        """V, the number of distinct vectors."""
        return len(self.offsets) - 1


def find_members(folder: EmbeddingFolder) -> Members:
    """Read the embeddings once and number their distinct vectors."""
    ids, hashes = list[pa.Array](), list[bytes | None]()
    for user_ids, vectors, has_neighbors in folder.batches():
        ids.append(user_ids)
        hashes += [
            hashlib.blake2b(vector.data, digest_size=HASH_BYTES).digest() if is_wanted else None
            for vector, is_wanted in zip(vectors + 0.0, has_neighbors, strict=True)
        ]
    names = pa.concat_arrays(ids) if ids else pa.array([], pa.string())
    order = pc.array_sort_indices(names)
    coded = pa.array(hashes, pa.binary(HASH_BYTES)).take(order).dictionary_encode()
    vector_of = pc.fill_null(coded.indices, -1).to_numpy().astype(np.int64)
    with_vector = np.flatnonzero(vector_of >= 0)
    sizes = np.bincount(vector_of[with_vector], minlength=len(coded.dictionary))
    places = order.to_numpy().astype(np.int64)
    return Members(
        user_ids=names.take(order),
        vector_of=vector_of,
        users=with_vector[np.argsort(vector_of[with_vector], kind="stable")],
        offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        sample_order=pc.array_sort_indices(coded.dictionary).to_numpy().astype(np.int64),
        rows=np.argsort(places, kind="stable"),
    )


@dataclass(frozen=True)
class VectorLists:
    """Distinct vectors in a file, list after list.

    Attributes:
        path: float32, (V, D), without a header.
        width: D.
        offsets: (L + 1,) where each list begins.
        numbers: (V,) number of the vector at each place; ascending within a list.
        centers: (L, D) of length 1, or None where lists are blocks without a meaning.
    """

    path: Path
    width: int
    offsets: Integers
    numbers: Integers
    centers: Vectors | None

    @property
    def num_lists(self) -> int:
        """L."""
        return len(self.offsets) - 1

    def read(self, lists: Integers) -> tuple[Vectors, Integers]:
        """Return the vectors (n, D) of some lists, and their numbers (n,)."""
        parts = [(int(self.offsets[which]), int(self.offsets[which + 1])) for which in lists]
        vectors = [
            np.fromfile(
                self.path, np.float32, (end - start) * self.width, offset=start * self.width * 4
            ).reshape(-1, self.width)
            for start, end in parts
        ]
        return np.concatenate(vectors), np.concatenate([self.numbers[a:b] for a, b in parts])


def write_blocks(folder: EmbeddingFolder, members: Members, path: Path) -> VectorLists:
    """Write the vectors in the order of their numbers, in lists of BLOCK_VECTORS."""
    list_of = np.arange(members.num_vectors, dtype=np.int64) // BLOCK_VECTORS
    return _write(folder, members, list_of, None, path)


def write_clusters(
    folder: EmbeddingFolder, members: Members, num_lists: int, seed: int, path: Path
) -> VectorLists:
    """Write the vectors in lists around centres, found by k-means on a sample of the vectors."""
    centers = _centers(folder, members, num_lists, seed)
    quantizer = faiss.IndexFlatIP(folder.width)
    quantizer.add(centers)
    list_of = np.zeros(members.num_vectors, np.int64)
    for numbers, vectors in _numbered(folder, members):
        list_of[numbers] = quantizer.search(vectors, 1)[1][:, 0]
    return _write(folder, members, list_of, centers, path)


def _centers(folder: EmbeddingFolder, members: Members, num_lists: int, seed: int) -> Vectors:
    """Return centres (L, D) of length 1."""
    sample = members.sample_order[: num_lists * SAMPLE_OF_LIST]
    place = np.full(members.num_vectors, -1, np.int64)
    place[sample] = np.arange(len(sample))
    points = np.zeros((len(sample), folder.width), np.float32)
    for numbers, vectors in _numbered(folder, members):
        is_sampled = place[numbers] >= 0
        points[place[numbers[is_sampled]]] = vectors[is_sampled]
    model = faiss.Kmeans(
        folder.width, num_lists, niter=ROUNDS, seed=seed, spherical=True,
        min_points_per_centroid=1, max_points_per_centroid=SAMPLE_OF_LIST,
    )  # fmt: skip
    model.train(points)
    return np.asarray(model.centroids, np.float32)


def _numbered(folder: EmbeddingFolder, members: Members) -> Iterator[tuple[Integers, Vectors]]:
    """Yield numbers (n,) and vectors (n, D), a batch at a time; a shared vector comes often."""
    start = 0
    for _, vectors, has_neighbors in folder.batches():
        rows = members.rows[start : start + len(vectors)]
        yield members.vector_of[rows[has_neighbors]], vectors[has_neighbors]
        start += len(vectors)


def _write(
    folder: EmbeddingFolder,
    members: Members,
    list_of: Integers,
    centers: Vectors | None,
    path: Path,
) -> VectorLists:
    """Write each vector to its place."""
    num_lists = len(centers) if centers is not None else int(list_of.max(initial=-1)) + 1
    numbers = np.argsort(list_of, kind="stable")
    places = np.argsort(numbers, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(list_of, minlength=num_lists))])
    size = folder.width * 4
    with path.open("wb") as file:
        for which, vectors in _numbered(folder, members):
            for place, vector in zip(places[which].tolist(), vectors, strict=True):
                os.pwrite(file.fileno(), vector.data, place * size)
    return VectorLists(path, folder.width, offsets.astype(np.int64), numbers, centers)
