"""What it costs to leave published embeddings as they are while they have moved by little.

Nights are embedded one after another with a home's live checkpoint. For each bound the rows that
services would read are followed from night to night: a row is published anew if its user's state
changed, its vector moved by more than the bound, or it is REFRESH_DAYS old. At the end the churn
probe, fitted on fresh vectors at the train cutoff, reads the served vectors and the fresh ones.

The home is written to: give a copy of one in which `behavior-pipeline run` has finished.

    python benchmarks/published_drift.py COPY/online_retail_ii --path RAW.parquet
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.metrics import roc_auc_score

from behavior_pipeline.downstream.blocks import Block
from behavior_pipeline.downstream.population import load_population
from behavior_pipeline.downstream.probes import fit_probes
from behavior_pipeline.downstream.tasks import churn_task
from behavior_pipeline.embeddings.changes import REFRESH_DAYS
from behavior_pipeline.embeddings.inference import embed_sequences
from behavior_pipeline.embeddings.states import newest_states, to_vectors
from behavior_pipeline.encoder.live import checkpoint_folder
from behavior_pipeline.pipeline import Pipeline, open_pipeline
from behavior_pipeline.sequences.files import write_sequences
from behavior_pipeline.sequences.vocabulary import load_vocabulary
from behavior_pipeline.windows import parse_cutoff

BOUNDS = (0.0, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2)
FRESH = -1.0  # stands for what a full publication would serve
RESAMPLES = 500
NIGHTS = REFRESH_DAYS - 1  # at the end rows are as old as they ever are


@dataclass
class Night:
    """Everybody at a cutoff: ids, what states were computed from, vectors (n, D)."""

    users: list[str]
    fingerprints: list[bytes]
    vectors: np.ndarray


def embed(pipeline: Pipeline, cutoff: datetime) -> Night:
    """Tokenize and embed a night, and read it."""
    storage = pipeline.storage
    checkpoint = checkpoint_folder(storage.checkpoints)
    earlier = sorted(storage.sequences(cutoff).parent.glob("cutoff=*"))
    write_sequences(
        storage, pipeline.settings, load_vocabulary(checkpoint), cutoff,
        storage.sequences(cutoff), earlier=earlier,
    )  # fmt: skip
    states = storage.states(cutoff)
    embed_sequences(
        storage.sequences(cutoff), checkpoint, states, storage.embeddings(cutoff), cutoff,
        written_at=datetime.now(UTC), previous_states_folder=newest_states([states]), threads=1,
    )  # fmt: skip
    table, kept = _read(storage.embeddings(cutoff)), _read(states)
    width = table.schema.field("embedding").type.list_size
    return Night(
        table["user_id"].to_pylist(), kept["fingerprint"].to_pylist(),
        to_vectors(table["embedding"], width),
    )  # fmt: skip


def _read(folder: Path) -> pa.Table:
    files = sorted(path for path in folder.glob("bucket=*") if "prior" not in path.name)
    return pa.concat_tables([pq.read_table(path) for path in files])


@dataclass
class Store:
    """What services read under a bound."""

    bound: float
    rows: dict[str, tuple[int, bytes, np.ndarray]]
    published: list[float]

    def publish(self, number: int, night: Night) -> None:
        """Publish a night by its number."""
        num_changed = 0
        for user, made_of, fresh in zip(
            night.users, night.fingerprints, night.vectors, strict=True
        ):
            row = self.rows.get(user)
            if row is None or self._is_changed(row, number, made_of, fresh):
                self.rows[user] = (number, made_of, fresh)
                num_changed += 1
        self.published.append(num_changed / len(night.users))

    def _is_changed(
        self, row: tuple[int, bytes, np.ndarray], number: int, made_of: bytes, fresh: np.ndarray
    ) -> bool:
        since, before, vector = row
        if before != made_of or number - since >= REFRESH_DAYS:
            return True
        return bool(np.linalg.norm(fresh - vector) > self.bound * np.linalg.norm(vector))


def churn_auroc(
    pipeline: Pipeline,
    train: tuple[datetime, Night],
    test: tuple[datetime, Night],
    readings: dict[float, np.ndarray],
) -> dict[float, dict[str, Any]]:
    """Return what the churn probe, fitted on fresh vectors, makes of each reading.

    That is its AUROC, how much less that is than on fresh vectors, and the 95 % interval of the
    loss over resampled users, the same ones for both.
    """
    people = [load_population(pipeline.storage, pipeline.settings, c, []) for c, _ in (train, test)]
    task = churn_task(*people)
    fitted_on = train[1].vectors[_places(train[1], people[0].user_ids)][task.train_rows]
    probes = fit_probes(
        "logistic_regression", (Block("vector", fitted_on),), task.train_labels,
        pipeline.settings.seed, 1,
    )  # fmt: skip
    rows, (labels,) = _places(test[1], people[1].user_ids)[task.test_rows], task.test_labels
    scores = {
        bound: probes.predict((Block("vector", vectors[rows]),))[0][:, 1]
        for bound, vectors in readings.items()
    }
    samples = np.random.default_rng(0).integers(len(labels), size=(RESAMPLES, len(labels)))
    fresh = [roc_auc_score(labels[drawn], scores[FRESH][drawn]) for drawn in samples]
    found = {}
    for bound, score in scores.items():
        auroc = float(roc_auc_score(labels, score))
        lost = np.array(fresh) - [roc_auc_score(labels[drawn], score[drawn]) for drawn in samples]
        found[bound] = {
            "churn_auroc": auroc,
            "lost": float(roc_auc_score(labels, scores[FRESH])) - auroc,
            "lost_95": [float(edge) for edge in np.quantile(lost, (0.025, 0.975))],
        }
    return found


def _places(night: Night, users: pa.Array) -> np.ndarray:
    known = {user: place for place, user in enumerate(night.users)}
    return np.array([known[user] for user in users.to_pylist()])


def measure(home: Path, path: str, cutoff: datetime, horizon: timedelta) -> list[dict[str, Any]]:
    """Follow the nights before a cutoff under every bound."""
    pipeline = open_pipeline(data_root=str(home.parent), source=home.name, path=path)
    train = embed(pipeline, cutoff - horizon)
    stores = [Store(bound, {}, []) for bound in BOUNDS]
    for number in range(NIGHTS + 1):
        night = embed(pipeline, cutoff - timedelta(days=NIGHTS - number))
        for store in stores:
            store.publish(number, night)
    readings = {s.bound: np.stack([s.rows[user][2] for user in night.users]) for s in stores}
    readings[FRESH] = night.vectors
    found = churn_auroc(pipeline, (cutoff - horizon, train), (cutoff, night), readings)
    return [
        {
            "bound": store.bound,
            "published_share": float(np.mean(store.published[1:])),
            "num_users": len(night.users),
            "num_nights": NIGHTS,
        }
        | found[store.bound]
        for store in stores
    ]


def main() -> None:
    """Print a JSON line per bound."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("home", type=Path)
    parser.add_argument("--path", required=True, help="raw events of the home")
    parser.add_argument("--cutoff", type=parse_cutoff, default=parse_cutoff("2011-11-09"))
    parser.add_argument("--horizon-days", type=int, default=30)
    given = parser.parse_args()
    horizon = timedelta(days=given.horizon_days)
    for row in measure(given.home.resolve(), given.path, given.cutoff, horizon):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
