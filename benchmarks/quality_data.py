"""Reads what `objectives_data.py` wrote; needs torch, numpy, pyarrow and scikit-learn alone."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from behavior_pipeline.downstream.users import Population
from behavior_pipeline.encoder.architecture import Encoder
from behavior_pipeline.encoder.inference import encode_table, read_out
from behavior_pipeline.encoder.sequence_files import SequenceTable, read_in_order, sequence_files

RFM_COLUMNS = ("recency_days", "frequency", "monetary")
TARGET = "target:"
ALL_USERS = 1 << 40  # users of a chunk: more than there are


@dataclass(frozen=True)
class Cut:
    """One cutoff.

    Attributes:
        population: users with RFM and labels, sorted by id.
        aggregates: (N, F) aggregate features.
        sequences: the population's histories; rows are `rows`.
        rows: (N,) row of each user in `sequences`.
    """

    population: Population
    aggregates: np.ndarray
    sequences: SequenceTable
    rows: np.ndarray

    def embed(self, encoder: Encoder) -> np.ndarray:
        """Return the (N, D) embeddings of the population at the cutoff."""
        found = encode_table(encoder, self.sequences)
        embeddings = read_out(encoder, found.states, found.silence_days)
        embeddings[self.sequences.lengths == 0] = encoder.prior().float().cpu().numpy()
        return embeddings[self.rows]


@dataclass(frozen=True)
class PreparedFolder:
    """What every prepared folder has.

    Attributes:
        folder: where it is.
        about: source, cutoffs, sizes.
    """

    folder: Path
    about: dict[str, Any]

    @classmethod
    def at(cls, folder: Path) -> Self:
        """Open a folder."""
        return cls(folder, json.loads((folder / "about.json").read_text()))

    @property
    def vocabulary(self) -> Path:
        """Folder of the vocabulary, which counts up to the earliest train cutoff."""
        return self.folder / "vocabulary"


@dataclass(frozen=True)
class Prepared(PreparedFolder):
    """A folder of one train and one test cutoff."""

    def sequences(self, role: str) -> Path:
        """Folder of the sequences up to the `train` or `test` cutoff, of all users."""
        return self.folder / f"{role}_sequences"

    def moment(self, role: str) -> datetime:
        """Return a cutoff."""
        return datetime.fromisoformat(self.about[f"{role}_cutoff"])

    def cut(self, role: str, max_users: int) -> Cut:
        """Read one cutoff: of many users those whose ids have the smallest MD5, as in a report."""
        table = pq.read_table(self.folder / f"{role}_users.parquet")
        chosen = sample(table["user_id"].to_pylist(), max_users)
        features = pq.read_table(self.folder / f"{role}_aggregates.parquet")
        columns = [column.to_numpy() for column in features.columns]
        population = read_population(table.take(chosen), self.moment(role), len(table))
        sequences = self._sequences_of(role, population.user_ids)
        rows = pc.index_in(population.user_ids, value_set=sequences.user_ids).to_numpy()
        return Cut(population, np.column_stack(columns)[chosen], sequences, rows)

    def _sequences_of(self, role: str, user_ids: pa.Array) -> SequenceTable:
        """Return the histories of some users."""
        kept: SequenceTable | None = None
        for table in read_in_order(sequence_files(self.sequences(role)), ALL_USERS):
            is_wanted = pc.is_in(table.user_ids, value_set=user_ids).to_numpy(zero_copy_only=False)
            part = table.take(np.flatnonzero(is_wanted))
            kept = part if kept is None else kept.followed_by(part)
        assert kept is not None  # noqa: S101 - sequence_files refuses an empty folder
        return kept


def sample(user_ids: list[str], most: int) -> np.ndarray:
    """Return the places of at most so many users, in order; they depend on the ids alone."""
    digests = [hashlib.md5(user.encode(), usedforsecurity=False).hexdigest() for user in user_ids]
    return np.sort(np.argsort(np.array(digests), kind="stable")[:most])


def read_population(table: pa.Table, cutoff: datetime, num_users: int) -> Population:
    """Read users with RFM and labels; `num_users` is their number before the sample."""
    targets = [name for name in table.column_names if name.startswith(TARGET)]
    flags = {
        name: table[name].combine_chunks().to_numpy(zero_copy_only=False)
        for name in ("is_churned", *targets)
    }
    return Population(
        cutoff=cutoff,
        user_ids=table["user_id"].combine_chunks(),
        rfm=np.column_stack([table[name].to_numpy() for name in RFM_COLUMNS]),
        is_churned=flags["is_churned"],
        next_event_types=pa.nulls(len(table), pa.string()),
        positives={name.removeprefix(TARGET): flags[name] for name in targets},
        num_users=num_users,
    )
