"""The users most like each user: nearest neighbours among the embeddings of one cutoff."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from behavior_pipeline.contracts import SIMILAR_USERS
from behavior_pipeline.embeddings.neighbor_index import IndexFacts, write_index
from behavior_pipeline.embeddings.neighbor_search import Neighbors, measure_recall, search_all
from behavior_pipeline.embeddings.neighbor_vectors import (
    EmbeddingFolder,
    Integers,
    Members,
    VectorLists,
    find_members,
    write_blocks,
    write_clusters,
)
from behavior_pipeline.embeddings.states import Vectors
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.progress import Report, report_nothing
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage, writing_folder

NEIGHBORS_FILE: Final = "similar_users.parquet"
NUM_PROBES: Final = 24  # lists searched for the users of a list
RECALL_VECTORS: Final = 256
WRITE_ROWS: Final = 16_384
EXPANDED_USERS: Final = 4_096  # users whose candidates are laid out at once


@dataclass(frozen=True)
class SimilarUsersSummary:
    """What was found.

    Attributes:
        num_users: users with a row.
        num_with_neighbors: of these, users with neighbours.
        facts: what the index says of itself.
    """

    num_users: int
    num_with_neighbors: int
    facts: IndexFacts


def find_similar_users(
    storage: Storage,
    settings: Settings,
    cutoff: datetime,
    written_at: datetime,
    report: Report = report_nothing,
) -> SimilarUsersSummary:
    """Find every user's `num_similar_users` nearest neighbours at a cutoff, and write an index.

    Nearness is the cosine of two embeddings. Up to `max_exact_similar_users` everyone is compared
    with everyone; of more, with those whose vectors lie in the nearest of sqrt(V) lists, and the
    recall of that is measured. Vectors lie on disk, lists of them in memory.

    Raises:
        PipelineError: if there are no embeddings, or of more than one checkpoint.
    """
    folder = EmbeddingFolder.open(storage.embeddings(cutoff))
    with _threads(settings.threads), writing_folder(storage.similar_users(cutoff)) as aside:
        members = find_members(folder)
        if not len(members.user_ids):
            raise PipelineError(f"No user has an embedding at {cutoff:%Y-%m-%d}.")
        vectors = aside / "vectors.f32"
        lists = _lists(folder, members, settings, vectors)
        num = min(settings.num_similar_users, max(len(members.users) - 1, 0))
        origin = {
            "observation_cutoff": cutoff,
            "checkpoint_id": folder.checkpoint_id,
            "written_at": written_at,
        }
        _write(aside / NEIGHBORS_FILE, members, _all_neighbors(lists, members, num, report), origin)
        facts = _facts(folder, lists, members, cutoff, settings.num_similar_users)
        write_index(aside, lists, members, facts)
        vectors.unlink()
    with_neighbors = len(members.users) if num else 0
    return SimilarUsersSummary(len(members.user_ids), with_neighbors, facts)


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Let faiss use some threads for a while."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(number)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _lists(
    folder: EmbeddingFolder, members: Members, settings: Settings, path: Path
) -> VectorLists:
    """Write the vectors in blocks if all are compared with all, else around centres."""
    if len(members.users) <= settings.max_exact_similar_users:
        return write_blocks(folder, members, path)
    num_lists = round(members.num_vectors**0.5)
    return write_clusters(folder, members, num_lists, settings.seed, path)


def _all_neighbors(
    lists: VectorLists, members: Members, num: int, report: Report
) -> tuple[NDArray[np.int32], Vectors]:
    """Return places (N, num) in the order of the ids and similarities (N, num), -1 where none."""
    ranks = np.full((len(members.user_ids), num), -1, np.int32)
    similarities = np.zeros((len(members.user_ids), num), np.float32)
    done = 0
    for found in search_all(lists, num + 1, NUM_PROBES):
        for users, nearest, scores in expand(found, members, num):
            ranks[users], similarities[users] = nearest, scores
        done += len(found.numbers)
        report(done, members.num_vectors, "neighbours")
    return ranks, similarities


def expand(
    found: Neighbors, members: Members, num: int
) -> Iterator[tuple[Integers, Integers, Vectors]]:
    """Yield users (n,) of the vectors, their neighbours (n, num) and the similarities (n, num).

    A vector stands for all users that have it; of each at most num + 1 can be among the nearest.
    Ties are in the order of the ids, which places are in.
    """
    sizes = np.diff(members.offsets)
    query_rows = np.repeat(np.arange(len(found.numbers)), sizes[found.numbers])
    queries = members.users[_ranges(members.offsets[found.numbers], sizes[found.numbers])]
    for start in range(0, len(queries), EXPANDED_USERS):
        block = slice(start, start + EXPANDED_USERS)
        users, rows = queries[block], query_rows[block]
        yield (
            users,
            *_nearest_users(found.found[rows], found.similarities[rows], users, members, num),
        )


def _nearest_users(
    found: Integers, similarities: Vectors, users: Integers, members: Members, num: int
) -> tuple[Integers, Vectors]:
    """Return the nearest users (n, num) and their similarities, from the nearest vectors (n, m)."""
    is_there = found >= 0
    rows, vectors, scores = np.nonzero(is_there)[0], found[is_there], similarities[is_there]
    sizes = np.minimum(np.diff(members.offsets)[vectors], num + 1)
    candidates = members.users[_ranges(members.offsets[vectors], sizes)]
    rows, scores = np.repeat(rows, sizes), np.repeat(scores, sizes)
    is_other = candidates != users[rows]
    rows, candidates, scores = rows[is_other], candidates[is_other], scores[is_other]
    order = np.lexsort((candidates, -scores, rows))
    rows, candidates, scores = rows[order], candidates[order], scores[order]
    place = np.arange(len(rows)) - np.searchsorted(rows, rows)
    is_near = place < num
    nearest = np.full((len(users), num), -1, np.int64)
    cosines = np.zeros((len(users), num), np.float32)
    nearest[rows[is_near], place[is_near]] = candidates[is_near]
    cosines[rows[is_near], place[is_near]] = np.clip(scores[is_near], -1, 1)
    return nearest, cosines


def _ranges(starts: Integers, sizes: Integers) -> Integers:
    """Return start, start + 1, … of each range, one after another."""
    ends = np.cumsum(sizes)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - ends + sizes, sizes)


def _facts(
    folder: EmbeddingFolder, lists: VectorLists, members: Members, cutoff: datetime, num: int
) -> IndexFacts:
    """Say what was found, and measure how much of it is right."""
    return IndexFacts(
        checkpoint_id=folder.checkpoint_id,
        cutoff=f"{cutoff:%Y-%m-%d}",
        width=folder.width,
        num_users=len(members.user_ids),
        num_vectors=members.num_vectors,
        num_neighbors=num,
        is_exact=lists.centers is None,
        recall=measure_recall(lists, members.sample_order[:RECALL_VECTORS], num, NUM_PROBES),
    )


def _write(
    path: Path,
    members: Members,
    neighbors: tuple[NDArray[np.int32], Vectors],
    origin: dict[str, object],
) -> None:
    """Write the neighbours of all users in the contract's order."""
    schema = SIMILAR_USERS.schema
    ranks, similarities = neighbors
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for start in range(0, len(ranks), WRITE_ROWS):
            block = slice(start, start + WRITE_ROWS)
            is_there = ranks[block] >= 0
            offsets = pa.array(np.concatenate([[0], np.cumsum(is_there.sum(axis=1))]), pa.int32())
            names = members.user_ids.take(pa.array(ranks[block][is_there]))
            scores = pa.array(similarities[block][is_there])
            columns = {
                "user_id": members.user_ids[block],
                "similar_user_ids": pa.ListArray.from_arrays(offsets, names),
                "similarities": pa.ListArray.from_arrays(offsets, scores),
            }
            columns |= {
                name: pa.repeat(pa.scalar(value, schema.field(name).type), len(is_there))
                for name, value in origin.items()
            }
            writer.write_table(pa.table([columns[name] for name in schema.names], schema=schema))
