"""Next-event prediction over a period: windows of histories, predictions, recalls."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from behavior_pipeline.contracts import NUM_SPECIAL_IDS
from behavior_pipeline.encoder.architecture import Encoder
from behavior_pipeline.encoder.batches import BATCH_TOKENS, EventBatch, pad
from behavior_pipeline.encoder.layouts import padded_length
from behavior_pipeline.encoder.losses import FieldPrediction
from behavior_pipeline.encoder.sequence_files import SequenceTable

ACTION = "action"


@dataclass(frozen=True)
class Windows:
    """Stretches of histories, n of them, in which events are predicted from those before.

    Attributes:
        users: (n,) rows of the table.
        starts: (n,) flat place of the first event that is read.
        firsts: (n,) flat place of the first event that is predicted.
        ends: (n,) flat place after the last event that is predicted; it is not read itself.
    """

    users: np.ndarray
    starts: np.ndarray
    firsts: np.ndarray
    ends: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Events that are read, (n,)."""
        return self.ends - 1 - self.starts

    @property
    def places(self) -> np.ndarray:
        """Flat places of all events that are predicted, window by window."""
        parts = [np.arange(a, b) for a, b in zip(self.firsts, self.ends, strict=True)]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def windows_from(table: SequenceTable, moment: int, length: int) -> Windows:
    """Cut histories so that each event from a moment on that has one before it is predicted once.

    Args:
        table: histories.
        moment: microseconds since 1970.
        length: events that are read at the most. At least half as many are read before each event
            that is predicted, if there are so many.
    """
    rows = []
    step = max(length // 2, 1)
    for user, (start, end) in enumerate(zip(table.offsets[:-1], table.offsets[1:], strict=True)):
        first = start + np.searchsorted(table.times[start:end], moment)
        for place in range(max(first, start + 1), end, step):
            stop = min(place + step, end)
            rows.append((user, max(start, stop - 1 - length), place, stop))
    columns = np.array(rows, np.int64).reshape(-1, 4).T
    return Windows(*columns)


@torch.inference_mode()
def predicted_actions(
    encoder: Encoder, head: FieldPrediction, table: SequenceTable, windows: Windows
) -> np.ndarray:
    """Return the action that ranks first of all at each of `windows.places`, on a CPU."""
    found = np.zeros(len(table.times), np.int64)
    for chosen, batch in _batches(encoder, table, windows):
        hidden = encoder.causal_pass(batch).hidden
        logits = functional.linear(head.transform(hidden), head.table.weight, head.bias)
        best = logits[..., NUM_SPECIAL_IDS:].argmax(-1).numpy() + NUM_SPECIAL_IDS
        for row, number in enumerate(chosen):
            first, end = windows.firsts[number], windows.ends[number]
            # What is read at the place before tells of a place.
            offset = first - 1 - windows.starts[number]
            found[first:end] = best[row, offset : offset + end - first]
    return found[windows.places]


def _batches(
    encoder: Encoder, table: SequenceTable, windows: Windows
) -> Iterator[tuple[np.ndarray, EventBatch]]:
    """Yield windows of like lengths with their padded batches."""
    padded = padded_length(windows.lengths, encoder.config.max_events)
    for length in np.unique(padded):
        alike = np.flatnonzero(padded == length)
        rows = max(1, BATCH_TOKENS // int(length))
        for begin in range(0, len(alike), rows):
            part = alike[begin : begin + rows]
            yield (
                part,
                pad(
                    table, windows.users[part], windows.starts[part], windows.lengths[part],
                    (len(part), int(length)), tuple(encoder.config.field_sizes),
                ),
            )  # fmt: skip


def most_recent(actions: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Predict at each place, never a user's first, the action before."""
    return actions[places - 1]


def most_frequent(actions: np.ndarray) -> int:
    """Return the most frequent known action; of equally frequent ones the smallest id."""
    counts = np.bincount(actions)
    counts[:NUM_SPECIAL_IDS] = 0
    return int(counts.argmax())


def recalls(predicted: np.ndarray, actual: np.ndarray) -> dict[str, float]:
    """Return recall at 1: the mean over the actions that occur, and weighted by their events."""
    hits = predicted == actual
    each = [float(hits[actual == action].mean()) for action in np.unique(actual)]
    return {"macro_recall": float(np.mean(each)), "weighted_recall": float(hits.mean())}
