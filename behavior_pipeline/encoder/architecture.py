"""The behavioural encoder: events to hidden states, to a state, to an embedding at a cutoff.

The transformer runs on flat tokens; see `layouts.py` for who attends to whom.

Legend of shapes: N tokens, B users, T events, D width, K history scalars, S = D + K width of a
state, H heads, W width of a head.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import Tensor, nn

from behavior_pipeline.encoder.batches import EventBatch
from behavior_pipeline.encoder.configuration import EncoderConfig
from behavior_pipeline.encoder.embedder import EventEmbedder
from behavior_pipeline.encoder.flops import pass_flops
from behavior_pipeline.encoder.history import HISTORY_SCALARS, Prefixes, history_at
from behavior_pipeline.encoder.layers import FeedForward, Linear, initialise, make_norm
from behavior_pipeline.encoder.layouts import Ints, Layout
from behavior_pipeline.encoder.packing import PackedBatch, Tokens
from behavior_pipeline.encoder.pooling import NUM_SCALARS, CausalPass, Pooling, Readout
from behavior_pipeline.encoder.run_attention import Stretches, attend_in_stretches
from behavior_pipeline.encoder.time_encoding import RotaryClock, rotate

__all__ = ["NUM_SCALARS", "CausalPass", "Encoder"]


class Block(nn.Module):
    """A pre-norm transformer block (Xiong et al. 2020, figure 1b).

    Queries and keys are normalised per head before they are turned (Henry et al. 2020), which
    bounds the attention logits and lets learning rates be higher.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        width, biased = config.width, config.has_biases
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.attention_norm = make_norm(config, width)
        self.query_key_value = Linear(width, 3 * width, bias=biased)
        self.query_norm, self.key_norm = (
            make_norm(config, width // config.num_heads)
            if config.has_query_key_norm
            else nn.Identity()
            for _ in range(2)
        )
        self.attention_out = Linear(width, width, bias=biased)
        self.feedforward_norm = make_norm(config, width)
        self.feedforward = FeedForward(config)

    def forward(self, hidden: Tensor, turn: tuple[Tensor, Tensor], layout: Layout) -> Tensor:
        """Advance hidden states (N, D).

        Args:
            hidden: states so far.
            turn: cosines and sines of the rotary clock.
            layout: which tokens attend to which.
        """
        mixed = self._attend(self.attention_norm(hidden), turn, layout)
        hidden = _add(hidden, self._drop(mixed))
        return _add(hidden, self._drop(self.feedforward(self.feedforward_norm(hidden))))

    def _attend(self, x: Tensor, turn: tuple[Tensor, Tensor], layout: Layout) -> Tensor:
        split = self.query_key_value(x).view(len(x), 3, self.num_heads, -1)
        stretches = layout.stretches_for(split)
        if stretches is not None:
            mixed = self._attend_in_stretches(split, turn, stretches)
        else:
            query, key, value = split.unbind(1)
            query = rotate(self.query_norm(query), *turn).to(value.dtype)
            key = rotate(self.key_norm(key), *turn).to(value.dtype)
            mixed = layout.attend(query, key, value)
        out: Tensor = self.attention_out(mixed.flatten(1))
        return out

    def _attend_in_stretches(
        self, split: Tensor, turn: tuple[Tensor, Tensor], stretches: Stretches
    ) -> Tensor:
        """Leave to one kernel what it can do: RMSNorm, turning, attention."""
        norms = self.query_norm, self.key_norm
        gains: list[Tensor] = [norm.weight for norm in norms if isinstance(norm, nn.RMSNorm)]
        if gains:
            return attend_in_stretches(split, torch.stack(gains), turn, stretches)
        if not isinstance(self.query_norm, nn.Identity):
            query, key, value = split.unbind(1)
            parts = self.query_norm(query), self.key_norm(key), value
            split = torch.stack([part.to(value.dtype) for part in parts], dim=1)
        return attend_in_stretches(split, None, turn, stretches)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class Encoder(nn.Module):
    """Sequences of events to embeddings; see `encode_state` and `readout` for the two halves."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedder = EventEmbedder(config)
        self.clock = RotaryClock(config.width // config.num_heads)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = make_norm(config, config.width)
        self.pooling = Pooling(config)
        self.readout_layer = Readout(config)
        self.apply(initialise)
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
            before: what came before these events, as in `history_scalars`; default nothing.

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
        return self.encode(ids, time_gaps, silence_days=silence_days, before=before)

    def encode(
        self,
        ids: Mapping[str, Tensor],
        gap_days: Tensor,
        *,
        silence_days: Tensor | None = None,
        before: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Embed histories of whatever fields the configuration declares; see `forward`.

        Args:
            ids: per field ids (B, T), numbers (B, T) or codes (B, T, k); a place where the
                configuration's `event_field` is 0 holds no event.
            gap_days: days since the event before, (B, T).
            silence_days: as in `forward`.
            before: as in `forward`.

        Raises:
            ValueError: if the tensors' shapes do not agree, or a field is not declared.
        """
        event_field = self.config.event_field
        _check_shapes(ids, gap_days, event_field)
        batch = EventBatch.from_tensors(ids, gap_days, silence_days, before, event_field)
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
        return self.transform(batch.tokens(is_causal=is_causal)).hidden.view(batch.shape)

    def causal_pass(self, batch: EventBatch) -> CausalPass:
        """Run the transformer forwards; keep what went in beside what came out, (B, T, D)."""
        passed = self.transform(batch.tokens(is_causal=True))
        return CausalPass(passed.events.view(batch.shape), passed.hidden.view(batch.shape))

    def transform(self, tokens: Tokens) -> CausalPass:
        """Run the transformer over flat tokens; return what went in and what came out, (N, D)."""
        events = self.embedder(tokens.ids, tokens.gap_days)
        turn = self.clock(tokens.places, tokens.elapsed_days)
        x = events
        for block in self.blocks:
            x = block(x, turn, tokens.layout)
        return CausalPass(events, self.final_norm(x))

    def pool(self, passed: CausalPass, batch: EventBatch) -> Tensor:
        """Return states (B, S): a summary of the pass, then history scalars.

        Reads the first `batch.lengths` events of each row: with smaller lengths than the pass was
        made with, these are the states that the users had at an earlier moment.
        """
        flat = CausalPass(passed.events.flatten(0, 1), passed.hidden.flatten(0, 1))
        return self.pool_at(flat, batch.prefixes())[:, 0]

    def pool_at(self, passed: CausalPass, prefixes: Prefixes) -> Tensor:
        """Return states (R, C, S) of a pass over (N, D) at every cutoff of every run."""
        summary = self.pooling(passed, prefixes)
        return torch.cat((summary.float(), history_at(prefixes)), dim=-1)

    def packed_states(self, batch: PackedBatch) -> Tensor:
        """Return states (R, S) float32 of packed histories; filler runs have states as well."""
        return self.pool_at(self.transform(batch.tokens), batch.prefixes)[:, 0]

    def encode_state(self, batch: EventBatch) -> Tensor:
        """Return states (B, S) float32 after the last events; they do not depend on a cutoff."""
        return self.pool(self.causal_pass(batch), batch)

    def readout(self, state: Tensor, silence_days: Tensor) -> Tensor:
        """Return embeddings (B, D) float32 of states (B, S) so many days (B,) after their ends."""
        embedding: Tensor = self.readout_layer(state, silence_days)
        return embedding

    def flops_per_pass(self, lengths: Ints, *, causal: bool) -> int:
        """Return the exact model FLOPs of a forward pass over users of these lengths.

        Of real tokens only: what a device spends on padding or filler is not counted. A training
        step costs three times as much, one for the forward and two for the backward pass.

        Args:
            lengths: events of each user.
            causal: whether an event sees only itself and those before: half of the attention.
        """
        return pass_flops(self.config, lengths, causal=causal)

    def prior(self) -> Tensor:
        """Return the embedding (D,) of a user without history: the mean over training users."""
        return self.readout_layer.prior

    def set_prior(self, prior: Tensor) -> None:
        """Set the embedding (D,) of a user without history."""
        self.readout_layer.prior.copy_(prior)


def _add(hidden: Tensor, update: Tensor) -> Tensor:
    """Return the sum of hidden states and what a layer adds, (N, D) each, as hidden's type.

    Summed in float32, where kernels of bfloat16 sum anyway: torch.compile leaves that to the kernel
    of the norm that follows. A plain sum it makes part of the product before, `addmm`, which on a
    GPU begins with a copy of all hidden states.
    """
    return (hidden.float() + update.float()).to(hidden.dtype)


def _check_shapes(ids: Mapping[str, Tensor], gap_days: Tensor, event_field: str) -> None:
    """Refuse tensors that are not all (B, T), codes (B, T, k), with T of at least 1."""
    if event_field not in ids:
        raise ValueError(f"every event needs {event_field}_ids")
    shape = ids[event_field].shape
    if len(shape) != 2 or shape[1] == 0:  # noqa: PLR2004 - users by events
        raise ValueError(
            f"{event_field}_ids must be (B, T) with T of at least 1, not {tuple(shape)}"
        )
    for name, values in {**ids, "time_gaps": gap_days}.items():
        if values.shape[:2] != shape:
            raise ValueError(
                f"{name} has shape {tuple(values.shape)}, {event_field}_ids {tuple(shape)}"
            )


def _shrink(block: nn.Module, num_layers: int) -> None:
    """Scale the layers that write to the residual stream by 1 / sqrt(2 x layers), as GPT-2 does."""
    assert isinstance(block, Block)  # noqa: S101 - our own mistake otherwise
    with torch.no_grad():
        for layer in (block.attention_out, block.feedforward.narrow):
            layer.weight.mul_((2 * num_layers) ** -0.5)
