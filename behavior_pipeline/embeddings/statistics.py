"""Whether a folder of embeddings is healthy, computed in one streamed pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from behavior_pipeline.contracts import COLD_START_USER
from behavior_pipeline.embeddings.states import Vectors, to_vectors
from behavior_pipeline.errors import PipelineError

NORM_QUANTILES: Final = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_CHUNK_USERS: Final = 16_384
_COLUMNS: Final = ["user_id", "observation_cutoff", "embedding", "checkpoint_id", "is_cold_start"]

_Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class EmbeddingStatistics:
    """What a folder of embeddings looks like; the row of COLD_START_USER is no user.

    Attributes:
        num_users: rows.
        num_cold_start: rows that carry the prior.
        num_not_finite: vectors with a NaN or an infinity; the figures below leave them out.
        num_zero_vectors: vectors of zeros only.
        constant_columns: dimensions in which all users agree.
        norm_quantiles: Euclidean length at each of NORM_QUANTILES; empty without a finite vector.
        effective_rank: exp of the entropy of the covariance's normalised spectrum, 1 to width;
            0 if all users agree (Roy and Vetterli, "The effective rank", EUSIPCO 2007).
        checkpoint_ids: distinct values, in order.
        cutoffs: distinct observation cutoffs, in order.
    """

    num_users: int
    num_cold_start: int
    num_not_finite: int
    num_zero_vectors: int
    constant_columns: tuple[int, ...]
    norm_quantiles: dict[float, float]
    effective_rank: float
    checkpoint_ids: tuple[str, ...]
    cutoffs: tuple[datetime, ...]


def summarize_embeddings(embeddings_folder: Path) -> EmbeddingStatistics:
    """Read a folder of embeddings once, a chunk of users at a time.

    Raises:
        PipelineError: if there are none.
    """
    files = sorted(embeddings_folder.glob("*.parquet"))
    if not files:
        raise PipelineError(f"There are no embeddings in {embeddings_folder}.", "Embed it first.")
    width = pq.read_schema(files[0]).field("embedding").type.list_size
    sums = _Sums(width)
    for path in files:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_CHUNK_USERS, columns=_COLUMNS):
                sums.add(batch)
    return sums.statistics()


@dataclass
class _Sums:
    """Running sums; moments are taken around the first vector, lest equal columns cancel badly."""

    width: int
    num_users: int = 0
    num_cold_start: int = 0
    checkpoint_ids: set[str] = field(default_factory=set)
    cutoffs: set[datetime] = field(default_factory=set)
    norms: list[_Matrix] = field(default_factory=list)
    origin: _Matrix | None = None
    num_finite: int = 0
    total: _Matrix = field(init=False)
    products: _Matrix = field(init=False)
    is_varying: NDArray[np.bool_] = field(init=False)

    def __post_init__(self) -> None:
        self.total = np.zeros(self.width)
        self.products = np.zeros((self.width, self.width))
        self.is_varying = np.zeros(self.width, np.bool_)

    def add(self, batch: pa.RecordBatch) -> None:
        """Count the rows of a batch."""
        self.checkpoint_ids |= set(pc.unique(batch["checkpoint_id"]).to_pylist())
        self.cutoffs |= set(pc.unique(batch["observation_cutoff"]).to_pylist())
        users = batch.filter(pc.not_equal(batch["user_id"], COLD_START_USER))
        self.num_users += len(users)
        self.num_cold_start += pc.sum(users["is_cold_start"]).as_py() or 0
        vectors = to_vectors(users["embedding"], self.width)
        self._add_vectors(vectors[np.isfinite(vectors).all(axis=1)])

    def _add_vectors(self, finite: Vectors) -> None:
        """Add finite vectors (n, width) to the moments."""
        if not len(finite):
            return
        exact = finite.astype(np.float64)
        if self.origin is None:
            self.origin = exact[0]
        shifted = exact - self.origin
        self.num_finite += len(exact)
        self.norms.append(np.linalg.norm(exact, axis=1))
        self.total += shifted.sum(axis=0)
        self.products += shifted.T @ shifted
        self.is_varying |= (shifted != 0).any(axis=0)

    def statistics(self) -> EmbeddingStatistics:
        """Turn the sums into figures."""
        norms = np.concatenate(self.norms) if self.norms else np.zeros(0)
        quantiles = np.quantile(norms, NORM_QUANTILES).tolist() if len(norms) else []
        return EmbeddingStatistics(
            num_users=self.num_users,
            num_cold_start=self.num_cold_start,
            num_not_finite=self.num_users - self.num_finite,
            num_zero_vectors=int(np.sum(norms == 0)),
            constant_columns=tuple(np.flatnonzero(~self.is_varying).tolist()),
            norm_quantiles=dict(zip(NORM_QUANTILES, quantiles, strict=False)),
            effective_rank=_effective_rank(self._covariance()),
            checkpoint_ids=tuple(sorted(self.checkpoint_ids)),
            cutoffs=tuple(sorted(self.cutoffs)),
        )

    def _covariance(self) -> _Matrix:
        """Return the covariance (width, width) of the vectors seen."""
        count = max(self.num_finite, 1)
        mean = self.total / count
        return self.products / count - np.outer(mean, mean)


def _effective_rank(covariance: _Matrix) -> float:
    """Return exp(-sum p log p) over the eigenvalues' shares p; 0 for no variance."""
    eigenvalues = np.clip(np.linalg.eigvalsh(covariance), 0, None)
    if eigenvalues.sum() == 0:
        return 0.0
    shares = eigenvalues / eigenvalues.sum()
    shares = shares[shares > 0]
    return float(np.exp(-np.sum(shares * np.log(shares))))
