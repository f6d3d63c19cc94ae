"""The next-event heads that a checkpoint keeps, and how well they foretell events.

Pretraining throws away most of its heads; those of the next event are kept, because they are how a
checkpoint is asked whether it still understands the events in front of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from safetensors.torch import load
from torch import Tensor

from behavior_pipeline.contracts import PAD_ID
from behavior_pipeline.encoder.architecture import Encoder
from behavior_pipeline.encoder.batches import BATCH_TOKENS, table_batches
from behavior_pipeline.encoder.embedder import FieldEmbedding
from behavior_pipeline.encoder.losses import FieldPrediction
from behavior_pipeline.encoder.sequence_files import SequenceTable

HEADS: Final = "heads.safetensors"
KEPT: Final = "heads/"  # before the heads' names, among the best weights of a training
_IN_TRAINING: Final = "objectives.next_event.prediction.heads."


@dataclass(frozen=True)
class Foretold:
    """How well events were foretold.

    Attributes:
        num_events: events that had one before them.
        loss: mean negative log probability of their types, in nats.
        unigram_loss: the same by the types' shares among these very events: the loss of knowing
            nothing of a user.
    """

    num_events: int
    loss: float
    unigram_loss: float


def kept_heads(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the next-event heads among a training's weights, `heads/<field>.<weight>`."""
    return {
        KEPT + name.removeprefix(_IN_TRAINING): value
        for name, value in weights.items()
        if name.startswith(_IN_TRAINING)
    }


def load_event_head(folder: Path, encoder: Encoder) -> FieldPrediction | None:
    """Return the head that foretells the next event's type; None if the checkpoint kept none.

    Args:
        folder: the checkpoint's.
        encoder: loaded from it.
    """
    path = folder / HEADS
    if not path.is_file():
        return None
    field = encoder.config.event_field
    weights = load(path.read_bytes())
    embedding = encoder.embedder.fields[field]
    assert isinstance(embedding, FieldEmbedding)  # noqa: S101 - built so
    size = embedding.table.num_embeddings
    head = FieldPrediction(embedding, encoder.config.width, num_negatives=1, max_full_softmax=size)
    own = {
        name.removeprefix(f"{field}."): value
        for name, value in weights.items()
        if name.startswith(f"{field}.")
    }
    head.load_state_dict(own | {"table.weight": embedding.table.weight})
    return head.eval()


@torch.inference_mode()
def foretell(encoder: Encoder, head: FieldPrediction, table: SequenceTable, since: int) -> Foretold:
    """Foretell the type of each event from those before it, among the newest of each user.

    Args:
        encoder: on a CPU.
        head: of its event field.
        table: histories.
        since: microseconds since 1970; earlier events are read, not foretold.
    """
    losses, types = [], []
    field = encoder.config.event_field
    for batch in table_batches(table, encoder.config, BATCH_TOKENS):
        hidden = encoder.causal_pass(batch).hidden
        targets = batch.ids[field].roll(-1, 1)
        is_target = _are_foretold(table, encoder.config.max_events, batch.users, hidden, since)
        is_target &= targets != PAD_ID
        losses.append(head.losses(hidden[is_target], targets[is_target]).double())
        types.append(targets[is_target])
    all_losses, all_types = torch.cat(losses), torch.cat(types)
    return Foretold(len(all_losses), float(all_losses.mean()), _unigram_loss(all_types))


def _are_foretold(
    table: SequenceTable,
    max_events: int,
    users: np.ndarray[tuple[int], np.dtype[np.int64]],
    hidden: Tensor,
    since: int,
) -> Tensor:
    """Return at which places (B, T) the event after is there and not too old."""
    is_foretold = np.zeros(hidden.shape[:2], np.bool_)
    for row, user in enumerate(users):
        end = table.offsets[user + 1]
        start = max(table.offsets[user], end - max_events)
        is_foretold[row, : end - start - 1] = table.times[start + 1 : end] >= since
    return torch.from_numpy(is_foretold)


def _unigram_loss(types: Tensor) -> float:
    """Return the entropy of the types' shares, in nats."""
    counts = torch.bincount(types).double()
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * shares.log()).sum())
