"""Which events of a batch are hidden for the masked-event objective, and by what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from behavior_pipeline.contracts import MASK_ID, PAD_ID
from behavior_pipeline.encoder.sequence_files import Ints

MASKED_SHARE = 0.8
SWAPPED_SHARE = 0.1


@dataclass(frozen=True)
class MaskedEvents:
    """The events that a model is asked to fill in.

    Attributes:
        places: where they stand among a batch's tokens, (M,) int64; M never changes.
        ids: what they were, per field (M,) int64; PAD, which is no target, where M is not used up.
    """

    places: Tensor
    ids: Mapping[str, Tensor]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> MaskedEvents:
        """Return the events on a device."""
        how: dict[str, Any] = {"device": device, "non_blocking": non_blocking}
        ids = {name: values.to(**how) for name, values in self.ids.items()}
        return MaskedEvents(self.places.to(**how), ids)

    def pin_memory(self) -> MaskedEvents:
        """Return the events in memory that a GPU can fetch from while others work."""
        ids = {name: values.pin_memory() for name, values in self.ids.items()}
        return MaskedEvents(self.places.pin_memory(), ids)


def draw_events(num_events: int, share: float, random: np.random.Generator) -> Ints:
    """Draw a share of the events 0 to num_events - 1, rounded, at least one of some; rising."""
    count = max(round(share * num_events), min(1, num_events))
    drawn: Ints = np.sort(random.permutation(num_events)[:count])
    return drawn


def corrupt(ids: Mapping[str, Ints], drawn: Ints, random: np.random.Generator) -> dict[str, Ints]:
    """Return ids (N,) per field with drawn events (M,) masked, swapped or kept.

    Of the events drawn, 80 % have every field replaced by MASK, 10 % become another of the N events
    and 10 % stay as they are (Devlin et al. 2019, section 3.1). A field that an event does not have
    stays PAD.
    """
    chance = random.random(len(drawn))
    is_masked, is_swapped = chance < MASKED_SHARE, chance >= 1 - SWAPPED_SHARE
    num_events = len(next(iter(ids.values())))
    other = random.integers(num_events, size=len(drawn))
    corrupted = {}
    for name, values in ids.items():
        before, substitute = values[drawn], values[other]
        swapped = np.where(is_swapped & (substitute != PAD_ID), substitute, before)
        after = np.where(is_masked, MASK_ID, swapped)
        corrupted[name] = values.copy()
        corrupted[name][drawn] = np.where(before == PAD_ID, PAD_ID, after)
    return corrupted


def masked_events(
    ids: Mapping[str, Ints], drawn: Ints, first_token: int, size: int
) -> MaskedEvents:
    """Say what drawn events were.

    Args:
        ids: ids (N,) per field before anything was hidden.
        drawn: the events drawn, (m,).
        first_token: where the first of the N stands among the batch's tokens.
        size: M, at least m.
    """
    missing = size - len(drawn)
    return MaskedEvents(
        torch.from_numpy(np.pad(first_token + drawn, (0, missing), constant_values=first_token)),
        {
            name: torch.from_numpy(np.pad(values[drawn], (0, missing), constant_values=PAD_ID))
            for name, values in ids.items()
        },
    )
