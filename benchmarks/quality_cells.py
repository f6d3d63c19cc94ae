"""One cell of the comparison: a representation, a seed, a pair of cutoffs and a split of users.

Both probes are fitted on users, features and labels of the train cutoff alone and judged on those
of the test cutoff. What a probe loses on a held-out quarter of the users it is fitted on says, at
the train cutoff, which of the two suits a representation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from kept_results import KeptResults, Result
from quality_cutoffs import Moments, day_of, digest
from sklearn.metrics import average_precision_score

from behavior_pipeline.downstream.blocks import Block, Blocks, random_vectors, take
from behavior_pipeline.downstream.probes import (
    HELD_OUT,
    MIN_PROBABILITY,
    PENALTIES,
    PROBES,
    RFM_PENALTY,
    FittedProbes,
    Normalizer,
    ProbeName,
    fit_model,
    fit_probes,
    log_loss,
)
from behavior_pipeline.downstream.statistics import estimate_auroc
from behavior_pipeline.downstream.tasks import Task
from behavior_pipeline.downstream.users import Population
from behavior_pipeline.storage import writing_file

WITHOUT_SEED = ("rfm", "aggregates")
COMBINED = "aggregates+embedding"
OURS = ("embedding", COMBINED)
WITH_AGGREGATES = ("aggregates", COMBINED)
REPRESENTATIONS = (
    "random", "untrained", "rfm", "aggregates", "embedding", COMBINED, "supervised", "coles",
)  # fmt: skip
SHARES = {"1%": 0.01, "5%": 0.05, "25%": 0.25}
FEW = "1%"
"""A share of which a quarter is too few to choose by, and too few for trees of 20 users a leaf."""
NUM_FOLDS = 5
EVERYONE = "100%"
NEW_USERS = "new users"
SPLITS = (EVERYONE, NEW_USERS, *SHARES)
SPLIT_REPRESENTATIONS = ("rfm", "aggregates", "embedding", COMBINED)
"""What is judged on splits other than everyone."""
FEWEST = 20  # labelled users of a share at the least
RANDOM_WIDTH = 128
PROBE_SEED = 0  # of the held-out quarter: what varies is the encoder

Scores = dict[str, np.ndarray]
"""By `task/probe` the (N, targets) probabilities of the judged users."""


@dataclass(frozen=True)
class Cell:
    """What is measured at once.

    Attributes:
        representation: what probes see.
        seed: of its encoder, or of the labelled users.
        pair: number of the pair of cutoffs.
        split: who is fitted on, and who is judged.
    """

    representation: str
    seed: int
    pair: int
    split: str

    @property
    def name(self) -> str:
        """What its files are called, the seed apart."""
        split = self.split.replace("%", "pc").replace(" ", "_")
        return f"{self.representation}-{self.pair}-{split}"


@dataclass(frozen=True)
class Place:
    """Where a data set is and where its results go.

    Attributes:
        data: the prepared folder.
        out: results.
        about: what all results depend on.
        training: what those of our encoder depend on beside.
        is_finished: whether nothing is to be measured.
    """

    data: Path
    out: Path
    about: dict[str, Any]
    training: dict[str, Any]
    is_finished: bool = False

    @property
    def kept(self) -> KeptResults:
        """Finished cells."""
        return KeptResults(self.out / "cells", self.about, is_finished=self.is_finished)

    def vectors(self, name: str, seed: int) -> Path:
        """Return the file of a representation's vectors."""
        return self.out / "vectors" / f"{name}-{seed}.npz"

    def scores(self, cell: Cell) -> Path:
        """Return the file of a cell's probabilities."""
        return self.out / "scores" / f"{cell.name}-{cell.seed}.npz"


def measure_cell(place: Place, cell: Cell) -> Result | None:
    """Fit and judge both probes, now or before; None if that is not wanted."""
    return kept_cell(place, cell, lambda: _measure(place, cell))


def kept_cell(place: Place, cell: Cell, measure: Any) -> Result | None:
    """Return a cell that is there with its probabilities, or measure it and keep it."""
    if not place.scores(cell).is_file() and not place.is_finished:
        (place.out / "cells" / f"{cell.name}-{cell.seed}.json").unlink(missing_ok=True)
    more: dict[str, Any] = {}
    if cell.representation in OURS:
        more["training"] = place.training
    if cell.split == FEW:
        more["few"] = NUM_FOLDS
    if cell.representation in WITH_AGGREGATES:
        more["aggregates"] = _opened(place.data).aggregates_digest
    return place.kept.result(cell.name, cell.seed, measure, **more)


def _measure(place: Place, cell: Cell) -> Result:
    """Fit and judge both probes."""
    data = _opened(place.data)
    pair = data.pairs[cell.pair]
    before, after = (data.users(moment) for moment in pair)
    fit_rows, judged_rows = rows_of(cell, before, after)
    train = take(blocks_of(place, data, cell, pair[0]), fit_rows)
    test = take(blocks_of(place, data, cell, pair[1]), judged_rows)
    result: Result = {}
    scores: Scores = {}
    for task in data.tasks(pair):
        labels = [each[fit_rows] for each in task.train_labels]
        for probe, (fitted, loss) in fitted_probes(cell, train, labels).items():
            found = positive(fitted, test)
            scores[f"{task.name}/{probe}"] = found
            told = {**means(task, judged_rows, found), "held_out_loss": loss}
            result[f"{task.name}/{probe}"] = told
    write_scores(place.scores(cell), scores)
    return result


def fitted_probes(
    cell: Cell, train: Blocks, labels: Sequence[np.ndarray]
) -> dict[str, tuple[FittedProbes, float]]:
    """Return by probe what was fitted, and what it loses on a held-out quarter."""
    if cell.split == FEW:
        return {"logistic_regression": (fit_few(train, labels), 0.0)}  # nothing to choose
    return {
        probe: (
            fit_probes(probe, train, labels, PROBE_SEED, 1),
            held_out_loss(probe, train, labels),
        )
        for probe in PROBES
    }


def fit_few(train: Blocks, labels: Sequence[np.ndarray]) -> FittedProbes:
    """Fit logistic regression where a quarter of the users is too few to choose the penalty by.

    Every user is held out once, in one of five folds. RFM keeps the penalty it has with all labels.
    """
    normalizer = Normalizer().fit(train)
    columns = normalizer.transform(train)
    folds = np.arange(len(columns)) % NUM_FOLDS  # rows are in the order of ids: no order in time
    penalty = RFM_PENALTY
    if any(block.kind != "rfm" for block in train):
        losses = [folded_loss(columns, labels, folds, each) for each in PENALTIES]
        penalty = PENALTIES[int(np.argmin(losses))]
    models = tuple(fit_model("logistic_regression", columns, y, penalty) for y in labels)
    return FittedProbes("logistic_regression", penalty, normalizer.transform, models)


def folded_loss(
    columns: np.ndarray, labels: Sequence[np.ndarray], folds: np.ndarray, penalty: float
) -> float:
    """Return the mean log loss of users left out, over folds and targets."""
    losses = []
    for fold in range(NUM_FOLDS):
        kept, held_out = folds != fold, folds == fold
        for y in labels:
            model = fit_model("logistic_regression", columns[kept], y[kept], penalty)
            losses.append(log_loss(model, columns[held_out], y[held_out]))
    return float(np.mean(losses))


@lru_cache(maxsize=4)
def _opened(folder: Path) -> Moments:
    """Open a folder once a process."""
    return Moments.at(folder)


def blocks_of(place: Place, data: Moments, cell: Cell, moment: datetime) -> Blocks:
    """Return what a probe sees of the users of a moment."""
    population = data.users(moment)
    name = cell.representation
    if name == "rfm":
        return (Block("rfm", population.rfm),)
    if name == "aggregates":
        return (Block("aggregates", data.aggregates(moment)),)
    if name == "random":
        noise = random_vectors(population.user_ids, moment, RANDOM_WIDTH, cell.seed)
        return (Block("vector", noise),)
    source = "embedding" if name == COMBINED else name
    vector = Block("vector", read_arrays(place.vectors(source, cell.seed))[day_of(moment)])
    return (Block("aggregates", data.aggregates(moment)), vector) if name == COMBINED else (vector,)


def rows_of(cell: Cell, before: Population, after: Population) -> tuple[np.ndarray, np.ndarray]:
    """Return who of the train cutoff is fitted on, and who of the test cutoff is judged.

    Shares of the labels are nested and depend on the seed alone, so every representation gets the
    same. `new users`: half of all users, by a hash of their ids, are fitted on, the others judged.
    """
    everyone = np.arange(len(before)), np.arange(len(after))
    if cell.split in SHARES:
        num = max(FEWEST, math.ceil(SHARES[cell.split] * len(before)))
        order = np.random.default_rng(cell.seed).permutation(len(before))
        return np.sort(order[:num]), everyone[1]
    if cell.split == NEW_USERS:
        is_fitted_on, is_judged = half_of(before), ~half_of(after)
        return np.flatnonzero(is_fitted_on), np.flatnonzero(is_judged)
    return everyone


def half_of(users: Population) -> np.ndarray:
    """Return who is in the half that is fitted on: the last digit of the id's MD5 is even."""
    return np.array([int(digest(user)[-1], 16) % 2 == 0 for user in users.user_ids.to_pylist()])


def positive(fitted: FittedProbes, blocks: Blocks) -> np.ndarray:
    """Return the (N, targets) probabilities of the positive class, also if only one was seen."""
    columns = [
        found[:, 1] if len(model.classes_) > 1 else np.full(len(found), float(model.classes_[0]))
        for model, found in zip(fitted.models, fitted.predict(blocks), strict=True)
    ]
    return np.column_stack(columns).astype(np.float32)


def held_out_loss(probe: ProbeName, train: Blocks, labels: Sequence[np.ndarray]) -> float:
    """Return the mean log loss of targets on a quarter of the users that is not fitted on."""
    num_users = len(labels[0])
    order = np.random.default_rng(PROBE_SEED + 1).permutation(num_users)
    num_held_out = max(1, int(num_users * HELD_OUT))
    held_out, kept = order[:num_held_out], order[num_held_out:]
    fitted = fit_probes(probe, take(train, kept), [each[kept] for each in labels], PROBE_SEED, 1)
    found = positive(fitted, take(train, held_out))
    actual = np.column_stack([each[held_out] for each in labels])
    chosen = np.where(actual, found, 1 - found)
    return float(-np.log(chosen.clip(min=MIN_PROBABILITY)).mean())


def means(task: Task, rows: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """Return AUROC and average precision, means over targets with both classes among the judged."""
    labels = [each[rows] for each in task.test_labels]
    pairs = [(y, s) for y, s in zip(labels, scores.T, strict=True) if 0 < y.sum() < len(y)]
    none = np.empty((0, len(rows)), np.uint16)
    return {
        "auroc": float(np.mean([estimate_auroc(y, s, none).value for y, s in pairs])),
        "average_precision": float(np.mean([average_precision_score(y, s) for y, s in pairs])),
    }


def write_scores(path: Path, scores: Scores) -> None:
    """Write arrays in single precision, at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing_file(path) as aside, aside.open("wb") as file:
        np.savez_compressed(
            file, **{name: each.astype(np.float32) for name, each in scores.items()}
        )


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read what `write_scores` wrote."""
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}
