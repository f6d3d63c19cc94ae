"""What is hidden from the masked-event objective: a field, an event, or all events of one type.

Masked language modelling (Devlin et al. 2019, section 3.1) with three ways of hiding. A share of
the events is chosen, and every run of events has one of the three levels:

- token: one field of each chosen event, any that it has; what else it says stays visible
  (masked-field pretraining, Wang et al. 2020);
- event: all fields of each chosen event;
- type: chosen together are all events of one type of the run, so that no neighbour of the same
  type gives them away; all their fields are hidden.

Times stay visible: the question is what happened then. Batches are made of numpy arrays, off the
accelerator, and so is this; one generator decides everything.

Legend of shapes: N flat events of all runs one after another, filler among them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from behavior_pipeline.contracts import MASK_ID, PAD_ID

LEVELS: Final = ("token", "event", "type")
"""Ways of hiding, in the order of `Masking.level_shares`."""

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

_MASKED: Final = 0.8  # of what is hidden, how much becomes MASK (Devlin et al. 2019)
_SWAPPED: Final = 0.1  # how much becomes another event's; the rest stays as it is


@dataclass(frozen=True)
class Masking:
    """How much is hidden, and how.

    Attributes:
        share: share of the events that is chosen.
        level_shares: shares of the runs whose level is token, event and type.
    """

    share: float = 0.15
    level_shares: tuple[float, float, float] = (0.2, 0.6, 0.2)

    def __post_init__(self) -> None:
        """Refuse shares without meaning.

        Raises:
            ValueError: if a share is not in [0, 1], or those of the levels do not sum to 1.
        """
        if not 0 <= self.share <= 1 or min(self.level_shares) < 0:
            raise ValueError("share is in [0, 1] and level_shares are not negative")
        if abs(sum(self.level_shares) - 1) > 1e-6:  # noqa: PLR2004 - rounding of decimals
            raise ValueError("level_shares must sum to 1")


@dataclass(frozen=True)
class HiddenEvents:
    """Events with some of their fields hidden.

    Attributes:
        ids: what the encoder sees, per field (N,).
        targets: what it is to find, per field (N,); PAD where there is nothing to find.
        chosen: places of the events with a target, rising, at most round(share x events) of
            them, or one.
    """

    ids: dict[str, Ints]
    targets: dict[str, Ints]
    chosen: Ints


def hide_events(
    ids: Mapping[str, Ints],
    runs: Ints,
    masking: Masking,
    random: np.random.Generator,
    event_field: str = "action",
) -> HiddenEvents:
    """Hide a share of flat events.

    Args:
        ids: token ids per field, (N,) each; PAD where an event lacks the field, and in filler.
        runs: run of each event, (N,) from 0 on; -1 for filler.
        masking: how much, and how.
        random: all draws come from it.
        event_field: the field that gives an event's type and that every event has.
    """
    num_runs = int(runs.max(initial=-1)) + 1
    levels = random.choice(len(LEVELS), num_runs, p=masking.level_shares)
    by_event = np.where(runs >= 0, levels[runs] if num_runs else 0, -1)
    is_type = by_event == LEVELS.index("type")
    chosen = _choose(ids[event_field], runs, is_type, masking.share, random)
    hidden = _fields_of(ids, chosen, by_event == LEVELS.index("token"), random)
    targets = {name: np.where(hidden[name], values, PAD_ID) for name, values in ids.items()}
    return HiddenEvents(_corrupt(ids, hidden, runs, random), targets, np.flatnonzero(chosen))


def _choose(
    types: Ints, runs: Ints, is_type: Bools, share: float, random: np.random.Generator
) -> Bools:
    """Choose events, (N,) bool: those with the lowest of uniform chances.

    Events of one type of a run share their chance where `is_type` (N,) holds. No more than
    round(share x events), but one of few, are chosen; a type that would be chosen in part is not
    chosen at all.
    """
    chances = random.random(len(runs))
    pairs = runs[is_type] * (int(types.max(initial=0)) + 1) + types[is_type]
    kinds, places = np.unique(pairs, return_inverse=True)
    chances[is_type] = random.random(len(kinds))[places]
    chances[runs < 0] = 2.0
    num_events = int((runs >= 0).sum())
    count = max(round(share * num_events), min(1, num_events)) if share else 0
    limit = np.sort(chances)[count] if count < len(chances) else 2.0
    chosen: Bools = (chances < limit) & (runs >= 0)
    return chosen


def _fields_of(
    ids: Mapping[str, Ints], chosen: Bools, is_token: Bools, random: np.random.Generator
) -> dict[str, Bools]:
    """Return which fields of the chosen events are hidden, (N,) bool each and never at PAD."""
    present = np.stack([values != PAD_ID for values in ids.values()])
    lots = np.where(present, random.random(present.shape), -1.0)
    single = np.arange(len(present))[:, None] == lots.argmax(0)
    hidden = present & chosen & (single | ~is_token)
    return dict(zip(ids, hidden, strict=True))


def _corrupt(
    ids: Mapping[str, Ints],
    hidden: Mapping[str, Bools],
    runs: Ints,
    random: np.random.Generator,
) -> dict[str, Ints]:
    """Return ids (N,) with what is hidden masked (80 %), swapped (10 %) or kept (10 %).

    An event's hidden fields share their fate. A swapped field takes the value of another event of
    any run; where that has none, it is kept.
    """
    count = len(runs)
    fate = random.random(count)
    is_masked, is_kept = fate < _MASKED, fate >= _MASKED + _SWAPPED
    events = np.flatnonzero(runs >= 0)
    other = random.choice(events, count) if len(events) else np.zeros(count, np.int64)
    corrupted = {}
    for name, values in ids.items():
        is_own = is_kept | (values[other] == PAD_ID)
        changed = np.where(is_masked, MASK_ID, np.where(is_own, values, values[other]))
        corrupted[name] = np.where(hidden[name], changed, values)
    return corrupted
