"""Real sequences for the encoder's benchmark: the users who count, and padded batches of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from behavior_pipeline.encoder.sequence_files import SequenceTable, read_in_order, sequence_files

ROW_GROUP_USERS = 8192
MASK_SHARE = 0.15
MASK, PAD, NO_LABEL = 2, 0, -100


class Padded(NamedTuple):
    """A padded batch of one id an event.

    Attributes:
        ids: (B, T) int64, 0 where there is no event.
        is_event: (B, T) int64, 1 where there is one.
        labels: what was hidden, (B, T) int64; -100 where nothing was.
        num_events: events in the batch.
    """

    ids: Tensor
    is_event: Tensor
    labels: Tensor
    num_events: int

    def to(self, device: torch.device) -> Padded:
        """Return the batch on a device."""
        return Padded(
            self.ids.to(device), self.is_event.to(device), self.labels.to(device), self.num_events
        )


def keep_users(sequences: Path, target: Path, min_events: int, max_users: int) -> Path:
    """Write the users with so many events or more to a folder, in row groups; return it."""
    target.mkdir(parents=True)
    left = max_users
    for path in sequence_files(sequences):
        table = pq.read_table(path)
        table = table.filter(pc.greater_equal(table["num_events"], min_events))[:left]
        left -= len(table)
        if len(table):
            pq.write_table(table, target / path.name, row_group_size=ROW_GROUP_USERS)
    return target


def read_users(folder: Path, max_users: int) -> SequenceTable:
    """Return the first so many users, in the order of the files."""
    tables = read_in_order(sequence_files(folder), max_users)
    found = next(tables)
    for more in tables:
        if len(found) >= max_users:
            break
        found = found.followed_by(more)
    return found.take(np.arange(min(max_users, len(found))))


def describe(folder: Path, max_events: int) -> dict[str, object]:
    """Return how many users and events a folder holds, and how long the sequences are."""
    files = sequence_files(folder)
    columns = [pq.read_table(path, columns=["num_events"])["num_events"] for path in files]
    counts = pa.chunked_array([chunk for column in columns for chunk in column.chunks]).to_numpy()
    kept = np.minimum(counts, max_events)
    quarters = np.percentile(kept, (25, 50, 75))
    return {
        "users": len(counts),
        "events": int(counts.sum()),
        "mean_length": round(float(kept.mean()), 1),
        "quartiles": quarters.tolist(),
    }


def padded_batches(
    table: SequenceTable, users_a_batch: int, length: int, seed: int = 0
) -> Iterator[Padded]:
    """Yield all users in random order, newest events, padded to one length, 15 % hidden.

    As one would write it for a masked-language-model head over the actions; the last users, who
    do not fill a batch, are left out.
    """
    random = np.random.default_rng(seed)
    order = random.permutation(len(table))
    for begin in range(0, len(order) - users_a_batch + 1, users_a_batch):
        ids = newest_actions(table, order[begin : begin + users_a_batch], length)
        is_event = ids != PAD
        hidden = is_event & (random.random(ids.shape) < MASK_SHARE)
        labels = np.where(hidden, ids, NO_LABEL)
        parts = (np.where(hidden, MASK, ids), is_event.astype(np.int64), labels)
        yield Padded(*map(torch.from_numpy, parts), int(is_event.sum()))


def newest_actions(table: SequenceTable, users: np.ndarray, length: int) -> np.ndarray:
    """Return the newest actions of users, right padded, (n, length) int64."""
    ends = table.offsets[users + 1]
    kept = np.minimum(ends - table.offsets[users], length)
    places = np.arange(length)
    is_event = places < kept[:, None]
    source = np.where(is_event, (ends - kept)[:, None] + places, 0)
    return np.where(is_event, table.ids["action"][source], PAD).astype(np.int64)
