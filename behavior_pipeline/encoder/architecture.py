"""The behavioural encoder: events to hidden states, to a state, to an embedding at a cutoff.

Legend of shapes: B users, T events, D width, K history scalars, S = D + K width of a state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import Tensor, nn

from behavior_pipeline.encoder.batches import EventBatch
from behavior_pipeline.encoder.configuration import EncoderConfig
from behavior_pipeline.encoder.embedder import EventEmbedder
from behavior_pipeline.encoder.history import (
    HISTORY_SCALARS,
    SILENCE_SCALARS,
    days_before_last,
    elapsed_days,
    history_scalars,
    silence_scalars,
)
from behavior_pipeline.encoder.time_encoding import RotaryClock, TimeEncoding, rotate

NUM_SCALARS = len(HISTORY_SCALARS) + len(SILENCE_SCALARS)
"""How many of an embedding's first dimensions carry named scalars (history, then silence)."""


@dataclass(frozen=True)
class CausalPass:
    """A batch's events before and after the causal transformer, (B, T, D) each.

    What stands at a place depends on no event after it, so the pass can be pooled at every one.
    """

    events: Tensor
    hidden: Tensor


class Block(nn.Module):
    """A pre-norm transformer block (Xiong et al. 2020, figure 1b)."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.attention_norm = nn.LayerNorm(config.width)
        self.query_key_value = nn.Linear(config.width, 3 * config.width)
        self.attention_out = nn.Linear(config.width, config.width)
        self.feedforward_norm = nn.LayerNorm(config.width)
        self.feedforward_in = nn.Linear(config.width, config.feedforward_width)
        self.feedforward_out = nn.Linear(config.feedforward_width, config.width)

    def forward(self, hidden: Tensor, turn: tuple[Tensor, Tensor], keys: Tensor | None) -> Tensor:
        """Advance hidden states (B, T, D).

        Args:
            hidden: states so far.
            turn: cosines and sines of the rotary clock.
            keys: which places may be attended to, (B, 1, 1, T); None attends causally.
        """
        hidden = hidden + self._drop(self._attend(self.attention_norm(hidden), turn, keys))
        inner = F.gelu(self.feedforward_in(self.feedforward_norm(hidden)))
        return hidden + self._drop(self.feedforward_out(inner))

    def _attend(self, x: Tensor, turn: tuple[Tensor, Tensor], keys: Tensor | None) -> Tensor:
        batch, length, width = x.shape
        split = self.query_key_value(x).view(batch, length, 3, self.num_heads, -1)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        query, key = (rotate(part, *turn).to(value.dtype) for part in (query, key))
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=keys, is_causal=keys is None
        )
        out: Tensor = self.attention_out(mixed.transpose(1, 2).reshape(batch, length, width))
        return out

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class Pooling(nn.Module):
    """A history as one summary (B, D).

    Reads the last hidden state, the mean, and the mean weighted by exp(-days before the last
    event / recent_days), and the same two means of the events as they were before the transformer,
    each normalised, through one linear layer. The events' own means keep what a user did readable
    whatever the transformer makes of it.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.recent_days = config.recent_days
        self.norms = nn.ModuleList(nn.LayerNorm(config.width) for _ in range(5))
        self.mix = nn.Linear(5 * config.width, config.width)

    def forward(self, passed: CausalPass, gap_days: Tensor, lengths: Tensor) -> Tensor:
        """Pool a pass over the first `lengths` (B,) events of each history."""
        ago, valid = days_before_last(gap_days, lengths)
        places = torch.arange(gap_days.shape[1], device=gap_days.device)
        weights = torch.stack(
            (
                (places == (lengths - 1)[:, None]).float(),
                valid.float(),
                valid * torch.exp(-ago / self.recent_days),
            ),
            dim=1,
        )
        weights = weights / weights.sum(2, keepdim=True).clamp(min=1e-6)
        weights = weights.to(passed.hidden.dtype)
        means = weights[:, 1:] @ passed.events.to(weights.dtype)
        pooled = torch.cat((weights @ passed.hidden, means), dim=1)
        normed = [norm(pooled[:, place]) for place, norm in enumerate(self.norms)]
        summary: Tensor = self.mix(torch.cat(normed, dim=1))
        return summary


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
        self.inner = nn.Linear(2 * config.width + NUM_SCALARS, 2 * config.width)
        self.outer = nn.Linear(2 * config.width, learned)
        self.straight = nn.Linear(config.width + NUM_SCALARS, learned)
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
        known = torch.cat((summary, scalars.to(summary.dtype)), dim=1)
        inner = F.gelu(self.inner(torch.cat((known, self.silence(silence_days)), dim=1)))
        inner = F.dropout(inner, self.dropout, self.training)
        learned = self.norm(self.outer(inner) + self.straight(known))
        embedding = torch.cat((scalars * self.gains, learned.float()), dim=1)
        # The first scalar is log(1 + number of events): zero only for an empty history.
        return torch.where(history[:, :1] > 0, embedding, self.prior)


class Encoder(nn.Module):
    """Sequences of events to embeddings; see `encode_state` and `readout` for the two halves."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedder = EventEmbedder(config)
        self.clock = RotaryClock(config.width // config.num_heads)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = nn.LayerNorm(config.width)
        self.pooling = Pooling(config)
        self.readout_layer = Readout(config)
        self.apply(_initialise)
        for block in self.blocks:
            _shrink(block, config.num_layers)

    @property
    def state_width(self) -> int:
        """S: numbers in a state."""
        return self.config.width + len(HISTORY_SCALARS)

    @property
    def embedding_width(self) -> int:
        """D: numbers in an embedding."""
        return self.config.width

    def forward(
        self,
        action_ids: Tensor,
        property_ids: Tensor,
        time_gaps: Tensor,
        *,
        item_ids: Tensor | None = None,
        location_ids: Tensor | None = None,
        amount_ids: Tensor | None = None,
        hour_ids: Tensor | None = None,
        silence_days: Tensor | None = None,
        before: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Embed histories, oldest event first, right padded with action 0.

        Args:
            action_ids: what was done, (B, T) int64; a place with 0 holds no event.
            property_ids: category of the item, (B, T) int64.
            time_gaps: days since the event before, (B, T).
            item_ids: further fields, (B, T) int64 each; absent ones count as PAD.
            location_ids: see item_ids.
            amount_ids: see item_ids.
            hour_ids: see item_ids.
            silence_days: days from the last event to the cutoff, (B,); default 0.
            before: what came before these events, (B, 3) as in `history_scalars`; default nothing.

        Returns:
            `embedding` (B, D), `state` (B, S), and `hidden` (B, T, D) of the causal pass.

        Raises:
            ValueError: if the tensors' shapes do not agree.
        """
        optional = {
            "item": item_ids, "location": location_ids, "amount": amount_ids, "hour": hour_ids,
        }  # fmt: skip
        ids = {"action": action_ids, "category": property_ids}
        ids |= {name: values for name, values in optional.items() if values is not None}
        _check_shapes(ids, time_gaps)
        batch = EventBatch.from_tensors(ids, time_gaps, silence_days, before)
        passed = self.causal_pass(batch)
        state = self.pool(passed, batch)
        return {
            "embedding": self.readout(state, batch.silence_days),
            "state": state,
            "hidden": passed.hidden,
        }

    def hidden_states(self, batch: EventBatch, *, is_causal: bool = True) -> Tensor:
        """Run the transformer; (B, T, D). Places beyond a user's length hold no meaning.

        Args:
            batch: events, right padded.
            is_causal: whether an event sees only itself and those before, or all of its user's.
        """
        return self._transform(self.embedder(batch.ids, batch.gap_days), batch, is_causal)

    def causal_pass(self, batch: EventBatch) -> CausalPass:
        """Run the transformer forwards; keep what went in beside what came out."""
        events = self.embedder(batch.ids, batch.gap_days)
        return CausalPass(events, self._transform(events, batch, is_causal=True))

    def _transform(self, x: Tensor, batch: EventBatch, is_causal: bool) -> Tensor:
        """Return hidden states (B, T, D) of embedded events (B, T, D)."""
        turn = self.clock(elapsed_days(batch.gap_days))
        keys = None if is_causal else _key_mask(batch.lengths, x.shape[1])
        for block in self.blocks:
            x = block(x, turn, keys)
        hidden: Tensor = self.final_norm(x)
        return hidden

    def pool(self, passed: CausalPass, batch: EventBatch) -> Tensor:
        """Return states (B, S): a summary of the pass, then history scalars.

        Reads the first `batch.lengths` events of each row: with smaller lengths than the pass was
        made with, these are the states that the users had at an earlier moment.
        """
        history = history_scalars(batch.gap_days, batch.lengths, batch.before)
        summary = self.pooling(passed, batch.gap_days, batch.lengths)
        return torch.cat((summary.float(), history), dim=1)

    def encode_state(self, batch: EventBatch) -> Tensor:
        """Return states (B, S) float32 after the last events; they do not depend on a cutoff."""
        return self.pool(self.causal_pass(batch), batch)

    def readout(self, state: Tensor, silence_days: Tensor) -> Tensor:
        """Return embeddings (B, D) float32 of states (B, S) so many days (B,) after their ends."""
        embedding: Tensor = self.readout_layer(state, silence_days)
        return embedding

    def prior(self) -> Tensor:
        """Return the embedding (D,) of a user without history: the mean over training users."""
        return self.readout_layer.prior

    def set_prior(self, prior: Tensor) -> None:
        """Set the embedding (D,) of a user without history."""
        self.readout_layer.prior.copy_(prior)


def _check_shapes(ids: Mapping[str, Tensor], time_gaps: Tensor) -> None:
    """Refuse tensors that are not all (B, T) with T of at least 1."""
    shape = ids["action"].shape
    if len(shape) != 2 or shape[1] == 0:  # noqa: PLR2004 - users by events
        raise ValueError(f"action_ids must be (B, T) with T of at least 1, not {tuple(shape)}")
    for name, values in {**ids, "time_gaps": time_gaps}.items():
        if values.shape != shape:
            raise ValueError(f"{name} has shape {tuple(values.shape)}, action_ids {tuple(shape)}")


def _key_mask(lengths: Tensor, length: int) -> Tensor:
    """Return which keys may be attended to, (B, 1, 1, T); the first always, lest a row be empty."""
    places = torch.arange(length, device=lengths.device)
    return (places < lengths.clamp(min=1)[:, None])[:, None, None, :]


def _initialise(module: nn.Module) -> None:
    """Start matrices and tables normal with spread 1 / sqrt(width), biases and PAD rows zero."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        with torch.no_grad():
            module.weight[module.padding_idx].zero_()


def _shrink(block: nn.Module, num_layers: int) -> None:
    """Scale the layers that write to the residual stream by 1 / sqrt(2 x layers), as GPT-2 does."""
    assert isinstance(block, Block)  # noqa: S101 - our own mistake otherwise
    with torch.no_grad():
        for layer in (block.attention_out, block.feedforward_out):
            layer.weight.mul_((2 * num_layers) ** -0.5)
