"""One vector per event: the sum of its fields' embeddings and of its time gap.

Which fields there are is the configuration's to say, so that (action, property, gap) of BEAT and
(weekday, time slot, location, event) of BehaveGPT are the same code.

Legend of shapes: N events (or any leading dimensions), D width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import Tensor, nn

from behavior_pipeline.contracts import MASK_ID, PAD_ID, UNKNOWN_ID
from behavior_pipeline.encoder.configuration import EncoderConfig
from behavior_pipeline.encoder.layers import Linear, make_norm
from behavior_pipeline.encoder.time_encoding import TimeEncoding, from_bits, to_bits


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
            nn.Identity() if table_width == width else Linear(table_width, width, bias=False)
        )

    def look_up(self, ids: Tensor) -> Tensor:
        """Return the rows of ids (...), narrow as they are; ids beyond the table count as UNK."""
        known = torch.where(ids < self.table.num_embeddings, ids, UNKNOWN_ID)
        rows: Tensor = self.table(known)
        return rows

    def forward(self, ids: Tensor) -> Tensor:
        """Embed ids (...) as (..., D); PAD gives zero."""
        vectors: Tensor = self.projection(self.look_up(ids))
        return vectors


class NumberEmbedding(FieldEmbedding):
    """A table over the buckets of a number; NaN, "the event has no such number", gives zero.

    Args:
        edges: inner edges of the buckets; bucket i holds edge i - 1 <= number < edge i.
        table_width: width of the table.
        width: D, width of the result.
    """

    edges: Tensor

    def __init__(self, edges: tuple[float, ...], table_width: int, width: int) -> None:
        super().__init__(len(edges) + 2, table_width, width)
        exact = to_bits(torch.tensor(edges, dtype=torch.float64))
        self.register_buffer("edges", exact, persistent=False)

    def look_up(self, ids: Tensor) -> Tensor:
        """Return the rows of numbers (...)."""
        buckets = torch.bucketize(ids.double().contiguous(), from_bits(self.edges), right=True) + 1
        rows: Tensor = self.table(torch.where(ids.isnan(), PAD_ID, buckets))
        return rows


class CodeEmbedding(FieldEmbedding):
    """A table for each place of a code vector (a quantised text or image); the rows are summed.

    The places' tables lie one after another in one table.

    Args:
        sizes: ids at each of the k places.
        table_width: width of the tables.
        width: D, width of the result.
    """

    starts: Tensor
    sizes: Tensor

    def __init__(self, sizes: tuple[int, ...], table_width: int, width: int) -> None:
        super().__init__(sum(sizes) + 1, table_width, width)
        counts = torch.tensor(sizes)
        self.register_buffer("sizes", counts, persistent=False)
        self.register_buffer("starts", counts.cumsum(0) - counts + 1, persistent=False)

    def look_up(self, ids: Tensor) -> Tensor:
        """Return the sums of the rows of codes (..., k); PAD adds nothing."""
        known = torch.where(ids < self.sizes, ids, UNKNOWN_ID)
        rows: Tensor = self.table(torch.where(ids == PAD_ID, PAD_ID, known + self.starts))
        return rows.sum(-2)


class EventEmbedder(nn.Module):
    """Events as vectors: norm(sum of field embeddings + time gap).

    The tables are narrow and widened by one matrix product over all of them laid side by side,
    which is the sum of their projections in one pass over memory.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        narrow, width = min(config.wide_table_width, config.width), config.width
        tables: dict[str, FieldEmbedding] = {}
        for name, size in config.field_sizes.items():
            tables[name] = FieldEmbedding(size, narrow, width)
        for name, edges in config.number_edges.items():
            tables[name] = NumberEmbedding(edges, narrow, width)
        for name, sizes in config.code_sizes.items():
            tables[name] = CodeEmbedding(sizes, narrow, width)
        self.fields = nn.ModuleDict(tables)
        self.has_gap = config.has_gap
        self.gap = TimeEncoding(
            width, config.num_time_buckets, config.num_sinusoids, config.time_window_days
        )
        self.norm = make_norm(config, width)

    def forward(self, ids: Mapping[str, Tensor], gap_days: Tensor) -> Tensor:
        """Embed events.

        Args:
            ids: per field token ids (N,), numbers (N,) or codes (N, k); a field that is left out
                counts as PAD.
            gap_days: days since the event before, (N,).

        Returns:
            Vectors (N, D).

        Raises:
            ValueError: if the configuration declares no field of such a name.
        """
        if unknown := sorted(set(ids) - set(self.fields)):
            raise ValueError(f"the encoder has no field {', '.join(unknown)}")
        rows, weights, total = self._gap(gap_days)
        for name, values in ids.items():
            embedding = self.fields[name]
            assert isinstance(embedding, FieldEmbedding)  # noqa: S101 - built so
            looked_up = embedding.look_up(values)
            if isinstance(embedding.projection, Linear):
                rows.append(looked_up)
                weights.append(embedding.projection.weight)
            else:
                total = looked_up if total is None else total + looked_up
        if rows:
            widened = F.linear(torch.cat(rows, dim=-1), torch.cat(weights, dim=1))
            total = widened if total is None else total + widened
        vectors: Tensor = self.norm(total)
        return vectors

    def _gap(self, gap_days: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
        """Return what the gap adds: narrow rows and what widens them, and vectors (N, D)."""
        if not self.has_gap:
            return [], [], None
        waves = self.gap.waves(gap_days)
        return [waves], [self.gap.sinusoids.weight], self.gap.buckets(self.gap.bucket_of(gap_days))


def hide(ids: Mapping[str, Tensor], hidden: Tensor) -> dict[str, Tensor]:
    """Replace every field of the events where `hidden` (N,) by MASK; PAD fields stay PAD.

    A number has no mask: it becomes NaN, as if the event had none.
    """
    return {name: _hide(values, hidden) for name, values in ids.items()}


def _hide(values: Tensor, hidden: Tensor) -> Tensor:
    """Hide one field: ids (N,), numbers (N,) or codes (N, k)."""
    if values.is_floating_point():
        return values.masked_fill(hidden, float("nan"))
    there = hidden.unsqueeze(-1) if values.dim() > hidden.dim() else hidden
    return torch.where(there & (values != PAD_ID), MASK_ID, values)
