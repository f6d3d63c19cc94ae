"""A history as one summary, and the embedding that a state and a silence read out as.

Legend of shapes: N tokens, R runs, C cutoffs of each run, D width, K history scalars, S = D + K.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import Tensor, nn

from behavior_pipeline.encoder.configuration import EncoderConfig
from behavior_pipeline.encoder.history import (
    HISTORY_SCALARS,
    SILENCE_SCALARS,
    Prefixes,
    silence_scalars,
)
from behavior_pipeline.encoder.layers import Linear
from behavior_pipeline.encoder.time_encoding import TimeEncoding

NUM_SCALARS: Final = len(HISTORY_SCALARS) + len(SILENCE_SCALARS)
"""How many of an embedding's first dimensions carry named scalars (history, then silence)."""


@dataclass(frozen=True)
class CausalPass:
    """A batch's events before and after the causal transformer, (N, D) or (B, T, D) each.

    What stands at a place depends on no event after it, so the pass can be pooled at every one.
    """

    events: Tensor
    hidden: Tensor


class Pooling(nn.Module):
    """The first events of a run as one summary (R, C, D).

    Reads the last hidden state, the mean, and the mean weighted by exp(-days before the last
    event / recent_days), and the same two means of the events as they were before the transformer,
    each normalised, through one linear layer. The events' own means keep what a user did readable
    whatever the transformer makes of it.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.recent_days = config.recent_days
        self.norms = nn.ModuleList(nn.LayerNorm(config.width) for _ in range(5))
        self.mix = Linear(5 * config.width, config.width)

    def forward(self, passed: CausalPass, prefixes: Prefixes) -> Tensor:
        """Pool a pass over (N, D) at every cutoff."""
        width = passed.hidden.shape[-1]
        shape = prefixes.num_rows, prefixes.num_cuts, width
        last = passed.hidden.index_select(0, prefixes.last_tokens()).view(shape).float()
        last = last * (prefixes.lengths > 0)[..., None]
        sums = _Sums.over(prefixes, self.recent_days)
        pooled = [last, *sums.means(passed.hidden), *sums.means(passed.events)]
        dtype = self.mix.weight.dtype
        normed = [norm(part.to(dtype)) for norm, part in zip(self.norms, pooled, strict=True)]
        summary: Tensor = self.mix(torch.cat(normed, dim=-1))
        return summary


@dataclass(frozen=True)
class _Sums:
    """How to sum tokens up to each of C cutoffs by adding every token once.

    The cutoffs of a run cut its tokens into C intervals. Sums over intervals, with weights relative
    to the interval's last event, carry over to the next cutoff: whole for the plain sum, times
    exp(-days between the two last events / recent_days) for the recent one.

    Attributes:
        interval: each token's interval, (N,) int64; R x C for tokens known at no cutoff.
        weights: weight of each token in the recent sum, (N,) float32.
        carried: what the recent sum of the cutoff before counts, (R, C) float32.
        counts: events known at each cutoff, (R, C) float32, at least 1.
    """

    interval: Tensor
    weights: Tensor
    carried: Tensor
    counts: Tensor

    @classmethod
    def over(cls, prefixes: Prefixes, recent_days: float) -> _Sums:
        """Prepare the sums over prefixes."""
        num_rows, num_cuts = prefixes.lengths.shape
        lengths = prefixes.of_tokens(prefixes.lengths)
        number = (prefixes.places[:, None] >= lengths).sum(1)
        is_known = number < num_cuts
        interval = torch.where(is_known, prefixes.rows * num_cuts + number, num_rows * num_cuts)
        last = prefixes.last_elapsed()
        until = torch.cat((last.reshape(-1), last.new_zeros(1))).index_select(0, interval)
        days = (until - prefixes.elapsed_days).clamp(min=0.0)
        between = torch.diff(last, dim=1, prepend=last[:, :1]).clamp(min=0.0)
        return cls(
            interval=interval,
            weights=torch.exp(-days / recent_days).float() * is_known,
            carried=torch.exp(-between / recent_days).float(),
            counts=prefixes.lengths.clamp(min=1).float(),
        )

    def means(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and the recent mean (R, C, D) float32 of values (N, D)."""
        exact = values.float()
        plain = self._by_interval(exact).cumsum(1) / self.counts[..., None]
        recent = self._carry(self._by_interval(exact * self.weights[:, None]))
        total = self._carry(self._by_interval(self.weights[:, None]))
        return plain, recent / total.clamp(min=1e-6)

    def _by_interval(self, values: Tensor) -> Tensor:
        """Add up values (N, D) in each interval, (R, C, D)."""
        num_rows, num_cuts = self.counts.shape
        total = values.new_zeros(num_rows * num_cuts + 1, values.shape[1])
        total = total.index_add(0, self.interval, values)
        return total[:-1].view(num_rows, num_cuts, -1)

    def _carry(self, sums: Tensor) -> Tensor:
        """Turn recent sums of intervals (R, C, D) into those up to each cutoff."""
        carried = [sums[:, 0]]
        for cut in range(1, sums.shape[1]):
            carried.append(sums[:, cut] + self.carried[:, cut, None] * carried[-1])
        return torch.stack(carried, dim=1)


class Readout(nn.Module):
    """A state and the silence since its last event as the embedding at a cutoff (B, D).

    The first NUM_SCALARS dimensions are the named scalars, each with a learned gain, so that
    recency and frequency stay readable by a line and by a tree; the others are
    LayerNorm(linear + two-layer perceptron) of the summary, the scalars and the encoded silence.
    """

    prior: Tensor

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        learned = config.width - NUM_SCALARS
        if learned < NUM_SCALARS:
            raise ValueError(f"width must be at least {2 * NUM_SCALARS}")
        self.num_history = len(HISTORY_SCALARS)
        self.silence = TimeEncoding(
            config.width, config.num_time_buckets, config.num_sinusoids, config.time_window_days
        )
        self.inner = Linear(2 * config.width + NUM_SCALARS, 2 * config.width)
        self.outer = Linear(2 * config.width, learned)
        self.straight = Linear(config.width + NUM_SCALARS, learned)
        self.norm = nn.LayerNorm(learned)
        self.gains = nn.Parameter(torch.ones(NUM_SCALARS))
        self.dropout = config.dropout
        # What a user without any history gets: the mean over the users trained on.
        self.register_buffer("prior", torch.zeros(config.width))

    def forward(self, state: Tensor, silence_days: Tensor) -> Tensor:
        """Read states (B, S) out at `silence_days` (B,) after their last events."""
        summary, history = state[:, : -self.num_history], state[:, -self.num_history :]
        silence_days = silence_days.float().clamp(min=0.0)
        scalars = torch.cat((history, silence_scalars(history, silence_days)), dim=1)
        dtype = self.inner.weight.dtype
        known = torch.cat((summary.to(dtype), scalars.to(dtype)), dim=1)
        inner = F.gelu(self.inner(torch.cat((known, self.silence(silence_days)), dim=1)))
        inner = F.dropout(inner, self.dropout, self.training)
        learned = self.norm(self.outer(inner) + self.straight(known))
        embedding = torch.cat((scalars * self.gains.float(), learned.float()), dim=1)
        # The first scalar is log(1 + number of events): zero only for an empty history.
        return torch.where(history[:, :1] > 0, embedding, self.prior.float())
