"""What the encoder learns from: BEAT's three objectives, and the silence at a cutoff.

Legend of shapes: B users, T events, N predictions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import Tensor, nn

from behavior_pipeline.contracts import PAD_ID
from behavior_pipeline.encoder.architecture import CausalPass, Encoder
from behavior_pipeline.encoder.batches import EventBatch
from behavior_pipeline.encoder.configuration import TrainingConfig
from behavior_pipeline.encoder.cutoffs import (
    NEXT_TIME_SHARES,
    CutLabels,
    TrainingBatch,
    window_sizes,
)
from behavior_pipeline.encoder.embedder import FieldEmbedding, hide

MAX_FULL_SOFTMAX: Final = 2000
"""Vocabularies up to this size are predicted by a full softmax, larger ones by a sampled one."""

FIELD_WEIGHTS: Final = {"action": 1.0, "category": 0.5, "item": 0.5}
"""What the fields of a predicted event count."""

_TIME_WEIGHT: Final = 0.5
_RARE_LOGIT: Final = -4.0  # a window target is rare: where its head starts without a known rate
_HEAD_SPREAD: Final = 1e-3  # of a window head's first weights: it starts at its biases


def info_nce(left: Tensor, right: Tensor, temperature: float) -> Tensor:
    """Return the contrastive loss of pairs (N, W) with negatives from the batch.

    van den Oord et al. 2018, equation 4, with the temperature and the cosine of Chen et al. 2020,
    equation 1, taken in both directions: mean over i of
    -log(exp(cos(l_i, r_i) / t) / sum over j of exp(cos(l_i, r_j) / t)).
    """
    similarity = F.normalize(left, dim=1) @ F.normalize(right, dim=1).T / temperature
    own = torch.arange(len(left), device=left.device)
    return (F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)) / 2


def log_uniform_log_probability(ids: Tensor, num_values: int) -> Tensor:
    """Return the log of P(id) = log((id + 2) / (id + 1)) / log(V + 1): ids by falling frequency."""
    total = torch.log(torch.tensor(num_values + 1.0))
    return torch.log(torch.log1p(1.0 / (ids + 1.0)) / total)


def sample_log_uniform(num_samples: int, num_values: int) -> Tensor:
    """Draw ids (num_samples,) with replacement from `log_uniform_log_probability`."""
    uniform = torch.rand(num_samples, dtype=torch.float64)
    ids = torch.exp(uniform * torch.log(torch.tensor(num_values + 1.0, dtype=torch.float64))) - 1
    return ids.long().clamp(max=num_values - 1)


def sampled_cross_entropy(
    true_logits: Tensor,
    sampled_logits: Tensor,
    log_expected: Tensor,
    is_hit: Tensor,
) -> Tensor:
    """Return the mean cross-entropy (scalar) against sampled negatives, corrected by their chance.

    The sum over the vocabulary in the softmax is estimated as the true value's term plus the
    sampled terms over their expected counts, hits of the true value left out: an unbiased estimate
    of the full sum (Bengio and Senecal 2008; the logQ correction of Yi et al. 2019).

    Args:
        true_logits: (N,).
        sampled_logits: (N, M).
        log_expected: log of how often each sample is expected to be drawn, M times P, (M,).
        is_hit: where a sample is the true value, (N, M).
    """
    corrected = (sampled_logits - log_expected).masked_fill(is_hit, float("-inf"))
    total = torch.logsumexp(torch.cat((true_logits[:, None], corrected), dim=1), dim=1)
    return (total - true_logits).mean()


class FieldPrediction(nn.Module):
    """Predicts a field's value through the table that embeds it (Press and Wolf 2017).

    Args:
        embedding: the field's embedding, shared with the encoder.
        width: D, width of what predicts.
        num_negatives: sampled values where the vocabulary exceeds MAX_FULL_SOFTMAX.
    """

    def __init__(self, embedding: FieldEmbedding, width: int, num_negatives: int) -> None:
        super().__init__()
        self.table = embedding.table
        self.transform = nn.Linear(width, self.table.embedding_dim)
        self.bias = nn.Parameter(torch.zeros(self.table.num_embeddings))
        self.num_negatives = num_negatives

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of hidden states (N, D) at targets (N,); PAD is no target."""
        is_target = targets != PAD_ID
        hidden, targets = self.transform(hidden[is_target]), targets[is_target]
        if not len(targets):
            return hidden.sum() * 0.0
        if self.table.num_embeddings <= MAX_FULL_SOFTMAX:
            return F.cross_entropy(F.linear(hidden, self.table.weight, self.bias), targets)
        return self._sampled(hidden, targets)

    def _sampled(self, hidden: Tensor, targets: Tensor) -> Tensor:
        num_values = self.table.num_embeddings
        # Drawn on the CPU so that a seed means the same numbers on every device.
        samples = sample_log_uniform(self.num_negatives, num_values)
        log_expected = log_uniform_log_probability(samples, num_values)
        log_expected = (log_expected + torch.log(torch.tensor(float(len(samples))))).to(hidden)
        samples = samples.to(targets.device)
        true_logits = (hidden * self.table(targets)).sum(1) + self.bias[targets]
        sampled = F.linear(hidden, self.table(samples), self.bias[samples])
        hits = targets[:, None] == samples
        return sampled_cross_entropy(true_logits.float(), sampled.float(), log_expected, hits)


class EventPrediction(nn.Module):
    """Predicts action, category and item of an event: the weighted sum of their losses."""

    def __init__(self, encoder: Encoder, num_negatives: int) -> None:
        super().__init__()
        self.heads = nn.ModuleDict()
        for field in FIELD_WEIGHTS:
            embedding = encoder.embedder.fields[field]
            assert isinstance(embedding, FieldEmbedding)  # noqa: S101 - built so
            self.heads[field] = FieldPrediction(embedding, encoder.config.width, num_negatives)

    def forward(self, hidden: Tensor, ids: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of hidden states (N, D) at events with the ids (N,) per field."""
        losses = [
            weight * self.heads[field](hidden, ids[field])
            for field, weight in FIELD_WEIGHTS.items()
        ]
        return torch.stack(losses).sum()


class MaskedEvent(nn.Module):
    """BEAT's first objective: fill in hidden events from both sides (Devlin et al. 2019, 3.1).

    Of the events drawn, 80 % have every field replaced by MASK, 10 % become another event of the
    batch and 10 % stay as they are. Their times stay visible: the question is what happened then.
    """

    def __init__(self, encoder: Encoder, config: TrainingConfig) -> None:
        super().__init__()
        self.prediction = EventPrediction(encoder, config.num_negatives)
        self.mask_share = config.mask_share

    def forward(self, encoder: Encoder, batch: EventBatch) -> Tensor:
        """Return the mean loss over the events drawn in a batch."""
        valid = batch.ids["action"] != PAD_ID
        drawn = draw_events(valid, self.mask_share)
        corrupted = replace(batch, ids=corrupt(batch.ids, drawn))
        hidden = encoder.hidden_states(corrupted, is_causal=False)
        targets = {field: values[drawn] for field, values in batch.ids.items()}
        loss: Tensor = self.prediction(hidden[drawn], targets)
        return loss


def draw_events(valid: Tensor, share: float) -> Tensor:
    """Draw a share of the valid events, (B, T) bool, on the CPU's random stream."""
    return (torch.rand(valid.shape) < share).to(valid.device) & valid


def corrupt(ids: Mapping[str, Tensor], drawn: Tensor) -> dict[str, Tensor]:
    """Return ids (B, T) with drawn events masked (80 %), swapped (10 %) or kept (10 %)."""
    chance = torch.rand(drawn.shape).to(drawn.device)
    corrupted = hide(ids, drawn & (chance < 0.8))  # noqa: PLR2004 - BERT's share
    swapped = drawn & (chance >= 0.9)  # noqa: PLR2004 - BERT's share
    other = torch.randint(drawn.numel(), (int(swapped.sum()),)).to(drawn.device)
    for field, values in ids.items():
        substitute = values.reshape(-1)[other]
        kept = values[swapped]
        corrupted[field][swapped] = torch.where(
            (substitute == PAD_ID) | (kept == PAD_ID), kept, substitute
        )
    return corrupted


class NextEvent(nn.Module):
    """BEAT's second objective: from events so far, the next one and the time until it.

    Cross-entropies of the next action, category and item (Radford et al. 2018, equation 1), and of
    the log-spaced bucket of the next gap.
    """

    def __init__(self, encoder: Encoder, config: TrainingConfig) -> None:
        super().__init__()
        self.prediction = EventPrediction(encoder, config.num_negatives)
        self.gap = nn.Linear(encoder.config.width, encoder.config.num_time_buckets)

    def forward(self, encoder: Encoder, hidden: Tensor, batch: EventBatch) -> Tensor:
        """Return the mean loss over events that have a successor; hidden is (B, T, D), causal."""
        places = torch.arange(1, hidden.shape[1], device=hidden.device)
        has_next = places < batch.lengths[:, None]
        known = hidden[:, :-1][has_next]
        if not len(known):
            return hidden.sum() * 0.0
        targets = {field: values[:, 1:][has_next] for field, values in batch.ids.items()}
        buckets = encoder.embedder.gap.bucket_of(batch.gap_days[:, 1:][has_next])
        loss: Tensor = self.prediction(known, targets)
        return loss + _TIME_WEIGHT * F.cross_entropy(self.gap(known).float(), buckets)


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
            nn.Linear(width, width), nn.GELU(), nn.Linear(width, min(width, 128))
        )

    def forward(self, embedding: Tensor, following: Tensor, is_pair: Tensor) -> Tensor:
        """Return the loss of embeddings (B, D) and those of what follows, where `is_pair` (B,)."""
        if int(is_pair.sum()) < 2:  # noqa: PLR2004 - a pair without negatives teaches nothing
            return embedding.sum() * 0.0
        left, right = self.projection(embedding[is_pair]), self.projection(following[is_pair])
        return info_nce(left.float(), right.float(), self.temperature)


class Silence(nn.Module):
    """From the embedding at a random cutoff: when the user acts next, and what in the window.

    Cross-entropy of the class of the time to the next event, "none within the horizon" among them
    (a discrete hazard with censoring at the horizon), and binary cross-entropies of the actions,
    categories and items that occur in the window, summed over the V' targets over sqrt(V').
    """

    def __init__(self, encoder: Encoder, config: TrainingConfig) -> None:
        super().__init__()
        width = encoder.embedding_width
        self.next_time = nn.Linear(width, len(NEXT_TIME_SHARES) + 1)
        sizes = window_sizes(encoder.config, config)
        self.window = nn.ModuleDict(
            {field: nn.Linear(width, size) for field, size in sizes.items() if size > 0}
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

    def forward(self, embedding: Tensor, cut: CutLabels, typical_users: float) -> Tensor:
        """Return the loss of embeddings (B, D) at a cutoff, over the users of an average batch."""
        losses = F.cross_entropy(self.next_time(embedding).float(), cut.next_time, reduction="none")
        for field, head in self.window.items():
            logits, targets = head(embedding).float(), cut.window[field]
            each = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1)
            losses = losses + each / targets.shape[1] ** 0.5
        return (losses * (cut.lengths > 0)).sum() / typical_users


class Objectives(nn.Module):
    """All objectives over one batch, sharing its causal passes."""

    def __init__(self, encoder: Encoder, config: TrainingConfig) -> None:
        super().__init__()
        self.masked_event = MaskedEvent(encoder, config)
        self.next_event = NextEvent(encoder, config)
        self.contrastive = Contrastive(encoder, config)
        self.silence = Silence(encoder, config)
        self.weights = config.weights
        self.masked_row_share = config.masked_row_share

    def forward(self, encoder: Encoder, batch: TrainingBatch) -> dict[str, Tensor]:
        """Return the loss of each objective, and under `total` their weighted sum."""
        past = encoder.causal_pass(batch.history)
        ahead = encoder.causal_pass(batch.future)
        embeddings = [_embed(encoder, past, _as_of(batch.history, cut)) for cut in batch.cuts]
        following = _embed(encoder, ahead, batch.future)
        has_history = batch.history.lengths > 0
        is_pair = has_history & (batch.future.lengths > 0)
        losses = {
            "masked_event": self._masked(encoder, batch),
            "next_event": self._next(
                encoder, (past.hidden, batch.history), (ahead.hidden, batch.future)
            ),
            "contrastive": self.contrastive(embeddings[0], following, is_pair),
            "silence": self._silence(embeddings, batch),
        }
        total = sum(getattr(self.weights, name) * loss for name, loss in losses.items())
        return {**losses, "total": torch.as_tensor(total)}

    def _silence(self, embeddings: list[Tensor], batch: TrainingBatch) -> Tensor:
        """Return the mean silence loss over a batch's cutoffs."""
        losses = [
            self.silence(embedding, cut, batch.typical_users)
            for embedding, cut in zip(embeddings, batch.cuts, strict=True)
        ]
        return torch.stack(losses).mean()

    def _next(self, encoder: Encoder, *parts: tuple[Tensor, EventBatch]) -> Tensor:
        """Return the next-event loss over several passes, each by its number of predictions."""
        counts = [(batch.lengths - 1).clamp(min=0).sum() for _, batch in parts]
        losses = [
            count * self.next_event(encoder, hidden, batch)
            for count, (hidden, batch) in zip(counts, parts, strict=True)
        ]
        return torch.stack(losses).sum() / torch.stack(counts).sum().clamp(min=1)

    def _masked(self, encoder: Encoder, batch: TrainingBatch) -> Tensor:
        """Return the masked-event loss on a share of the users; whole histories or what follows."""
        every = max(1, round(1 / self.masked_row_share)) if self.masked_row_share else 0
        whole = batch.history if int(batch.history.lengths.max()) else batch.future
        if not every or not self.weights.masked_event:
            return whole.gap_days.sum() * 0.0
        loss: Tensor = self.masked_event(encoder, _every(whole, every))
        return loss


def _embed(encoder: Encoder, passed: CausalPass, batch: EventBatch) -> Tensor:
    """Return embeddings (B, D) from a causal pass."""
    return encoder.readout(encoder.pool(passed, batch), batch.silence_days)


def _as_of(history: EventBatch, cut: CutLabels) -> EventBatch:
    """Return histories as they were known at a cutoff; what came later is beyond their lengths."""
    return replace(history, lengths=cut.lengths, silence_days=cut.silence_days)


def _every(batch: EventBatch, step: int) -> EventBatch:
    """Return every `step`-th user of a batch."""
    return EventBatch(
        {field: values[::step] for field, values in batch.ids.items()},
        batch.gap_days[::step],
        batch.lengths[::step],
        batch.silence_days[::step],
        batch.before[::step],
        batch.users[::step],
    )
