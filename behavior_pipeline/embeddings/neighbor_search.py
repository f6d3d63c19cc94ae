"""Nearest vectors of vectors: all against all, list by list, with faiss.

The similarity of two vectors that comes out is one sum in one order, whatever block the two were
found in, so that results do not depend on blocks and threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import faiss
import numpy as np

from behavior_pipeline.embeddings.neighbor_vectors import Integers, VectorLists
from behavior_pipeline.embeddings.states import Vectors

QUERY_VECTORS: Final = 2_048  # vectors whose neighbours are sought at once
CANDIDATE_VECTORS: Final = 32_768  # vectors in memory that they are compared with
SCORE_VECTORS: Final = 256  # vectors whose similarities are summed at once
MARGIN: Final = 8  # more candidates than wanted: faiss rounds, and cuts ties anywhere
MOST_CANDIDATES: Final = 2_048


@dataclass(frozen=True)
class Neighbors:
    """The nearest vectors of some vectors, the nearest first, ties by number.

    Attributes:
        numbers: (n,) whose neighbours these are.
        found: (n, m) numbers, -1 where there are fewer; the vector itself is among them.
        similarities: (n, m) cosines, -inf where there are fewer.
    """

    numbers: Integers
    found: Integers
    similarities: Vectors


def search_all(lists: VectorLists, num_wanted: int, num_probes: int) -> Iterator[Neighbors]:
    """Yield the nearest vectors of every vector, list by list.

    Args:
        lists: the vectors.
        num_wanted: of each vector, at least; a tie at the end is not cut off.
        num_probes: lists searched for the vectors of a list, those with the nearest centres; all
            where lists have no centres.
    """
    for which in range(lists.num_lists):
        probes = _probes(lists, which, num_probes)
        vectors, numbers = lists.read(np.array([which]))
        for start in range(0, len(numbers), QUERY_VECTORS):
            block = slice(start, start + QUERY_VECTORS)
            yield search(lists, vectors[block], numbers[block], num_wanted, probes)


def search(
    lists: VectorLists, vectors: Vectors, numbers: Integers, num_wanted: int, probes: Integers
) -> Neighbors:
    """Return the nearest vectors, in some lists, of vectors (n, D) of length 1."""
    num_candidates = int((lists.offsets[probes + 1] - lists.offsets[probes]).sum())
    num = num_wanted + MARGIN
    while True:
        found = _search(lists, vectors, numbers, min(num, num_candidates), probes)
        if num >= min(num_candidates, MOST_CANDIDATES) or not _cuts_a_tie(found, num_wanted):
            return found
        num *= 4


def all_lists(lists: VectorLists) -> Integers:
    """Return the numbers of all lists: searching them is exact."""
    return np.arange(lists.num_lists, dtype=np.int64)


def measure_recall(lists: VectorLists, chosen: Integers, num: int, num_probes: int) -> float:
    """Return the share of the `num` truly nearest others of some vectors that the probes hold."""
    if lists.centers is None or not len(chosen):
        return 1.0
    approximate = list[Neighbors]()
    vectors = list[Vectors]()
    for which in range(lists.num_lists):
        of_list, numbers = lists.read(np.array([which]))
        is_chosen = np.isin(numbers, chosen)
        if is_chosen.any():
            vectors.append(of_list[is_chosen])
            probes = _probes(lists, which, num_probes)
            approximate.append(search(lists, vectors[-1], numbers[is_chosen], num + 1, probes))
    numbers = np.concatenate([found.numbers for found in approximate])
    exact = search(lists, np.concatenate(vectors), numbers, num + 1, all_lists(lists))
    held = [row for found in approximate for row in _others(found, num)]
    pairs = list(zip(held, _others(exact, num), strict=True))
    return sum(len(ours & true) for ours, true in pairs) / sum(len(true) for _, true in pairs)


def _others(found: Neighbors, num: int) -> list[set[int]]:
    """Return each vector's nearest others."""
    return [
        set([other for other in row if other not in (own, -1)][:num])
        for own, row in zip(found.numbers.tolist(), found.found.tolist(), strict=True)
    ]


def _probes(lists: VectorLists, which: int, num_probes: int) -> Integers:
    """Return the lists that are searched for the vectors of one list, in order."""
    if lists.centers is None or num_probes >= lists.num_lists:
        return all_lists(lists)
    similarities = lists.centers @ lists.centers[which]
    similarities[which] = np.inf
    return np.sort(np.argsort(-similarities, kind="stable")[:num_probes])


def _cuts_a_tie(found: Neighbors, num_wanted: int) -> bool:
    """Tell whether vectors that were not found may be as near as the last wanted."""
    last = found.similarities[:, -1]
    return bool((last == found.similarities[:, num_wanted - 1]).any())


def _search(
    lists: VectorLists, vectors: Vectors, numbers: Integers, num: int, probes: Integers
) -> Neighbors:
    """Return the `num` nearest vectors, some lists at a time."""
    found = np.full((len(vectors), num), -1, np.int64)
    similarities = np.full((len(vectors), num), -np.inf, np.float32)
    for some in _together(lists, probes):
        candidates, candidate_numbers = lists.read(some)
        fewer = min(num, len(candidates))
        _, places = faiss.knn(vectors, candidates, fewer, faiss.METRIC_INNER_PRODUCT)
        scores = _scores(vectors, candidates, places)
        found, similarities = _nearest(
            np.hstack([found, candidate_numbers[places]]), np.hstack([similarities, scores]), num
        )
    return Neighbors(numbers, found, similarities)


def _together(lists: VectorLists, probes: Integers) -> Iterator[Integers]:
    """Yield lists that are read at once: up to CANDIDATE_VECTORS, or one."""
    sizes = lists.offsets[probes + 1] - lists.offsets[probes]
    start, total = 0, 0
    for place, size in enumerate(sizes.tolist()):
        if total and total + size > CANDIDATE_VECTORS:
            yield probes[start:place]
            start, total = place, 0
        total += size
    if total:
        yield probes[start:]


def _scores(vectors: Vectors, candidates: Vectors, places: Integers) -> Vectors:
    """Return the cosines (n, m) of vectors (n, D) with m candidates of each."""
    scores = np.empty(places.shape, np.float32)
    for start in range(0, len(vectors), SCORE_VECTORS):
        block = slice(start, start + SCORE_VECTORS)
        scores[block] = np.einsum("nd,nmd->nm", vectors[block], candidates[places[block]])
    return scores


def _nearest(found: Integers, similarities: Vectors, num: int) -> tuple[Integers, Vectors]:
    """Return the nearest of each row, the nearest first, ties by number."""
    rows = np.repeat(np.arange(len(found)), found.shape[1])
    order = np.lexsort((found.ravel(), -similarities.ravel(), rows)).reshape(found.shape)[:, :num]
    return found.ravel()[order], similarities.ravel()[order]
