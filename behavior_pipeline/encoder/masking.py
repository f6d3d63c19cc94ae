"""What is hidden from the masked-event objective: fields, events, or all events of one kind.

Masked language modelling (Devlin et al. 2019, section 3.1) with three ways of choosing what is
hidden. Every user gets one of them; in each, a field of an event is hidden with chance `share`:

- token: single fields of an event, each by itself (what else the event says stays visible);
- event: all fields of an event;
- type: all fields of all events of one action of the user, so that no neighbour of the same kind
  gives it away.

Times stay visible: the question is what happened then. Everything is drawn from one generator, on
its device, and no shape depends on data.

Legend of shapes: N flat events of all users one after another, U users, K places.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from behavior_pipeline.contracts import MASK_ID, PAD_ID

LEVELS: Final = ("token", "event", "type")
"""Ways of choosing what is hidden, in the order of `Masking.level_shares`."""

_MASKED: Final = 0.8  # of what is hidden, how much becomes MASK (Devlin et al. 2019)
_SWAPPED: Final = 0.1  # how much becomes another event's; the rest stays as it is


@dataclass(frozen=True)
class Masking:
    """How much is hidden, and how.

    Attributes:
        share: chance of a field to be hidden.
        level_shares: shares of the users whose history is hidden by token, by event and by type.
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
class MaskedEvents:
    """Events with some of their fields hidden.

    Attributes:
        ids: what the encoder sees, per field (N,) int64.
        targets: what it is to find, per field (N,) int64; PAD where there is nothing to find.
        is_hidden: events with at least one target, (N,) bool.
    """

    ids: dict[str, Tensor]
    targets: dict[str, Tensor]
    is_hidden: Tensor


def mask_events(
    ids: Mapping[str, Tensor],
    users: Tensor,
    num_users: int,
    num_actions: int,
    masking: Masking,
    generator: torch.Generator,
) -> MaskedEvents:
    """Hide a share of the fields of flat events.

    Args:
        ids: token ids per field, (N,) int64 each, "action" among them; PAD where a field is
            empty, and in all fields of filling.
        users: which user each event is of, (N,) int64 in [0, num_users).
        num_users: U.
        num_actions: ids of the field "action", the special ids included.
        masking: how much, and how.
        generator: all draws come from it.
    """
    hidden = draw_hidden(ids, users, num_users, num_actions, masking, generator)
    targets = {name: torch.where(hidden[name], ids[name], PAD_ID) for name in ids}
    is_hidden = torch.stack(list(hidden.values())).any(0)
    return MaskedEvents(corrupt_fields(ids, hidden, generator), targets, is_hidden)


def draw_hidden(
    ids: Mapping[str, Tensor],
    users: Tensor,
    num_users: int,
    num_actions: int,
    masking: Masking,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Draw what is hidden, (N,) bool per field and never at PAD; arguments as `mask_events`."""
    count, device = len(users), users.device
    bounds = torch.tensor(masking.level_shares, device=device).cumsum(0)[:2]
    levels = torch.bucketize(_uniform(num_users, generator, device), bounds, right=True)[users]
    by_event = _uniform(count, generator, device)
    # The fraction of the sum of two uniform numbers is uniform, and independent for any two pairs
    # of a user and an action: a draw per pair without a table of all pairs.
    of_user = _uniform(num_users, generator, device)[users]
    of_action = _uniform(num_actions, generator, device)[ids["action"].clamp(max=num_actions - 1)]
    by_type = (of_user + of_action) % 1.0
    shared = torch.where(levels == LEVELS.index("type"), by_type, by_event)
    hidden = {}
    for name, values in ids.items():
        by_token = _uniform(count, generator, device)
        chance = torch.where(levels == LEVELS.index("token"), by_token, shared)
        hidden[name] = (chance < masking.share) & (values != PAD_ID)
    return hidden


def corrupt_fields(
    ids: Mapping[str, Tensor], hidden: Mapping[str, Tensor], generator: torch.Generator
) -> dict[str, Tensor]:
    """Return ids (N,) per field with what is hidden masked (80 %), swapped (10 %) or kept (10 %).

    An event's hidden fields share their fate. A swapped field takes the value of another event
    drawn from all N; where that has none, it is kept.
    """
    count, device = hidden["action"].shape[0], hidden["action"].device
    fate = _uniform(count, generator, device)
    drawn = torch.randint(count, (count,), generator=generator, device=generator.device)
    other = drawn.to(device)
    is_masked, is_swapped = fate < _MASKED, (fate >= _MASKED) & (fate < _MASKED + _SWAPPED)
    corrupted = {}
    for name, values in ids.items():
        swapped = torch.where(values[other] == PAD_ID, values, values[other])
        changed = torch.where(is_masked, MASK_ID, torch.where(is_swapped, swapped, values))
        corrupted[name] = torch.where(hidden[name], changed, values)
    return corrupted


def chosen_places(chosen: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Return the first `capacity` places where `chosen` (N,) bool holds, in a fixed shape.

    Returns:
        Places (K,) int64, and which of them are chosen ones rather than filling, (K,) bool.
        K is the smaller of `capacity` and N; chosen places beyond it are left out.
    """
    order = torch.argsort(chosen.logical_not().to(torch.uint8), stable=True)
    places = order[: min(capacity, len(chosen))]
    return places, chosen[places]


def _uniform(count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Draw (count,) numbers in [0, 1) where the generator is; return them on a device."""
    return torch.rand(count, generator=generator, device=generator.device).to(device)
