"""One vector per event: the sum of its fields' embeddings and of its time gap."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor, nn

from behavior_pipeline.contracts import MASK_ID, PAD_ID, TOKEN_FIELDS, UNKNOWN_ID
from behavior_pipeline.encoder.configuration import EncoderConfig
from behavior_pipeline.encoder.time_encoding import TimeEncoding

WIDE_FIELDS: Final = ("item", "category")
"""Fields whose vocabularies grow large: their tables are narrower, then projected."""


class FieldEmbedding(nn.Module):
    """A table of one field's values; the PAD row is zero and stays zero.

    Args:
        num_values: V, ids 0 to V - 1.
        table_width: width of the table.
        width: D, width of the result; projected without bias when the table is narrower.
    """

    def __init__(self, num_values: int, table_width: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(num_values, table_width, padding_idx=PAD_ID)
        self.projection = (
            nn.Identity() if table_width == width else nn.Linear(table_width, width, bias=False)
        )

    def forward(self, ids: Tensor) -> Tensor:
        """Embed ids (...) as (..., D); PAD gives zero, ids beyond the table count as UNK."""
        known = torch.where(ids < self.table.num_embeddings, ids, UNKNOWN_ID)
        vectors: Tensor = self.projection(self.table(known))
        return vectors


class EventEmbedder(nn.Module):
    """Events as vectors: LayerNorm(sum of field embeddings + time gap)."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        narrow = min(config.wide_table_width, config.width)
        self.fields = nn.ModuleDict(
            {
                name: FieldEmbedding(
                    config.field_sizes[name],
                    narrow if name in WIDE_FIELDS else config.width,
                    config.width,
                )
                for name in TOKEN_FIELDS
            }
        )
        self.gap = TimeEncoding(
            config.width, config.num_time_buckets, config.num_sinusoids, config.time_window_days
        )
        self.norm = nn.LayerNorm(config.width)

    def forward(self, ids: Mapping[str, Tensor], gap_days: Tensor) -> Tensor:
        """Embed events.

        Args:
            ids: token ids (B, T) per field; a field that is left out counts as PAD.
            gap_days: days since the event before, (B, T).

        Returns:
            Vectors (B, T, D).
        """
        total: Tensor = self.gap(gap_days)
        for name, values in ids.items():
            total = total + self.fields[name](values)
        vectors: Tensor = self.norm(total)
        return vectors


def hide(ids: Mapping[str, Tensor], hidden: Tensor) -> dict[str, Tensor]:
    """Replace every field of the events where `hidden` (B, T) by MASK; PAD fields stay PAD."""
    return {
        name: torch.where(hidden & (values != PAD_ID), MASK_ID, values)
        for name, values in ids.items()
    }
