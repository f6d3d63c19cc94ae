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

from behavior_pipeline.contracts import PAD_ID
from behavior_pipeline.encoder.configuration import EncoderConfig
from behavior_pipeline.encoder.history import BEFORE, Prefixes, elapsed_days, padded_prefixes
from behavior_pipeline.encoder.layouts import PaddedLayout, padded_length
from behavior_pipeline.encoder.packing import Tokens
from behavior_pipeline.encoder.sequence_files import Ints, SequenceTable, read_in_order

CHUNK_USERS: Final = 16_384
"""Users read into memory at once for inference."""

BATCH_TOKENS: Final = 2048
"""Padded tokens of an inference batch. Small batches stay in a CPU's caches and waste little on
users that fill no whole batch."""


@dataclass(frozen=True)
class EventBatch:
    """Histories of B users, right padded to T events.

    Attributes:
        ids: per field token ids (B, T) int64, PAD where there is no event; numbers (B, T); or
            codes (B, T, k).
        gap_days: days since the event before, (B, T) float32; 0 where there is no event.
        lengths: events of each user, (B,) int64.
        silence_days: days from each last event to the cutoff, (B,) float32.
        before: what came before the first event that is read, (B, len(BEFORE)) float32.
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
        event_field: str = "action",
    ) -> EventBatch:
        """Make a batch of tensors (B, T); a place whose `event_field` is PAD holds no event."""
        is_event = ids[event_field] != PAD_ID
        batch = len(gap_days)
        nothing = gap_days.new_zeros(batch, dtype=torch.float32)
        return cls(
            ids=ids,
            gap_days=torch.where(is_event, gap_days.float(), 0.0),
            lengths=is_event.sum(1),
            silence_days=nothing if silence_days is None else silence_days.float(),
            before=gap_days.new_zeros(batch, len(BEFORE)) if before is None else before.float(),
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
    def shape(self) -> tuple[int, int, int]:
        """The shape (B, T, -1) that vectors of the batch's events are viewed in."""
        rows, length = self.gap_days.shape
        return rows, length, -1

    def tokens(self, *, is_causal: bool) -> Tokens:
        """Return the events laid flat, padding among them."""
        rows, length = self.gap_days.shape
        places = torch.arange(length, device=self.gap_days.device)
        return Tokens(
            {name: values.flatten(0, 1) for name, values in self.ids.items()},
            self.gap_days.flatten(),
            places.repeat(rows),
            elapsed_days(self.gap_days).flatten(),
            PaddedLayout(self.lengths, length, is_causal),
        )

    def prefixes(self) -> Prefixes:
        """Return the first `lengths` events of each user, as what is to be pooled."""
        return padded_prefixes(self.gap_days, self.lengths, self.before)

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
    fields: Sequence[str],
) -> EventBatch:
    """Cut one run of events per user out of a table and pad it.

    Args:
        table: where the events are.
        users: rows of the table, n.
        starts: flat place of each run's first event, n.
        lengths: events of each run, n.
        shape: rows and columns (B, T) of the batch; rows from n on are filling.
        fields: the fields that are read.

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

    before = np.zeros((rows, len(BEFORE)), np.float32)
    before[: len(users)] = table.before(users, starts)
    all_lengths = np.zeros(rows, np.int64)
    all_lengths[: len(users)] = lengths
    return EventBatch(
        ids={field: fill(table.ids[field], np.int64) for field in fields},
        gap_days=fill(table.gap_days, np.float32),
        lengths=torch.from_numpy(all_lengths),
        silence_days=torch.zeros(rows),
        before=torch.from_numpy(before),
        users=users,
    )


def table_batches(
    table: SequenceTable, config: EncoderConfig, batch_tokens: int = BATCH_TOKENS
) -> Iterator[EventBatch]:
    """Yield a table's users in batches of like lengths, newest `max_events` events of each.

    A batch's shape depends on its users' padded length alone, filling rows included, so that a
    user's numbers never depend on who else is in the batch: kernels of one shape treat every row
    alike, others may round differently.
    """
    kept = np.minimum(table.lengths, config.max_events)
    padded = padded_length(kept, config.max_events)
    fields = tuple(config.field_sizes)
    for length in np.unique(padded):
        rows = max(1, batch_tokens // int(length))
        users = np.flatnonzero(padded == length)
        for begin in range(0, len(users), rows):
            part = users[begin : begin + rows]
            starts = table.offsets[part + 1] - kept[part]
            batch = pad(table, part, starts, kept[part], (rows, int(length)), fields)
            silence = np.zeros(rows, np.float32)
            silence[: len(part)] = table.silence_days(part)
            yield replace(batch, silence_days=torch.from_numpy(silence))


def read_batches(
    files: Sequence[Path], config: EncoderConfig, batch_tokens: int = BATCH_TOKENS
) -> Iterator[tuple[list[str], EventBatch]]:
    """Yield (user ids, batch) over sequence files; the ids belong to the batch's first rows.

    Users come in the order of their lengths inside a chunk of CHUNK_USERS; `inference.py` puts
    them back in the order of the files.
    """
    for table in read_in_order(files, CHUNK_USERS):
        for batch in table_batches(table, config, batch_tokens):
            yield table.user_ids.take(batch.users).to_pylist(), batch
