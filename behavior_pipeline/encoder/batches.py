"""Padded batches of events, and the reader that makes them for inference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from behavior_pipeline.contracts import PAD_ID, TOKEN_FIELDS
from behavior_pipeline.encoder.configuration import EncoderConfig
from behavior_pipeline.encoder.sequence_files import (
    MICROSECONDS_A_DAY,
    Ints,
    SequenceTable,
    read_in_order,
)

CHUNK_USERS: Final = 16_384
"""Users read into memory at once for inference."""

BATCH_TOKENS: Final = 8192
"""Padded tokens of an inference batch."""


@dataclass(frozen=True)
class EventBatch:
    """Histories of B users, right padded to T events.

    Attributes:
        ids: token ids per field, (B, T) int64; PAD where there is no event.
        gap_days: days since the event before, (B, T) float32; 0 where there is no event.
        lengths: events of each user, (B,) int64.
        silence_days: days from each last event to the cutoff, (B,) float32.
        before: what came before the first event that is read, (B, 3) float32: number of events,
            days since the very first event, number of visits.
        users: which user each row is, as its place in what was read; rows after the last of them
            are filling.
    """

    ids: Mapping[str, Tensor]
    gap_days: Tensor
    lengths: Tensor
    silence_days: Tensor
    before: Tensor
    users: NDArray[np.int64]

    @classmethod
    def from_tensors(
        cls,
        ids: Mapping[str, Tensor],
        gap_days: Tensor,
        silence_days: Tensor | None,
        before: Tensor | None,
    ) -> EventBatch:
        """Make a batch of tensors that are (B, T); a place whose action is PAD holds no event."""
        is_event = ids["action"] != PAD_ID
        batch = len(gap_days)
        nothing = gap_days.new_zeros(batch, dtype=torch.float32)
        return cls(
            ids=ids,
            gap_days=torch.where(is_event, gap_days.float(), 0.0),
            lengths=is_event.sum(1),
            silence_days=nothing if silence_days is None else silence_days.float(),
            before=gap_days.new_zeros(batch, 3) if before is None else before.float(),
            users=np.arange(batch),
        )

    def to(self, device: torch.device | str) -> EventBatch:
        """Return the batch on a device."""
        return replace(
            self,
            ids={name: values.to(device) for name, values in self.ids.items()},
            gap_days=self.gap_days.to(device),
            lengths=self.lengths.to(device),
            silence_days=self.silence_days.to(device),
            before=self.before.to(device),
        )

    @property
    def num_users(self) -> int:
        """Rows that are users; those after them are filling."""
        return len(self.users)


def pad(
    table: SequenceTable,
    users: Ints,
    starts: Ints,
    lengths: Ints,
    shape: tuple[int, int],
) -> EventBatch:
    """Cut one run of events per user out of a table and pad it.

    Args:
        table: where the events are.
        users: rows of the table, n.
        starts: flat place of each run's first event, n.
        lengths: events of each run, n.
        shape: rows and columns (B, T) of the batch; rows from n on are filling.

    Returns:
        A batch with silence 0.
    """
    rows, columns = shape
    places = np.arange(columns)
    is_event = places < lengths[:, None]
    source = np.where(is_event, starts[:, None] + places, 0)

    def fill(flat: NDArray[np.generic], dtype: type[np.generic]) -> Tensor:
        padded = np.zeros(shape, dtype)
        if len(flat):
            padded[: len(users)] = np.where(is_event, flat[source], 0)
        return torch.from_numpy(padded)

    before = np.zeros((rows, 3), np.float32)
    before[: len(users)] = table.before(users, starts)
    all_lengths = np.zeros(rows, np.int64)
    all_lengths[: len(users)] = lengths
    return EventBatch(
        ids={field: fill(table.ids[field], np.int64) for field in TOKEN_FIELDS},
        gap_days=fill(table.gap_days, np.float32),
        lengths=torch.from_numpy(all_lengths),
        silence_days=torch.zeros(rows),
        before=torch.from_numpy(before),
        users=users,
    )


def padded_length(lengths: Ints, max_events: int) -> Ints:
    """Return the length that each length is padded to: 8, 12, 16, 24, 32 and so on."""
    steps = [size for power in range(3, 31) for size in (2**power, 3 * 2 ** (power - 1))]
    allowed = np.array([size for size in steps if size < max_events] + [max_events])
    return allowed[np.searchsorted(allowed, np.minimum(lengths, max_events))]


def table_batches(
    table: SequenceTable, max_events: int, batch_tokens: int = BATCH_TOKENS
) -> Iterator[EventBatch]:
    """Yield a table's users in batches of like lengths, newest `max_events` events of each.

    A batch's shape depends on its users' padded length alone, filling rows included, so that a
    user's numbers never depend on who else is in the batch: kernels of one shape treat every row
    alike, others may round differently.
    """
    kept = np.minimum(table.lengths, max_events)
    padded = padded_length(kept, max_events)
    for length in np.unique(padded):
        rows = max(1, batch_tokens // int(length))
        users = np.flatnonzero(padded == length)
        for begin in range(0, len(users), rows):
            part = users[begin : begin + rows]
            starts = table.offsets[part + 1] - kept[part]
            batch = pad(table, part, starts, kept[part], (rows, int(length)))
            yield replace(batch, silence_days=_silence(table, part, rows))


def _silence(table: SequenceTable, users: Ints, rows: int) -> Tensor:
    """Return the days (rows,) from users' last events to their cutoffs, 0 for empty histories."""
    silence = np.zeros(rows, np.float32)
    if len(table.times):
        last = table.times[np.maximum(table.offsets[users + 1] - 1, 0)]
        days = (table.cutoffs[users] - last) / MICROSECONDS_A_DAY
        silence[: len(users)] = np.where(table.lengths[users] > 0, days, 0)
    return torch.from_numpy(silence)


def read_batches(
    files: Sequence[Path], config: EncoderConfig, batch_tokens: int = BATCH_TOKENS
) -> Iterator[tuple[list[str], EventBatch]]:
    """Yield (user ids, batch) over sequence files; the ids belong to the batch's first rows.

    Users come in the order of their lengths inside a chunk of CHUNK_USERS; `inference.py` puts
    them back in the order of the files.
    """
    for table in read_in_order(files, CHUNK_USERS):
        for batch in table_batches(table, config.max_events, batch_tokens):
            yield table.user_ids.take(batch.users).to_pylist(), batch
