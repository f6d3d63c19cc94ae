"""A cutoff's vectors as a faiss index on disk: neighbours of one user, more than are published.

`index.faiss` is faiss's own format, `users.parquet` says which vector each user has, `index.json`
which encoder and cutoff the vectors are of. Nothing in it is unpickled.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from behavior_pipeline.embeddings.neighbor_vectors import Members, VectorLists
from behavior_pipeline.embeddings.states import Vectors
from behavior_pipeline.storage import read_json, write_json

INDEX_FILE: Final = "index.faiss"
USERS_FILE: Final = "users.parquet"
ABOUT_FILE: Final = "index.json"
INDEX_FILES: Final = (INDEX_FILE, USERS_FILE, ABOUT_FILE)
SEARCH_PROBES: Final = 32  # lists searched for one user
SAMPLE: Final = 32_768  # vectors that the ranges of the 8 bits are found from, at the least


@dataclass(frozen=True)
class IndexFacts:
    """What an index is of.

    Attributes:
        checkpoint_id: encoder behind the vectors.
        cutoff: `YYYY-MM-DD`.
        width: D.
        num_users: with an embedding.
        num_vectors: distinct vectors of users who can have neighbours.
        num_neighbors: k, of each user.
        is_exact: everyone was compared with everyone.
        recall: share of the k nearest that the published neighbours hold, on a sample of users.
    """

    checkpoint_id: str
    cutoff: str
    width: int
    num_users: int
    num_vectors: int
    num_neighbors: int
    is_exact: bool
    recall: float


def write_index(folder: Path, lists: VectorLists, members: Members, facts: IndexFacts) -> None:
    """Write the index of a cutoff into a folder that is under construction."""
    index = _flat(lists) if lists.centers is None else _clustered(lists)
    faiss.write_index(index, str(folder / INDEX_FILE))
    table = pa.table({"user_id": members.user_ids, "vector": pa.array(members.vector_of)})
    pq.write_table(table, folder / USERS_FILE, compression="zstd")
    write_json(folder / ABOUT_FILE, asdict(facts))


def read_facts(folder: Path) -> IndexFacts:
    """Return what the index in a folder is of."""
    return IndexFacts(**read_json(folder / ABOUT_FILE))


def _flat(lists: VectorLists) -> Any:
    """Return an index that compares with every vector, as they are."""
    index = faiss.IndexFlatIP(lists.width)
    for which in range(lists.num_lists):
        index.add(lists.read(np.array([which]))[0])
    return index


def _clustered(lists: VectorLists) -> Any:
    """Return an index that compares with some lists, each number in 8 bits."""
    assert lists.centers is not None  # noqa: S101 - for the types
    quantizer = faiss.IndexFlatIP(lists.width)
    quantizer.add(lists.centers)
    index = faiss.IndexIVFScalarQuantizer(
        quantizer, lists.width, lists.num_lists, faiss.ScalarQuantizer.QT_8bit,
        faiss.METRIC_INNER_PRODUCT,
    )  # fmt: skip
    index.train(_sample(lists))
    for which in range(lists.num_lists):
        vectors, numbers = lists.read(np.array([which]))
        if len(vectors):
            _reserve(index, which, len(vectors))
            index.add_with_ids(vectors, numbers)
    index.nprobe = SEARCH_PROBES
    return index


def _reserve(index: Any, which: int, num_vectors: int) -> None:
    """Make room for a list at once: grown vector by vector, lists take twice what they need."""
    lists = faiss.downcast_InvertedLists(index.invlists)
    lists.resize(which, num_vectors)
    lists.resize(which, 0)


def _sample(lists: VectorLists) -> Vectors:
    """Return the first vectors of every list, from which the ranges of the 8 bits are found."""
    most = -(-SAMPLE // lists.num_lists)
    return np.concatenate([lists.read(np.array([n]))[0][:most] for n in range(lists.num_lists)])


class NeighborIndex:
    """An opened index; the vectors stay on disk until they are searched."""

    def __init__(self, folder: Path) -> None:
        self.facts = read_facts(folder)
        self._index = faiss.read_index(str(folder / INDEX_FILE), faiss.IO_FLAG_MMAP)
        users = pq.read_table(folder / USERS_FILE)
        self._user_ids = users["user_id"].combine_chunks()
        self._vectors = users["vector"].combine_chunks()

    def search(self, user_id: str, num: int) -> list[tuple[str, float]] | None:
        """Return the users most like a user, the nearest first, ties by id, with their cosines.

        Returns:
            None if there is no such user; nothing for a user without neighbours.
        """
        place = pc.index(self._user_ids, user_id).as_py()
        if place < 0:
            return None
        own = self._vectors[place].as_py()
        if own < 0:
            return []
        wanted = min(num + 1, self._index.ntotal)
        scores, found = self._index.search(self._vector(own), wanted)
        by_vector = dict(zip(found[0].tolist(), scores[0].tolist(), strict=True))
        is_near = pc.is_in(self._vectors, value_set=pa.array(list(by_vector), pa.int64()))
        near = [
            (user, by_vector[vector])
            for user, vector in zip(
                self._user_ids.filter(is_near).to_pylist(),
                self._vectors.filter(is_near).to_pylist(),
                strict=True,
            )
            if user != user_id
        ]
        return sorted(near, key=lambda pair: (-pair[1], pair[0]))[:num]

    def _vector(self, number: int) -> Vectors:
        """Return a vector (1, D) as the index holds it."""
        if isinstance(self._index, faiss.IndexIVF):
            self._index.make_direct_map()
        return np.asarray(self._index.reconstruct(number), np.float32)[None]
