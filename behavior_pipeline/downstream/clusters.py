"""K-means on a representation: fitted on a sample, applied to anyone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

from behavior_pipeline.downstream.blocks import Block, Blocks
from behavior_pipeline.downstream.probes import Normalizer

NUM_STARTS: Final = 4  # k-means runs of which the tightest is kept


@dataclass(frozen=True)
class Clusters:
    """Centres in the normalized columns of a representation.

    Attributes:
        normalizer: fitted on the sample.
        centers: (K, F).
    """

    normalizer: Normalizer
    centers: NDArray[np.float64]

    def assign(self, blocks: Blocks) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return the (N,) nearest centre of each user, the first at a tie, and its distance."""
        columns = self.normalizer.transform(blocks)
        with threadpool_limits(1):
            products = columns @ self.centers.T
        squares = (columns**2).sum(axis=1)[:, None] - 2 * products + (self.centers**2).sum(axis=1)
        nearest = squares.argmin(axis=1)
        smallest = squares[np.arange(len(columns)), nearest].clip(min=0)
        return nearest, np.sqrt(smallest)

    def membership(self, blocks: Blocks) -> Blocks:
        """Return the users as one block of (N, K) zeros and ones: nothing but their cluster."""
        nearest, _ = self.assign(blocks)
        return (Block("vector", np.eye(len(self.centers))[nearest]),)


def fit_clusters(blocks: Blocks, num_clusters: int, seed: int) -> Clusters:
    """Fit k-means; fewer clusters come out where fewer users differ."""
    normalizer = Normalizer().fit(blocks)
    columns = normalizer.transform(blocks)
    num_distinct = len(np.unique(columns, axis=0))
    model = KMeans(min(num_clusters, num_distinct), n_init=NUM_STARTS, random_state=seed)
    with threadpool_limits(1):  # sums in another order would move the centres
        model.fit(columns)
    return Clusters(normalizer, np.asarray(model.cluster_centers_))
