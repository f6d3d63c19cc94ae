"""The users that probes are fitted on or judged on, in memory; needs numpy and Arrow alone."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


@dataclass(frozen=True)
class Population:
    """Users of the population at a cutoff, sorted by id; a stable sample where they are many.

    Attributes:
        cutoff: features use events before it, labels those of the horizon from it.
        user_ids: N ids, as an Arrow array of strings.
        rfm: (N, 3) recency in days, frequency in days, monetary in the source's unit.
        is_churned: (N,) true where the label window holds no qualifying event.
        next_event_types: N types of the first event in the window, null where there is none.
        positives: target to (N,) booleans: the user took the target in the window.
        num_users: size of the whole population before the sample.
    """

    cutoff: datetime
    user_ids: pa.Array
    rfm: NDArray[np.float64]
    is_churned: NDArray[np.bool_]
    next_event_types: pa.Array
    positives: dict[str, NDArray[np.bool_]]
    num_users: int

    def __len__(self) -> int:
        """Return the number of users in the sample."""
        return len(self.user_ids)
