"""Packing: users' runs of events one after another in a fixed budget of tokens.

Legend of shapes: N tokens, R runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from behavior_pipeline.encoder.arrangement import arranged
from behavior_pipeline.encoder.configuration import EncoderConfig
from behavior_pipeline.encoder.history import BEFORE, Prefixes
from behavior_pipeline.encoder.layouts import ARRANGED_IN, Layout, PackedLayout
from behavior_pipeline.encoder.sequence_files import Ints, SequenceTable

PACKED_TOKENS: Final = 65_536
"""Tokens of a packed inference batch on a GPU: enough to keep it busy for longer than the next
batch takes to launch, few enough that a table fills its batches and the first is made soon."""

MIN_MEAN_LENGTH: Final = 8
"""Room for runs in a packed inference batch: as many as there would be at this mean length."""

LOOK_AHEAD: Final = 256
"""Users that are tried, in order, when the next one does not fit in a batch any more."""


@dataclass(frozen=True)
class Tokens:
    """Events that lie flat, and who attends to whom.

    Attributes:
        ids: per field ids (N,), numbers (N,) or codes (N, k).
        gap_days: days since the event before, (N,) float32.
        places: each token's place in its run, (N,) int64.
        elapsed_days: days since the run's first event, (N,) float64.
        layout: who attends to whom.
    """

    ids: Mapping[str, Tensor]
    gap_days: Tensor
    places: Tensor
    elapsed_days: Tensor
    layout: Layout

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Tokens:
        """Return the tokens on a device."""
        how: dict[str, Any] = {"device": device, "non_blocking": non_blocking}
        return Tokens(
            {name: values.to(**how) for name, values in self.ids.items()},
            self.gap_days.to(**how),
            self.places.to(**how),
            self.elapsed_days.to(**how),
            self.layout.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> Tokens:
        """Return packed tokens in memory that a GPU can fetch from while others work."""
        assert isinstance(self.layout, PackedLayout)  # noqa: S101 - padded ones stay on a CPU
        return Tokens(
            {name: values.pin_memory() for name, values in self.ids.items()},
            self.gap_days.pin_memory(),
            self.places.pin_memory(),
            self.elapsed_days.pin_memory(),
            self.layout.pin_memory(),
        )


@dataclass(frozen=True)
class FlatRuns:
    """Runs of events cut out of a table, one after another, then filler.

    Attributes:
        ids: token ids per field, N int64; 0 in the filler.
        gap_days: days since the event before, N float32.
        elapsed_days: days since the run's first event, N float64.
        rows: each token's run, N int64; -1 in the filler.
        places: its place in the run, N int64.
        lengths: tokens of each run.
        names: what the caller calls each run: the number that it gave it.
        block: tokens of a block that runs are arranged in; 0 leaves them as they are given.
    """

    ids: Mapping[str, Ints]
    gap_days: NDArray[np.float32]
    elapsed_days: NDArray[np.float64]
    rows: Ints
    places: Ints
    lengths: Ints
    names: Ints
    block: int = 0

    @classmethod
    def cut(
        cls,
        table: SequenceTable,
        fields: Sequence[str],
        starts: Ints,
        lengths: Ints,
        num_tokens: int,
        block: int = 0,
    ) -> FlatRuns:
        """Cut runs out of a table.

        Args:
            table: where the events are.
            fields: the fields that are read.
            starts: flat place of each run's first event.
            lengths: events of each run; their sum is at most `num_tokens`.
            num_tokens: N.
            block: as in the attributes.
        """
        names = _arrange(lengths, block)
        lengths = lengths[names]
        rows, places = _number(lengths)
        source = starts[names][rows] + places
        gap_days = table.gap_days[source]
        running = np.cumsum(gap_days, dtype=np.float64)
        elapsed = running - running[np.arange(len(source)) - places]
        ids = {name: table.ids[name][source].astype(np.int64) for name in fields}
        whole = cls(ids, gap_days, elapsed, rows, places, lengths, names, block)
        return whole.filled(num_tokens)

    def take(self, runs: Ints, num_tokens: int) -> FlatRuns:
        """Return some of the runs again, arranged likewise, in `num_tokens` tokens."""
        runs = runs[_arrange(self.lengths[runs], self.block)]
        first = np.cumsum(self.lengths) - self.lengths
        rows, places = _number(self.lengths[runs])
        source = first[runs][rows] + places
        return FlatRuns(
            {name: values[source] for name, values in self.ids.items()},
            self.gap_days[source],
            self.elapsed_days[source],
            rows,
            places,
            self.lengths[runs],
            self.names[runs],
            self.block,
        ).filled(num_tokens)

    def without_first_gaps(self, first_name: int) -> FlatRuns:
        """Forget the gap before the first event of the runs called `first_name` or more."""
        is_begin = (self.places == 0) & (self.rows >= 0) & (self.names[self.rows] >= first_name)
        return replace(self, gap_days=np.where(is_begin, np.float32(0), self.gap_days))

    def filled(self, num_tokens: int) -> FlatRuns:
        """Return the runs with filler up to so many tokens."""
        missing = num_tokens - len(self.rows)

        def fill(values: NDArray[Any], filler: int = 0) -> NDArray[Any]:
            return np.concatenate((values, np.full(missing, filler, values.dtype)))

        return replace(
            self,
            ids={name: fill(values) for name, values in self.ids.items()},
            gap_days=fill(self.gap_days),
            elapsed_days=fill(self.elapsed_days),
            rows=fill(self.rows, -1),
            places=fill(self.places),
        )

    @property
    def num_tokens(self) -> int:
        """Tokens that are events."""
        return int(self.lengths.sum())

    def prefixes(self, lengths: Ints, before: NDArray[np.float32]) -> Prefixes:
        """Return the runs, by their names, as known at cutoffs.

        Args:
            lengths: events known at each cutoff, (R, C), R at least the number of runs.
            before: as in `Prefixes`, (R, len(BEFORE)).
        """
        num_rows = len(lengths)
        starts = np.zeros(num_rows, np.int64)
        starts[self.names] = np.cumsum(self.lengths) - self.lengths
        return Prefixes(
            rows=torch.from_numpy(np.where(self.rows < 0, num_rows, self.names[self.rows])),
            places=torch.from_numpy(self.places),
            gap_days=torch.from_numpy(self.gap_days),
            elapsed_days=torch.from_numpy(self.elapsed_days),
            starts=torch.from_numpy(starts),
            lengths=torch.from_numpy(lengths),
            before=torch.from_numpy(before),
        )


def tokens_of(parts: Sequence[FlatRuns], layout: Layout) -> Tokens:
    """Lay parts one after another."""

    def join(arrays: list[NDArray[Any]]) -> Tensor:
        return torch.from_numpy(np.concatenate(arrays) if len(arrays) > 1 else arrays[0])

    return Tokens(
        {name: join([part.ids[name] for part in parts]) for name in parts[0].ids},
        join([part.gap_days for part in parts]),
        join([part.places for part in parts]),
        join([part.elapsed_days for part in parts]),
        layout,
    )


def _arrange(lengths: Ints, block: int) -> Ints:
    """Return the order that runs are to lie in."""
    return arranged(lengths, block) if block else np.arange(len(lengths))


def _number(lengths: Ints) -> tuple[Ints, Ints]:
    """Return for each token of runs of such lengths its run and its place in the run."""
    rows = np.repeat(np.arange(len(lengths)), lengths)
    first = np.cumsum(lengths) - lengths
    return rows, np.arange(len(rows)) - first[rows]


def fill(costs: Ints, budget: int, max_items: int) -> tuple[list[Ints], Ints]:
    """Put items into batches, in order, so that each batch is as full as its budget allows.

    A batch takes items in order until one does not fit, then those of the next LOOK_AHEAD that
    still do; what was passed over comes first in the next batch.

    Args:
        costs: tokens of each item, none more than the budget.
        budget: tokens of a batch.
        max_items: items of a batch at the most.

    Returns:
        Items of each full batch, and the items left over, which do not fill one.
    """
    batches: list[Ints] = []
    queue, end = np.empty(0, np.int64), 0
    while True:
        more = max(0, min(len(costs) - end, max_items + LOOK_AHEAD - len(queue)))
        queue, end = np.concatenate((queue, np.arange(end, end + more))), end + more
        taken = _choose(costs[queue], budget, max_items)
        if end == len(costs) and taken.all():
            return batches, queue
        batches.append(queue[taken])
        queue = queue[~taken]


def _choose(costs: Ints, budget: int, max_items: int) -> NDArray[np.bool_]:
    """Tell which of the items of a queue go into a batch."""
    taken = np.zeros(len(costs), np.bool_)
    count = int(np.searchsorted(np.cumsum(costs), budget, side="right"))
    count = min(count, max_items)
    taken[:count] = True
    room, places = budget - int(costs[:count].sum()), max_items - count
    for item in range(count, min(len(costs), count + LOOK_AHEAD)):
        if places and costs[item] <= room:
            taken[item] = True
            room, places = room - int(costs[item]), places - 1
        if not room:
            break
    return taken


@dataclass(frozen=True)
class PackedBatch:
    """Histories of users, packed for a causal pass.

    Attributes:
        tokens: the events.
        prefixes: the histories with one cutoff each, after their last event.
        silence_days: days from each last event to the cutoff, (R,) float32.
        users: which user each of the first runs is, as its place in what was read.
    """

    tokens: Tokens
    prefixes: Prefixes
    silence_days: Tensor
    users: Ints

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PackedBatch:
        """Return the batch on a device."""
        how: dict[str, Any] = {"device": device, "non_blocking": non_blocking}
        return PackedBatch(
            self.tokens.to(**how),
            self.prefixes.to(**how),
            self.silence_days.to(**how),
            self.users,
        )

    def pin_memory(self) -> PackedBatch:
        """Return the batch in memory that a GPU can fetch from while others work."""
        return PackedBatch(
            self.tokens.pin_memory(),
            self.prefixes.pin_memory(),
            self.silence_days.pin_memory(),
            self.users,
        )


def packed_batches(
    table: SequenceTable,
    config: EncoderConfig,
    num_tokens: int = PACKED_TOKENS,
    kernel: str = "varlen",
) -> Iterator[PackedBatch]:
    """Yield a table's users in packed batches of one shape, newest `max_events` events of each.

    Users are dealt out in order of length, so that all batches hold the same mix of lengths and
    are equally full.

    Args:
        table: the users.
        config: of the encoder.
        num_tokens: tokens of a batch.
        kernel: what attends on a GPU, one of layouts.KERNELS.
    """
    kept = np.minimum(table.lengths, config.max_events)
    order = np.argsort(-kept, kind="stable")
    num_runs = max(1, num_tokens // MIN_MEAN_LENGTH)
    if num_tokens < config.max_events:
        raise ValueError(f"{num_tokens} tokens do not hold {config.max_events} events")
    count = max(1, -(-int(kept.sum()) // num_tokens), -(-len(table) // num_runs))
    while kept[order[::count]].sum() > num_tokens:  # the first batch holds the most
        count += 1
    for number in range(min(count, len(table))):
        users = order[number::count]
        yield _pack(table, config, users, kept[users], (num_tokens, num_runs), kernel)


def _pack(
    table: SequenceTable,
    config: EncoderConfig,
    users: Ints,
    kept: Ints,
    shape: tuple[int, int],
    kernel: str,
) -> PackedBatch:
    """Pack the newest `kept` events of users in so many tokens and runs."""
    num_tokens, num_runs = shape
    starts = table.offsets[users + 1] - kept
    block = ARRANGED_IN.get(kernel, 0)
    flat = FlatRuns.cut(table, tuple(config.field_sizes), starts, kept, num_tokens, block)
    layout = PackedLayout.of([flat.lengths], [num_tokens], num_runs, config.max_events, kernel)
    lengths, silence = np.zeros((num_runs, 1), np.int64), np.zeros(num_runs, np.float32)
    before = np.zeros((num_runs, len(BEFORE)), np.float32)
    lengths[: len(users), 0] = kept
    before[: len(users)] = table.before(users, starts)
    silence[: len(users)] = table.silence_days(users)
    return PackedBatch(
        tokens_of([flat], layout),
        flat.prefixes(lengths, before),
        torch.from_numpy(silence),
        users,
    )
