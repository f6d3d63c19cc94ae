"""The future window: what a user does in the days after a cutoff, and how it is encoded.

From the state or embedding at a random cutoff, predict which event types and categories occur in
the next 7 and 28 days, and bring the user's vector near the encoding of their own next window:
what the best entries of the RecSys Challenge 2025 share (Synerise 2025, final ranking).

Labels are looked up in flat arrays, where user u's events are `[offsets[u], offsets[u + 1])`, in
order of time. Times and lengths of time are microseconds.

Legend of shapes: E flat events, U users, N cutoffs, H horizons, V' targets, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from numpy.typing import NDArray
from torch import Tensor, nn

from behavior_pipeline.contracts import NUM_SPECIAL_IDS
from behavior_pipeline.encoder.contrast import hard_info_nce
from behavior_pipeline.encoder.layers import Linear
from behavior_pipeline.encoder.sequence_files import (
    MICROSECONDS_A_DAY,
    Ints,
    first_at_or_after,
    places_between,
)

HORIZON_DAYS: Final = (7.0, 28.0)
"""How far ahead the window reaches, where the data are long enough."""

_RARE_LOGIT: Final = -4.0  # a target is rare: where its head starts without a known rate
_HEAD_SPREAD: Final = 1e-3  # of a head's first weights: it starts at its biases


def scaled_horizons(longest: int, horizon_days: Sequence[float] = HORIZON_DAYS) -> tuple[int, ...]:
    """Return the horizons, all shortened alike until the last is no longer than `longest`.

    Raises:
        ValueError: if the horizons do not rise from above zero.
    """
    if not horizon_days or min(np.diff([0.0, *horizon_days])) <= 0:
        raise ValueError("horizons must rise from above zero")
    scale = min(1.0, longest / (horizon_days[-1] * MICROSECONDS_A_DAY))
    return tuple(int(days * scale * MICROSECONDS_A_DAY) for days in horizon_days)


@dataclass(frozen=True)
class FutureLabels:
    """What occurs in the windows after cutoffs.

    Attributes:
        window: whether a value occurs in [cutoff, cutoff + horizon), (N, H, V') bool.
        is_known: whether the window ends within the training data, (N, H) bool; where it does not,
            `window` holds what occurs before their end.
    """

    window: NDArray[np.bool_]
    is_known: NDArray[np.bool_]


def future_labels(
    times: Ints,
    ids: NDArray[np.integer],
    offsets: Ints,
    users: Ints,
    cutoffs: Ints,
    horizons: Sequence[int],
    num_targets: int,
    trained_through: int,
) -> FutureLabels:
    """Look up which of a field's lowest ids occur after cutoffs.

    No event at or after `trained_through` is counted.

    Args:
        times: time of each event, (E,), rising within a user.
        ids: the field's token id of each event, (E,).
        offsets: (U + 1,).
        users: user of each cutoff, (N,).
        cutoffs: (N,).
        horizons: H lengths of time.
        num_targets: V'; the targets are the ids after the special ones.
        trained_through: end of the training data.
    """
    begins = first_at_or_after(times, offsets, users, np.minimum(cutoffs, trained_through))
    window = np.zeros((len(cutoffs), len(horizons), num_targets), np.bool_)
    for place, horizon in enumerate(horizons):
        reach = np.minimum(cutoffs + horizon, trained_through)
        ends = first_at_or_after(times, offsets, users, reach)
        rows, events = places_between(begins, ends)
        targets = ids[events].astype(np.int64) - NUM_SPECIAL_IDS
        is_target = (targets >= 0) & (targets < num_targets)
        window[rows[is_target], place, targets[is_target]] = True
    is_known = cutoffs[:, None] + np.asarray(horizons, np.int64) <= trained_through
    return FutureLabels(window, is_known)


def window_heads(width: int, sizes: Mapping[str, int]) -> nn.ModuleDict:
    """Return a linear head a field, from D to the logits of rare targets; none for a size of 0."""
    heads = {field: Linear(width, size) for field, size in sizes.items() if size > 0}
    for head in heads.values():
        nn.init.constant_(head.bias, _RARE_LOGIT)
        nn.init.normal_(head.weight, std=_HEAD_SPREAD)
    return nn.ModuleDict(heads)


@torch.no_grad()
def start_at_rates(heads: nn.ModuleDict, rates: Mapping[str, Tensor]) -> None:
    """Make heads predict how often each target occurs; `rates` are in (0, 1), by field.

    A few hundred steps cannot move a bias far: what it lacks the state would have to give.
    """
    for field, head in heads.items():
        assert isinstance(head, nn.Linear)  # noqa: S101 - built so
        if field in rates:
            head.bias.copy_(torch.logit(rates[field]).flatten())


class FutureWindow(nn.Module):
    """Which values of each field occur within each horizon of a cutoff.

    One linear head a field gives the logits of all horizons. Binary cross-entropies are summed over
    a field's V' targets and divided by sqrt(V'), so that a large vocabulary counts more than a
    small one but not in proportion, and averaged over the cutoffs and horizons that are known.

    Args:
        width: D of what predicts.
        sizes: V' per field; fields without a target are left out.
        num_horizons: H.
    """

    def __init__(self, width: int, sizes: Mapping[str, int], num_horizons: int) -> None:
        super().__init__()
        self.num_horizons = num_horizons
        self.heads = window_heads(
            width, {field: num_horizons * size for field, size in sizes.items()}
        )

    def start_from(self, rates: Mapping[str, Tensor]) -> None:
        """Start the heads at how often each target occurs; `rates` are (H, V') in (0, 1) a field.

        See `start_at_rates`.
        """
        start_at_rates(self.heads, rates)

    def logits(self, hidden: Tensor) -> dict[str, Tensor]:
        """Return the logits (N, H, V') float32 per field of vectors (N, D)."""
        return {
            field: head(hidden).float().view(len(hidden), self.num_horizons, -1)
            for field, head in self.heads.items()
        }

    def forward(
        self, hidden: Tensor, window: Mapping[str, Tensor], is_known: Tensor, valid: Tensor
    ) -> Tensor:
        """Return the loss (scalar) of vectors (N, D) at cutoffs.

        Args:
            hidden: state or embedding at each cutoff, (N, D).
            window: labels per field, (N, H, V'), bool or numbers.
            is_known: which windows end within the training data, (N, H) bool.
            valid: which cutoffs count, (N,) bool.
        """
        losses = torch.zeros(is_known.shape, device=hidden.device)
        for field, logits in self.logits(hidden).items():
            each = F.binary_cross_entropy_with_logits(
                logits, window[field].to(logits.dtype), reduction="none"
            )
            losses = losses + each.sum(2) / logits.shape[2] ** 0.5
        counted = is_known & valid[:, None]
        return (losses * counted).sum() / counted.sum().clamp(min=1)


class WindowAlignment(nn.Module):
    """Brings a user's vector at a cutoff near the encoding of their own next window.

    `contrast`: `hard_info_nce` between projections of both, with the other users' windows as
    negatives. `cosine`: 1 - cos(predictor(projection(state)), stop-gradient(projection(window))),
    without negatives (Chen and He 2021, "Exploring Simple Siamese Representation Learning",
    equations 1 and 3, one direction): the predictor and the stopped gradient keep it from
    collapsing. Projections are left out of what is kept (Chen et al. 2020, section 4.2).

    Args:
        width: D of both vectors.
        method: see above.
        temperature: of the contrast.
        beta: see `hard_info_nce`.
        positive_share: see `hard_info_nce`.
    """

    def __init__(
        self,
        width: int,
        method: str = "contrast",
        temperature: float = 0.1,
        beta: float = 0.0,
        positive_share: float = 0.0,
    ) -> None:
        super().__init__()
        if method not in ("contrast", "cosine"):
            raise ValueError(f"method is contrast or cosine, not {method}")
        self.method = method
        self.temperature, self.beta, self.positive_share = temperature, beta, positive_share
        narrow = min(width, 128)
        self.projection = nn.Sequential(Linear(width, width), nn.GELU(), Linear(width, narrow))
        if method == "cosine":
            self.predictor = nn.Sequential(
                Linear(narrow, narrow), nn.GELU(), Linear(narrow, narrow)
            )

    def forward(
        self, state: Tensor, following: Tensor, valid: Tensor, users: Tensor | None = None
    ) -> Tensor:
        """Return the loss (scalar) of states (N, D) and encodings of the next windows (N, D).

        Args:
            state: a user's vector at a cutoff.
            following: the encoding of the events after it, read alone.
            valid: which pairs count, (N,) bool: those with events on both sides.
            users: user of each pair, (N,); default all differ. Only for the contrast.
        """
        left, right = self.projection(state).float(), self.projection(following).float()
        if self.method == "contrast":
            return hard_info_nce(
                left, right, self.temperature, self.beta, self.positive_share, valid, users
            )
        distance = 1.0 - F.cosine_similarity(self.predictor(left).float(), right.detach(), dim=1)
        return (distance * valid).sum() / valid.sum().clamp(min=1)
