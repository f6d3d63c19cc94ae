"""The hidden events of a batch in a fixed shape; `masking_levels.py` chooses and hides them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from behavior_pipeline.contracts import PAD_ID
from behavior_pipeline.encoder.sequence_files import Ints


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


def masked_events(
    targets: Mapping[str, Ints], drawn: Ints, first_token: int, size: int
) -> MaskedEvents:
    """Say what drawn events were.

    Args:
        targets: ids (N,) per field before anything was hidden, PAD where nothing is to be found.
        drawn: the events drawn, (m,).
        first_token: where the first of the N stands among the batch's tokens.
        size: M, at least m.
    """
    missing = size - len(drawn)
    return MaskedEvents(
        torch.from_numpy(np.pad(first_token + drawn, (0, missing), constant_values=first_token)),
        {
            name: torch.from_numpy(np.pad(values[drawn], (0, missing), constant_values=PAD_ID))
            for name, values in targets.items()
        },
    )
