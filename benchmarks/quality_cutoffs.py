"""Reads what `quality_prepare.py` wrote; needs torch, numpy, pyarrow and scikit-learn alone.

Sequences are kept once, up to the last test cutoff. Whoever asks for a moment gets them cut there,
so nothing that happened at or after a moment reaches what is computed at it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from quality_data import Cut, PreparedFolder, read_population

from behavior_pipeline.contracts import SEQUENCES
from behavior_pipeline.downstream.tasks import Task, churn_task, propensity_task
from behavior_pipeline.downstream.users import Population
from behavior_pipeline.encoder.sequence_files import places_between, read_table
from behavior_pipeline.storage import writing_file

SEQUENCES_FILE = "sequences.parquet"
MAX_EVENTS = 512  # newest events of a user that are read at a moment, as the pipeline's default
NUM_SCALARS = 6  # columns of a sequence table before its lists
TASKS = ("churn", "propensity")

Pair = tuple[datetime, datetime]
"""A train cutoff and its test cutoff, one horizon later."""


@dataclass(frozen=True)
class Moments(PreparedFolder):
    """A prepared folder: users, features and labels at every moment, and sequences."""

    @property
    def name(self) -> str:
        """What the data set is called."""
        return str(self.about["source"])

    @property
    def trained_through(self) -> datetime:
        """The earliest train cutoff: encoders see nothing at or after it."""
        return datetime.fromisoformat(self.about["trained_through"])

    @property
    def pairs(self) -> list[Pair]:
        """Train and test cutoffs, in order."""
        texts = self.about["pairs"]
        return [(datetime.fromisoformat(a), datetime.fromisoformat(b)) for a, b in texts]

    @property
    def moments(self) -> list[datetime]:
        """All cutoffs, in order."""
        return sorted({moment for pair in self.pairs for moment in pair})

    @cached_property
    def all_sequences(self) -> pa.Table:
        """Whole histories up to the last test cutoff: of judged users and of training users."""
        return pq.read_table(self.folder / SEQUENCES_FILE)

    @cached_property
    def aggregates_digest(self) -> str:
        """A hash of the aggregates at all moments, whose columns the marts may come to change."""
        found = hashlib.md5(usedforsecurity=False)
        for path in sorted(self.folder.glob("aggregates_*.parquet")):
            found.update(path.read_bytes())
        return found.hexdigest()

    def write_training_sequences(self, folder: Path) -> Path:
        """Write what encoders are trained on, as the pipeline would have at `trained_through`."""
        folder.mkdir(parents=True, exist_ok=True)
        table = self.training_sequences()
        with writing_file(folder / "bucket=000.parquet") as aside:
            pq.write_table(table, aside, row_group_size=4096, compression="zstd")
        return folder

    def training_sequences(self) -> pa.Table:
        """Return training users' events before `trained_through`.

        Who trains depends on ids and on events before `trained_through` alone: whoever has one,
        and an MD5 of at most `training_digest`.
        """
        table = cut(self.all_sequences, self.trained_through)
        table = table.filter(pc.greater(table["num_events"], 0))
        most = self.about["training_digest"]
        return table.filter(pa.array([digest(each) <= most for each in ids_of(table)]))

    def users(self, moment: datetime) -> Population:
        """Read users with RFM and labels at a moment."""
        day = day_of(moment)
        table = pq.read_table(self.folder / f"users_{day}.parquet")
        return read_population(table, moment, self.about["population"][day])

    def aggregates(self, moment: datetime) -> np.ndarray:
        """Read the (N, F) aggregates of the users of a moment."""
        table = pq.read_table(self.folder / f"aggregates_{day_of(moment)}.parquet")
        return np.column_stack([column.to_numpy() for column in table.columns])

    def cut(self, moment: datetime) -> Cut:
        """Read users, features and histories at a moment."""
        population, known = self.users(moment), self.all_sequences
        rows = pc.index_in(population.user_ids, value_set=known["user_id"].combine_chunks())
        sequences = read_table(cut(known.take(rows), moment), str(self.folder))
        places = np.arange(len(population))
        return Cut(population, self.aggregates(moment), sequences, places)

    def tasks(self, pair: Pair) -> list[Task]:
        """Return churn and propensity of a train and a test cutoff, those that can be measured."""
        before, after = (self.users(moment) for moment in pair)
        found = (churn_task(before, after), propensity_task(before, after))
        return [task for task in found if task.targets]


def cut(table: pa.Table, moment: datetime, max_events: int = MAX_EVENTS) -> pa.Table:
    """Return whole histories as tokenization at an earlier moment would have written them.

    Args:
        table: under contracts.SEQUENCES; no list is cut, so gaps are those to the event before.
        moment: only events before it are kept.
        max_events: newest events that are kept of a user.
    """
    table = table.combine_chunks()
    times = table["occurred_at"].combine_chunks()
    ends_of_all = np.cumsum(pc.list_value_length(times).to_numpy(zero_copy_only=False))
    first = np.concatenate(([0], ends_of_all[:-1])).astype(np.int64)
    micros = times.flatten().cast(pa.timestamp("us", "UTC")).cast(pa.int64()).to_numpy()
    bound = pa.scalar(moment, pa.timestamp("us", "UTC")).cast(pa.int64()).as_py()
    is_before = np.concatenate(([0], np.cumsum(micros < bound)))
    num_events = is_before[ends_of_all] - is_before[first]
    end = first + num_events
    begin = np.maximum(first, end - max_events)
    return _cut_at(table, moment, first, begin, end)


def _cut_at(
    table: pa.Table, moment: datetime, first: np.ndarray, begin: np.ndarray, end: np.ndarray
) -> pa.Table:
    """Return the flat places [begin, end) of each user; their histories start at `first`."""
    _, kept = places_between(begin, end)
    offsets = pa.array(np.concatenate(([0], np.cumsum(end - begin))), pa.int32())
    is_empty = pa.array(first == end)
    times = table["occurred_at"].combine_chunks().flatten()

    def times_at(places: np.ndarray) -> pa.Array:
        chosen = pc.if_else(is_empty, pa.scalar(None, pa.int64()), pa.array(places, pa.int64()))
        return times.take(chosen)

    columns = {
        "user_id": table["user_id"].combine_chunks(),
        "observation_cutoff": pa.repeat(pa.scalar(moment), len(table)),
        "vocabulary_id": table["vocabulary_id"].combine_chunks(),
        "num_events": pa.array(end - first),
        "first_event_at": times_at(first),
        "last_event_at": times_at(end - 1),
    }
    for name in SEQUENCES.schema.names[NUM_SCALARS:]:
        values = table[name].combine_chunks().flatten().take(pa.array(kept))
        columns[name] = pa.ListArray.from_arrays(offsets, values)
    return pa.table(columns).cast(SEQUENCES.schema)


def day_of(moment: datetime) -> str:
    """Return a cutoff as file names and tables show it."""
    return f"{moment:%Y-%m-%d}"


def digest(user_id: str) -> str:
    """Return the MD5 of an id: who is sampled depends on it alone."""
    return hashlib.md5(user_id.encode(), usedforsecurity=False).hexdigest()


def ids_of(table: pa.Table) -> list[str]:
    """Return the users of a table."""
    ids: list[str] = table["user_id"].to_pylist()
    return ids
