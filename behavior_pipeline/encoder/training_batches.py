"""A training batch: packed events, what is known of them at cutoffs, and labels.

Legend of shapes: U users of a batch at the most, R = 2 U runs (histories, then what follows),
C cutoffs of each user, N tokens, M masked events.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from behavior_pipeline.encoder.history import Prefixes
from behavior_pipeline.encoder.layouts import PackedLayout
from behavior_pipeline.encoder.masking import MaskedEvents
from behavior_pipeline.encoder.packing import Tokens
from behavior_pipeline.encoder.sequence_files import Ints

_RARE_SHARE: Final = 0.01  # how often an unseen target occurs for the imagined user


@dataclass(frozen=True)
class CutLabels:
    """One cutoff of each of a batch's users: what was known then, and what came.

    Attributes:
        lengths: how many events of the user's history are before the cutoff, (U,) int64.
        silence_days: days from the last of them to the cutoff, 0 without one, (U,) float32.
        next_time: class of the time from the cutoff to the next event, (U,) int64.
        window: per field, which of the lowest ids occur in the label window, (U, V') bool.
        future: the same within each of H horizons, (U, H, V') bool; without a field if the
            objective is switched off.
    """

    lengths: Tensor
    silence_days: Tensor
    next_time: Tensor
    window: Mapping[str, Tensor]
    future: Mapping[str, Tensor]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> CutLabels:
        """Return the labels on a device."""
        how: dict[str, Any] = {"device": device, "non_blocking": non_blocking}
        return CutLabels(
            self.lengths.to(**how),
            self.silence_days.to(**how),
            self.next_time.to(**how),
            {field: values.to(**how) for field, values in self.window.items()},
            {field: values.to(**how) for field, values in self.future.items()},
        )

    def pin_memory(self) -> CutLabels:
        """Return the labels in memory that a GPU can fetch from while others work."""
        return CutLabels(
            self.lengths.pin_memory(),
            self.silence_days.pin_memory(),
            self.next_time.pin_memory(),
            {field: values.pin_memory() for field, values in self.window.items()},
            {field: values.pin_memory() for field, values in self.future.items()},
        )


@dataclass(frozen=True)
class TrainingBatch:
    """Users, each cut at random moments, packed. Every tensor has the same shape in every batch.

    Attributes:
        tokens: all N tokens.
        prefixes: the R runs of the causal tokens and how much of each is known at each cutoff, the
            earliest first; what follows is known as a whole at all of them.
        has_next: which of the causal tokens have a successor in their run, (N causal,) bool.
        masked: the hidden events, None if the objective is switched off.
        cuts: the labels at each of the cutoffs, the latest first.
        is_pair: which of the U rows have both a history and something that follows, (U,) bool.
        num_users: users in the batch.
        num_events: events in the batch, masked copies not counted.
        num_masked_tokens: events in the masked copies.
        typical_users: users of an average batch, (): what sums over users are divided by, so that
            users count alike in batches of short and of long histories.
    """

    tokens: Tokens
    prefixes: Prefixes
    has_next: Tensor
    masked: MaskedEvents | None
    cuts: tuple[CutLabels, ...]
    is_pair: Tensor
    num_users: int
    num_events: int
    num_masked_tokens: int
    typical_users: Tensor

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> TrainingBatch:
        """Return the batch on a device."""
        how: dict[str, Any] = {"device": device, "non_blocking": non_blocking}
        return replace(
            self,
            tokens=self.tokens.to(**how),
            prefixes=self.prefixes.to(**how),
            has_next=self.has_next.to(**how),
            masked=None if self.masked is None else self.masked.to(**how),
            cuts=tuple(cut.to(**how) for cut in self.cuts),
            is_pair=self.is_pair.to(**how),
            typical_users=self.typical_users.to(**how),
        )

    def pin_memory(self) -> TrainingBatch:
        """Return the batch in memory that a GPU can fetch from while others work."""
        pinned = {
            item.name: getattr(self, item.name).pin_memory()
            for item in fields(self)
            if hasattr(getattr(self, item.name), "pin_memory")
        }
        return replace(self, **pinned, cuts=tuple(cut.pin_memory() for cut in self.cuts))

    @property
    def num_causal(self) -> int:
        """Tokens that attend causally, filler included."""
        return len(self.has_next)

    @property
    def fill_rate(self) -> float:
        """Share of the tokens that are events."""
        return (self.num_events + self.num_masked_tokens) / len(self.tokens.gap_days)

    def run_lengths(self) -> tuple[Ints, Ints]:
        """Return the lengths of the causal runs and of those that attend both ways.

        The batch must be on a CPU. What `Encoder.flops_per_pass` is to be asked for.
        """
        layout = self.tokens.layout
        assert isinstance(layout, PackedLayout)  # noqa: S101 - built so
        events = (self.num_events, self.num_masked_tokens)
        lengths = []
        for runs, total in zip(layout.parts, events, strict=False):
            offsets = runs.offsets.numpy().astype(np.int64)
            lengths.append(np.diff(offsets[offsets <= total]))
        return lengths[0], lengths[1] if len(lengths) > 1 else np.empty(0, np.int64)


def window_rates(batches: Sequence[TrainingBatch]) -> dict[str, Tensor]:
    """Return how often each window target occurs, per field (V',) inside (0, 1).

    Shares of users and cutoffs, shrunk towards "hardly ever" by one imagined user.
    """
    return _rates(batches, [cut.window for batch in batches for cut in batch.cuts])


def future_rates(batches: Sequence[TrainingBatch]) -> dict[str, Tensor]:
    """Return the same within each horizon of the future window, per field (H, V')."""
    return _rates(batches, [cut.future for batch in batches for cut in batch.cuts])


def _rates(
    batches: Sequence[TrainingBatch], labels: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Return the share of the batches' users and cutoffs at which each label holds."""
    count = sum(batch.num_users * len(batch.cuts) for batch in batches)
    totals = {
        field: torch.stack([each[field].sum(0) for each in labels]).sum(0)
        for field in (labels[0] if labels else ())
    }
    return {field: (total + _RARE_SHARE) / (count + 1) for field, total in totals.items()}
