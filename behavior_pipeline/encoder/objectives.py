"""What the encoder learns from: BEAT's three objectives, and the silence at a cutoff.

Nothing here waits for the device or depends on its values in shape: a step is one graph.

Legend of shapes: U users, R = 2 U runs (histories, then what follows), C cutoffs, N tokens,
M masked events, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import Tensor, nn

from behavior_pipeline.contracts import PAD_ID
from behavior_pipeline.encoder.architecture import CausalPass, Encoder
from behavior_pipeline.encoder.configuration import TrainingConfig
from behavior_pipeline.encoder.cutoffs import window_sizes
from behavior_pipeline.encoder.cuts import NEXT_TIME_SHARES
from behavior_pipeline.encoder.embedder import FieldEmbedding
from behavior_pipeline.encoder.layers import Linear
from behavior_pipeline.encoder.losses import FieldPrediction, info_nce, mean_over_targets
from behavior_pipeline.encoder.training_batches import CutLabels, TrainingBatch

__all__ = [
    "Contrastive", "EventPrediction", "FieldPrediction", "MaskedEvent", "NextEvent", "Objectives",
    "Silence", "info_nce",
]  # fmt: skip

_TIME_WEIGHT: Final = 0.5
_RARE_LOGIT: Final = -4.0  # a window target is rare: where its head starts without a known rate
_HEAD_SPREAD: Final = 1e-3  # of a window head's first weights: it starts at its biases


class EventPrediction(nn.Module):
    """Predicts an event's fields, action, category and item say: the weighted sum of their losses.

    Of the configured `predicted_fields` those that the encoder has; its event field if it has none.
    """

    def __init__(self, encoder: Encoder, config: TrainingConfig) -> None:
        super().__init__()
        shape = encoder.config
        wanted = {k: v for k, v in config.predicted_fields.items() if k in shape.field_sizes}
        self.weights = wanted or {shape.event_field: 1.0}
        self.heads = nn.ModuleDict()
        for field in self.weights:
            embedding = encoder.embedder.fields[field]
            assert isinstance(embedding, FieldEmbedding)  # noqa: S101 - built so
            self.heads[field] = FieldPrediction(embedding, shape.width, config.num_negatives)

    def forward(self, hidden: Tensor, ids: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of hidden states (N, D) at events with the ids (N,) per field.

        An event that is PAD in a field is no target in it.
        """
        losses = [
            weight * self.heads[field](hidden, ids[field]) for field, weight in self.weights.items()
        ]
        return torch.stack(losses).sum()


class MaskedEvent(nn.Module):
    """BEAT's first objective: fill in hidden events from both sides (Devlin et al. 2019, 3.1).

    `masking.py` tells which events are hidden and how. Their times stay visible: the question is
    what happened then.
    """

    def __init__(self, encoder: Encoder, config: TrainingConfig) -> None:
        super().__init__()
        self.prediction = EventPrediction(encoder, config)

    def forward(self, hidden: Tensor, batch: TrainingBatch) -> Tensor:
        """Return the mean loss over a batch's hidden events; hidden states are all (N, D)."""
        assert batch.masked is not None  # noqa: S101 - the caller's mistake
        known = hidden.index_select(0, batch.masked.places)
        loss: Tensor = self.prediction(known, batch.masked.ids)
        return loss


class NextEvent(nn.Module):
    """BEAT's second objective: from events so far, the next one and the time until it.

    Cross-entropies of the next action, category and item (Radford et al. 2018, equation 1), and of
    the log-spaced bucket of the next gap.
    """

    def __init__(self, encoder: Encoder, config: TrainingConfig) -> None:
        super().__init__()
        self.prediction = EventPrediction(encoder, config)
        self.gap = Linear(encoder.config.width, encoder.config.num_time_buckets)

    def forward(self, encoder: Encoder, hidden: Tensor, batch: TrainingBatch) -> Tensor:
        """Return the mean loss over events with a successor; hidden is (N causal, D)."""
        count = batch.num_causal
        targets = {
            field: next_of(batch.tokens.ids[field][:count], batch.has_next)
            for field in self.prediction.weights
        }
        loss: Tensor = self.prediction(hidden, targets)
        buckets = encoder.embedder.gap.bucket_of(batch.tokens.gap_days[:count].roll(-1))
        waits = F.cross_entropy(self.gap(hidden).float(), buckets, reduction="none")
        return loss + _TIME_WEIGHT * mean_over_targets(waits, batch.has_next)


def next_of(ids: Tensor, has_next: Tensor) -> Tensor:
    """Return the ids (N,) of each token's successor, PAD where it has none."""
    return torch.where(has_next, ids.roll(-1), PAD_ID)


class Contrastive(nn.Module):
    """BEAT's third objective: a user's embedding at a cutoff resembles that of what follows.

    `info_nce` between projections of the readout at the cutoff and of the readout of the events
    after it, encoded as if they were all there is; the batch's other users are the negatives. The
    projection is left out of the embedding (Chen et al. 2020, section 4.2).
    """

    def __init__(self, encoder: Encoder, config: TrainingConfig) -> None:
        super().__init__()
        width = encoder.embedding_width
        self.temperature = config.temperature
        self.projection = nn.Sequential(
            Linear(width, width), nn.GELU(), Linear(width, min(width, 128))
        )

    def forward(self, embedding: Tensor, following: Tensor, is_pair: Tensor) -> Tensor:
        """Return the loss of embeddings (U, D) and those of what follows, where `is_pair` (U,).

        A pair without negatives teaches nothing: its loss is 0.
        """
        left, right = self.projection(embedding), self.projection(following)
        return info_nce(left.float(), right.float(), self.temperature, is_pair)


class Silence(nn.Module):
    """From the embedding at a random cutoff: when the user acts next, and what in the window.

    Cross-entropy of the class of the time to the next event, "none within the horizon" among them
    (a discrete hazard with censoring at the horizon), and binary cross-entropies of the actions,
    categories and items that occur in the window, summed over the V' targets over sqrt(V').
    """

    def __init__(self, encoder: Encoder, config: TrainingConfig) -> None:
        super().__init__()
        width = encoder.embedding_width
        self.next_time = Linear(width, len(NEXT_TIME_SHARES) + 1)
        sizes = window_sizes(encoder.config, config)
        self.window = nn.ModuleDict(
            {field: Linear(width, size) for field, size in sizes.items() if size > 0}
        )
        for head in self.window.values():
            assert isinstance(head, nn.Linear)  # noqa: S101 - built so
            nn.init.constant_(head.bias, _RARE_LOGIT)
            nn.init.normal_(head.weight, std=_HEAD_SPREAD)

    @torch.no_grad()
    def start_from(self, rates: Mapping[str, Tensor]) -> None:
        """Make the window heads predict how often each target occurs; `rates` are (V',) per field.

        A few hundred steps cannot move a bias far: what it lacks the embedding would have to give.
        """
        for field, head in self.window.items():
            assert isinstance(head, nn.Linear)  # noqa: S101 - built so
            if field in rates:
                head.bias.copy_(torch.logit(rates[field]))

    def forward(self, embedding: Tensor, cut: CutLabels, typical_users: Tensor) -> Tensor:
        """Return the loss of embeddings (U, D) at a cutoff, over the users of an average batch."""
        losses = F.cross_entropy(self.next_time(embedding).float(), cut.next_time, reduction="none")
        for field, head in self.window.items():
            logits, targets = head(embedding).float(), cut.window[field].float()
            each = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1)
            losses = losses + each / targets.shape[1] ** 0.5
        return (losses * (cut.lengths > 0)).sum() / typical_users


class Objectives(nn.Module):
    """All objectives over one batch, from one pass through the transformer."""

    def __init__(self, encoder: Encoder, config: TrainingConfig) -> None:
        super().__init__()
        self.masked_event = MaskedEvent(encoder, config)
        self.next_event = NextEvent(encoder, config)
        self.contrastive = Contrastive(encoder, config)
        self.silence = Silence(encoder, config)
        self.weights = config.weights

    def forward(self, encoder: Encoder, batch: TrainingBatch) -> dict[str, Tensor]:
        """Return the loss of each objective, and under `total` their weighted sum."""
        passed = encoder.transform(batch.tokens)
        causal = CausalPass(passed.events[: batch.num_causal], passed.hidden[: batch.num_causal])
        embeddings, following = _embed(encoder, causal, batch)
        losses = {
            "masked_event": self._masked(passed.hidden, batch),
            "next_event": self.next_event(encoder, causal.hidden, batch),
            "contrastive": self.contrastive(embeddings[0], following, batch.is_pair),
            "silence": self._silence(embeddings, batch),
        }
        total = sum(getattr(self.weights, name) * loss for name, loss in losses.items())
        return {**losses, "total": torch.as_tensor(total)}

    def _masked(self, hidden: Tensor, batch: TrainingBatch) -> Tensor:
        """Return the masked-event loss, 0 if it is switched off."""
        if batch.masked is None:
            return hidden.new_zeros((), dtype=torch.float32)
        loss: Tensor = self.masked_event(hidden, batch)
        return loss

    def _silence(self, embeddings: list[Tensor], batch: TrainingBatch) -> Tensor:
        """Return the mean silence loss over a batch's cutoffs."""
        losses = [
            self.silence(embedding, cut, batch.typical_users)
            for embedding, cut in zip(embeddings, batch.cuts, strict=True)
        ]
        return torch.stack(losses).mean()


def _embed(
    encoder: Encoder, causal: CausalPass, batch: TrainingBatch
) -> tuple[list[Tensor], Tensor]:
    """Return embeddings (U, D) at each cutoff, the latest first, and those of what follows."""
    states = encoder.pool_at(causal, batch.prefixes)
    histories, following = states.chunk(2)
    silences = [cut.silence_days for cut in batch.cuts]
    # The prefixes have the earliest cutoff first. What follows is read out as of its last event.
    parts = [*histories.unbind(1)[::-1], following[:, -1]]
    silence = torch.cat((*silences, torch.zeros_like(silences[0])))
    embeddings = encoder.readout(torch.cat(parts), silence).chunk(len(parts))
    return list(embeddings[:-1]), embeddings[-1]
