"""What the encoder learns from: BEAT's three objectives, and the silence at a cutoff.

Nothing here waits for the device or depends on its values in shape: a step is one graph.

Legend of shapes: U users, R = 2 U runs (histories, then what follows), C cutoffs, N tokens,
M masked events, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import Tensor, nn

from behavior_pipeline.contracts import PAD_ID
from behavior_pipeline.encoder.architecture import CausalPass, Encoder
from behavior_pipeline.encoder.configuration import TrainingConfig
from behavior_pipeline.encoder.cutoffs import window_sizes
from behavior_pipeline.encoder.cuts import NEXT_TIME_SHARES
from behavior_pipeline.encoder.dro import RobustLoss, identity
from behavior_pipeline.encoder.embedder import FieldEmbedding
from behavior_pipeline.encoder.future import (
    FutureWindow,
    WindowAlignment,
    start_at_rates,
    window_heads,
)
from behavior_pipeline.encoder.layers import Linear
from behavior_pipeline.encoder.losses import FieldPrediction, mean_over_targets
from behavior_pipeline.encoder.training_batches import (
    CutLabels,
    TrainingBatch,
    future_rates,
    window_rates,
)

__all__ = [
    "EventPrediction", "FieldPrediction", "MaskedEvent", "NextEvent", "Objectives", "Silence",
]  # fmt: skip

_TIME_WEIGHT: Final = 0.5


class EventPrediction(nn.Module):
    """Predicts an event's fields, action, category and item say: the weighted sum of their losses.

    Of the configured `predicted_fields` those that the encoder has; its event field if it has none.

    Args:
        encoder: whose tables predict.
        config: the training.
        is_robust: whether the event field's loss is that of the worst mix of its values (`dro.py`)
            where that is configured, rather than the mean.
        reduce: adds a tensor up over processes.
    """

    def __init__(
        self,
        encoder: Encoder,
        config: TrainingConfig,
        reduce: Callable[[Tensor], Tensor] = identity,
        *,
        is_robust: bool = False,
    ) -> None:
        super().__init__()
        shape = encoder.config
        wanted = {k: v for k, v in config.predicted_fields.items() if k in shape.field_sizes}
        self.weights = wanted or {shape.event_field: 1.0}
        self.heads = nn.ModuleDict()
        for field in self.weights:
            embedding = encoder.embedder.fields[field]
            assert isinstance(embedding, FieldEmbedding)  # noqa: S101 - built so
            self.heads[field] = FieldPrediction(
                embedding, shape.width, config.num_negatives, config.max_full_softmax
            )
        self.robust = nn.ModuleDict()
        if is_robust and config.robust_share and shape.event_field in self.weights:
            self.robust[shape.event_field] = RobustLoss(
                shape.field_sizes[shape.event_field],
                config.robust_level,
                config.robust_tail_power,
                config.robust_share,
                reduce=reduce,
            )

    def forward(self, hidden: Tensor, ids: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of hidden states (N, D) at events with the ids (N,) per field.

        An event that is PAD in a field is no target in it.
        """
        losses = [
            weight * self._loss(field, hidden, ids[field]) for field, weight in self.weights.items()
        ]
        return torch.stack(losses).sum()

    def _loss(self, field: str, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of hidden states (N, D) at targets (N,) of one field."""
        if field not in self.robust:
            loss: Tensor = self.heads[field](hidden, targets)
            return loss
        head = self.heads[field]
        assert isinstance(head, FieldPrediction)  # noqa: S101 - built so
        robust: Tensor = self.robust[field](
            head.losses(hidden, targets), targets, targets != PAD_ID
        )
        return robust


class MaskedEvent(nn.Module):
    """BEAT's first objective: fill in hidden events from both sides (Devlin et al. 2019, 3.1).

    `masking_levels.py` tells which events are hidden and how. Their times stay visible: the
    question is what happened then.
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

    def __init__(
        self,
        encoder: Encoder,
        config: TrainingConfig,
        reduce: Callable[[Tensor], Tensor] = identity,
    ) -> None:
        super().__init__()
        self.prediction = EventPrediction(encoder, config, reduce, is_robust=True)
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
        self.window = window_heads(width, sizes)

    def start_from(self, rates: Mapping[str, Tensor]) -> None:
        """Make the window heads predict how often each target occurs; `rates` are (V',) per field.

        See `start_at_rates`.
        """
        start_at_rates(self.window, rates)

    def forward(self, embedding: Tensor, cut: CutLabels, typical_users: Tensor) -> Tensor:
        """Return the loss of embeddings (U, D) at a cutoff, over the users of an average batch."""
        losses = F.cross_entropy(self.next_time(embedding).float(), cut.next_time, reduction="none")
        for field, head in self.window.items():
            logits, targets = head(embedding).float(), cut.window[field].float()
            each = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1)
            losses = losses + each / targets.shape[1] ** 0.5
        return (losses * (cut.lengths > 0)).sum() / typical_users


class Objectives(nn.Module):
    """All objectives over one batch, from one pass through the transformer.

    Args:
        encoder: what is trained.
        config: the training.
        reduce: adds a tensor up over the processes that train; default one process.
    """

    def __init__(
        self,
        encoder: Encoder,
        config: TrainingConfig,
        reduce: Callable[[Tensor], Tensor] = identity,
    ) -> None:
        super().__init__()
        self.masked_event = MaskedEvent(encoder, config)
        self.next_event = NextEvent(encoder, config, reduce)
        self.contrastive = WindowAlignment(
            encoder.embedding_width,
            config.alignment,
            config.temperature,
            config.hardness,
            config.positive_share,
        )
        self.silence = Silence(encoder, config)
        self.future_window = FutureWindow(
            encoder.embedding_width,
            window_sizes(encoder.config, config) if config.weights.future_window else {},
            len(config.future_days),
        )
        self.weights = config.weights

    def start_from(self, batches: Sequence[TrainingBatch]) -> None:
        """Start the heads of windows at how often each of their targets occurs in some batches."""
        self.silence.start_from(window_rates(batches))
        self.future_window.start_from(future_rates(batches))

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
        if self.weights.future_window:
            losses["future_window"] = self._future_window(embeddings, batch)
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

    def _future_window(self, embeddings: list[Tensor], batch: TrainingBatch) -> Tensor:
        """Return the mean future-window loss over a batch's cutoffs."""
        losses = []
        for embedding, cut in zip(embeddings, batch.cuts, strict=True):
            has_history = cut.lengths > 0
            is_known = has_history[:, None].expand(-1, self.future_window.num_horizons)
            losses.append(self.future_window(embedding, cut.future, is_known, has_history))
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
