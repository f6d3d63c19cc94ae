"""What the encoder is measured beside: BERT as most would write it, and a plain transformer."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertModel

from behavior_pipeline.encoder.configuration import EncoderConfig


def bert_config(shape: EncoderConfig) -> BertConfig:
    """Return BERT of the encoder's width and depth over the vocabulary of actions."""
    return BertConfig(
        vocab_size=shape.field_sizes["action"],
        hidden_size=shape.width,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        intermediate_size=shape.feedforward_width,
        max_position_embeddings=max(512, shape.max_events),
    )


class BertTraining(nn.Module):
    """Hugging Face's BERT with a masked-language-model head."""

    def __init__(self, shape: EncoderConfig) -> None:
        super().__init__()
        self.model = BertForMaskedLM(bert_config(shape))

    def forward(self, ids: Tensor, is_event: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of a padded batch."""
        loss: Tensor = self.model(input_ids=ids, attention_mask=is_event, labels=labels).loss
        return loss


class BertInference(nn.Module):
    """Hugging Face's BERT; a user is the mean over their events."""

    def __init__(self, shape: EncoderConfig) -> None:
        super().__init__()
        self.model = BertModel(bert_config(shape), add_pooling_layer=False)

    def forward(self, ids: Tensor, is_event: Tensor) -> Tensor:
        """Return one vector per user (B, D)."""
        hidden = self.model(input_ids=ids, attention_mask=is_event).last_hidden_state
        weights = is_event[:, :, None].to(hidden.dtype)
        mean: Tensor = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
        return mean


class PlainTransformer(nn.Module):
    """torch's own transformer layers over padded batches, with a tied masked head."""

    def __init__(self, shape: EncoderConfig) -> None:
        super().__init__()
        self.actions = nn.Embedding(shape.field_sizes["action"], shape.width, padding_idx=0)
        self.places = nn.Embedding(shape.max_events, shape.width)
        layer = nn.TransformerEncoderLayer(
            shape.width, shape.num_heads, shape.feedforward_width, dropout=0.0,
            activation="gelu", batch_first=True, norm_first=True,
        )  # fmt: skip
        self.layers = nn.TransformerEncoder(layer, shape.num_layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(shape.width)

    def forward(self, ids: Tensor, is_event: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of a padded batch."""
        places = torch.arange(ids.shape[1], device=ids.device)
        hidden = self.actions(ids) + self.places(places)
        hidden = self.norm(self.layers(hidden, src_key_padding_mask=is_event == 0))
        logits = F.linear(hidden, self.actions.weight).float()
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())
