"""Two probes on frozen representations: logistic regression and gradient boosting.

Both are small and fixed, so that a score speaks of the representation and not of the tuning:

- `logistic_regression` sees RFM and other aggregates through a quantile transform to the normal
  distribution (they are heavy-tailed) and vectors standardized. Each kind of block is divided by
  the root of its number of columns, so that three RFM columns weigh as much as a hundred
  dimensions, and C is the one of `PENALTIES` with the lowest mean log loss over the task's targets
  on a held-out quarter of the training users. RFM alone stays undivided and has C = 1.
- `gradient_boosting` sees the plain columns: 60 histogram trees of 15 leaves, no early stopping.

Every fit runs on one thread, and fits run side by side: results do not depend on the number of
threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import QuantileTransformer, StandardScaler
from threadpoolctl import threadpool_limits

from behavior_pipeline.downstream.blocks import Block, Blocks, stack
from behavior_pipeline.downstream.boosting import Bins, fit_boosting

ProbeName = Literal["logistic_regression", "gradient_boosting"]
Floats = NDArray[np.float64]
Labels = NDArray[Any]
"""(N,) classes: booleans, or integers of a multiclass target."""

PROBES: Final[tuple[ProbeName, ...]] = ("logistic_regression", "gradient_boosting")
RFM_PENALTY: Final = 1.0
PENALTIES: Final = (0.1, 1.0, 10.0, 100.0)
HELD_OUT: Final = 0.25
MAX_QUANTILES: Final = 1000
MIN_PROBABILITY: Final = 1e-6
BOOSTING: Final = {
    "max_iter": 60,
    "learning_rate": 0.1,
    "max_leaf_nodes": 15,
    "min_samples_leaf": 20,
    "max_bins": 63,
    "l2_regularization": 1.0,
    "early_stopping": False,
}

_SCALES: Final[WeakKeyDictionary[Block, Any]] = WeakKeyDictionary()
"""Scales of blocks: several representations and tasks read the same one."""

Given = TypeVar("Given")
Made = TypeVar("Made")


class Normalizer:
    """Columns as logistic regression likes them: each block of like scale and like weight."""

    def __init__(self) -> None:
        self._transformers: list[Any] = []

    def fit(self, blocks: Blocks) -> Normalizer:
        """Learn the scale of each block from the training users."""
        self._transformers = [_scale(block) for block in blocks]
        return self

    def transform(self, blocks: Blocks) -> Floats:
        """Return the (N, F) normalized columns; RFM alone keeps the unit scale of its quantiles."""
        columns = [
            transformer.transform(block.values.astype(np.float64)) / _weight(block.kind, blocks)
            for transformer, block in zip(self._transformers, blocks, strict=True)
        ]
        return np.hstack(columns)


@dataclass(frozen=True)
class Constant:
    """Stands in for a model where the training users have one class."""

    classes_: NDArray[Any]

    def predict_proba(self, columns: Floats) -> Floats:
        """Return (N, 1) ones: the only class is certain."""
        return np.ones((len(columns), 1))


@dataclass(frozen=True)
class FittedProbes:
    """One fitted model per target, over the same columns.

    Attributes:
        name: which probe.
        penalty: C of logistic regression, None for gradient boosting.
        columns: blocks to the (N, F) columns that the models read.
        models: with `classes_` and `predict_proba`, one per target.
    """

    name: ProbeName
    penalty: float | None
    columns: Callable[[Blocks], Floats]
    models: tuple[Any, ...]

    def predict(self, blocks: Blocks) -> list[Floats]:
        """Return for each target the (N, K) probabilities, in the order of its `classes_`."""
        columns = self.columns(blocks)
        with threadpool_limits(1):
            return [model.predict_proba(columns) for model in self.models]


def fit_probes(
    name: ProbeName, blocks: Blocks, labels: Sequence[Labels], seed: int, threads: int
) -> FittedProbes:
    """Fit a probe for each of several targets of the same users.

    Args:
        name: which probe.
        blocks: the representation of N training users.
        labels: one (N,) array per target.
        seed: of the held-out quarter.
        threads: fits at the same time.
    """
    columns, penalty = prepare(name, blocks, labels, seed, threads)
    matrix = columns(blocks)
    bins = Bins()

    def fit(target: Labels) -> Any:
        return fit_model(name, matrix, target, penalty, bins)

    first = in_parallel(fit, labels[:1], 1)  # it makes the bins that the rest share
    rest = in_parallel(fit, labels[1:], threads)
    return FittedProbes(name, penalty, columns, (*first, *rest))


def prepare(
    name: ProbeName, blocks: Blocks, labels: Sequence[Labels], seed: int, threads: int
) -> tuple[Callable[[Blocks], Floats], float | None]:
    """Return what turns blocks into columns, and the penalty that fits them (None for boosting)."""
    if name == "gradient_boosting":
        return stack, None
    normalizer = Normalizer().fit(blocks)
    if all(block.kind == "rfm" for block in blocks):
        return normalizer.transform, RFM_PENALTY
    return normalizer.transform, choose_penalty(normalizer.transform(blocks), labels, seed, threads)


def choose_penalty(columns: Floats, labels: Sequence[Labels], seed: int, threads: int) -> float:
    """Return the C of the lowest mean log loss on a held-out quarter; the smallest at a tie."""
    shuffled = np.random.default_rng(seed).permutation(len(columns))
    num_held_out = int(len(columns) * HELD_OUT)
    held_out, kept = shuffled[:num_held_out], shuffled[num_held_out:]
    usable = [y for y in labels if len(np.unique(y[kept])) > 1]
    if not usable or not num_held_out:
        return RFM_PENALTY

    def loss(penalty: float) -> float:
        models = [fit_model("logistic_regression", columns[kept], y[kept], penalty) for y in usable]
        pairs = zip(models, usable, strict=True)
        return float(np.mean([log_loss(m, columns[held_out], y[held_out]) for m, y in pairs]))

    losses = in_parallel(loss, PENALTIES, threads)
    return PENALTIES[int(np.argmin(losses))]


def log_loss(model: Any, columns: Floats, labels: Labels) -> float:
    """Return the mean negative log probability of the true class; an unknown one costs most."""
    probabilities = model.predict_proba(columns)
    places = np.searchsorted(model.classes_, labels).clip(max=len(model.classes_) - 1)
    is_known = model.classes_[places] == labels
    chosen = probabilities[np.arange(len(labels)), places] * is_known
    return float(-np.log(chosen.clip(min=MIN_PROBABILITY)).mean())


def fit_model(
    name: ProbeName,
    columns: Floats,
    labels: Labels,
    penalty: float | None,
    bins: Bins | None = None,
) -> Any:
    """Fit one model on (N, F) columns; one class alone makes a `Constant`.

    Boosted models on the same columns may share their `bins`.
    """
    classes = np.unique(labels)
    if len(classes) == 1:
        return Constant(classes)
    if name == "logistic_regression":
        return LogisticRegression(C=penalty, max_iter=1000).fit(columns, labels)
    return fit_boosting(columns, labels, BOOSTING, bins)


def in_parallel(
    function: Callable[[Given], Made], items: Sequence[Given], threads: int
) -> list[Made]:
    """Return the function of each item, computed side by side, each on one thread.

    The limit on BLAS is the process's, so it is set once around; the limit on OpenMP belongs to the
    calling thread, so each sets its own.
    """

    def alone(item: Given) -> Made:
        with threadpool_limits(1, user_api="openmp"):
            return function(item)

    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(threads) as pool:
        return list(pool.map(alone, items))


def _scale(block: Block) -> Any:
    """Return the scale of a block, learned when it is met first."""
    if block not in _SCALES:
        is_vector = block.kind == "vector"
        scale = StandardScaler() if is_vector else _quantiles(len(block.values))
        _SCALES[block] = scale.fit(block.values.astype(np.float64))
    return _SCALES[block]


def _quantiles(num_users: int) -> QuantileTransformer:
    """Return the transform to the normal distribution, by at most a thousand quantiles."""
    return QuantileTransformer(
        n_quantiles=min(MAX_QUANTILES, num_users), output_distribution="normal", random_state=0
    )


def _weight(kind: str, blocks: Blocks) -> float:
    """Return what a block's columns are divided by."""
    if kind == "rfm" and len(blocks) == 1:
        return 1.0
    width = sum(block.values.shape[1] for block in blocks if block.kind == kind)
    return float(np.sqrt(width))
