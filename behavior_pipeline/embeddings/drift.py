"""How far the embeddings of a night have moved from those of the night before.

On a sample of users who are there on both nights; the sample's vectors are all that is in memory.
Shapes: N users of the sample, D numbers in an embedding, K neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

NUM_NEIGHBOURS: Final = 10
MIN_USERS: Final = 3

Floats = NDArray[np.float64]
Places = NDArray[np.int64]


@dataclass(frozen=True)
class Movement:
    """What two nights' embeddings of the same users say of each other.

    Attributes:
        neighbour_overlap: mean share of a user's K nearest neighbours within the sample that were
            among the K nearest the night before, each night in its own space: a rotation of all
            vectors leaves it as it is (Wendlandt, Kummerfeld and Mihalcea, "Factors Influencing
            the Surprising Instability of Word Embeddings", NAACL 2018, section 2).
        cross_overlap: the same, with tonight's neighbours looked up among the vectors of the night
            before: about K / N if the two nights are not in one space.
        aligned_overlap: `cross_overlap` after the rigid motion that brings tonight's vectors
            nearest to those of the night before.
        moved: median distance of a user's two vectors, over the median length before.
        moved_aligned: the same after that motion.
        num_users: N.
    """

    neighbour_overlap: float
    cross_overlap: float
    aligned_overlap: float
    moved: float
    moved_aligned: float
    num_users: int


def compare_nights(now: NDArray[np.float32], before: NDArray[np.float32]) -> Movement | None:
    """Compare the vectors (N, D) of the same users on two nights, None for too few users.

    Nights whose encoders have another D share no space: what needs one is 0 then, `moved` infinite.
    """
    if len(now) < MIN_USERS:
        return None
    with threadpool_limits(1):  # sums in another order would differ in the last digits
        return _compare(now.astype(np.float64), before.astype(np.float64))


def _compare(now: Floats, before: Floats) -> Movement:
    """Compare exact vectors."""
    before_neighbours = neighbours(before, before)
    overlap = _overlap(neighbours(now, now), before_neighbours)
    if now.shape[1] != before.shape[1]:
        return Movement(overlap, 0.0, 0.0, np.inf, np.inf, len(now))
    aligned = rigidly_moved(now, before)
    return Movement(
        neighbour_overlap=overlap,
        cross_overlap=_overlap(neighbours(now, before), before_neighbours),
        aligned_overlap=_overlap(neighbours(aligned, before), before_neighbours),
        moved=_moved(now, before),
        moved_aligned=_moved(aligned, before),
        num_users=len(now),
    )


def neighbours(queries: Floats, points: Floats) -> Places:
    """Return the rows of the K points nearest to each query (N, K), its own row left out.

    K is NUM_NEIGHBOURS, or N - 1 if that is less.
    """
    count = min(NUM_NEIGHBOURS, len(points) - 1)
    squares = (points**2).sum(axis=1)[None, :] - 2.0 * queries @ points.T
    np.fill_diagonal(squares, np.inf)
    nearest: Places = np.argpartition(squares, count - 1, axis=1)[:, :count]
    return nearest


def rigidly_moved(vectors: Floats, onto: Floats) -> Floats:
    """Return the vectors (N, D) after the rotation and shift that bring them nearest to others.

    Orthogonal Procrustes of the centred vectors; see `alignment.py`.
    """
    own_mean, mean = vectors.mean(axis=0), onto.mean(axis=0)
    left, _, right = np.linalg.svd((vectors - own_mean).T @ (onto - mean))
    moved: Floats = (vectors - own_mean) @ (left @ right) + mean
    return moved


def _overlap(now: Places, before: Places) -> float:
    """Return the mean share of common entries of the rows of two (N, K) sets."""
    both = np.sort(np.concatenate([now, before], axis=1), axis=1)
    return float((both[:, 1:] == both[:, :-1]).sum() / now.size)


def _moved(now: Floats, before: Floats) -> float:
    """Return the median distance over the median length before; 0 if all is zero."""
    length = float(np.median(np.linalg.norm(before, axis=1)))
    distance = float(np.median(np.linalg.norm(now - before, axis=1)))
    return distance / length if length > 0 else 0.0 if distance == 0 else np.inf
