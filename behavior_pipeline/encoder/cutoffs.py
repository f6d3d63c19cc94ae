"""Training batches: every user's history is cut at random moments, and what follows is the label.

A batch is N tokens, the same N every time. The first tokens attend causally: the histories of its
users, then what follows of each of them, then filler. The others attend both ways: copies of some
of these runs with events hidden, then filler.

Legend of shapes: U users of a batch at the most, R = 2 U runs (histories, then what follows),
C cutoffs of each user, N tokens, M masked events.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from behavior_pipeline.contracts import NUM_SPECIAL_IDS
from behavior_pipeline.encoder.configuration import EncoderConfig, TrainingConfig
from behavior_pipeline.encoder.cuts import NEXT_TIME_SHARES, CutoffPlan, Cuts, plan_cutoffs
from behavior_pipeline.encoder.future import future_labels, scaled_horizons
from behavior_pipeline.encoder.history import BEFORE
from behavior_pipeline.encoder.layouts import ARRANGED_IN, PackedLayout
from behavior_pipeline.encoder.masking import MaskedEvents, masked_events
from behavior_pipeline.encoder.masking_levels import Masking, hide_events
from behavior_pipeline.encoder.packing import FlatRuns, fill, tokens_of
from behavior_pipeline.encoder.sequence_files import (
    Ints,
    SequenceTable,
    read_in_order,
    read_shuffled,
)
from behavior_pipeline.encoder.training_batches import (
    CutLabels,
    TrainingBatch,
    future_rates,
    window_rates,
)
from behavior_pipeline.errors import PipelineError

__all__ = [
    "NEXT_TIME_SHARES", "WINDOW_FIELDS", "BatchMaker", "CutLabels", "CutoffPlan", "Cuts",
    "TrainingBatch", "future_rates", "is_validation", "plan_cutoffs", "window_rates",
    "window_sizes",
]  # fmt: skip

WINDOW_FIELDS: Final = ("action", "category", "item")
"""Fields whose values in the label window are predicted as a set."""

_HASH_RANGE: Final = 10_000
_SPREADS: Final = 4  # standard deviations of a batch's mean length that it has room for users for


def window_sizes(encoder: EncoderConfig, config: TrainingConfig) -> dict[str, int]:
    """Return how many ids of each window field are predicted: the most frequent ones."""
    return {
        field: min(encoder.field_sizes[field] - NUM_SPECIAL_IDS, config.max_window_targets)
        for field in WINDOW_FIELDS
        if field in encoder.field_sizes
    }


def is_validation(user_ids: Sequence[str], share: float) -> NDArray[np.bool_]:
    """Tell which users are kept for validation: a stable function of the id alone."""
    hashes = np.fromiter((zlib.crc32(user.encode()) for user in user_ids), np.int64, len(user_ids))
    return hashes % _HASH_RANGE < share * _HASH_RANGE


class BatchMaker:
    """Makes training batches out of sequence files.

    Args:
        files: sequence files.
        encoder: shape of the encoder.
        config: the training.
        plan: where histories may be cut.

    Raises:
        PipelineError: if a batch is too small for one user.
    """

    def __init__(
        self,
        files: Sequence[Path],
        encoder: EncoderConfig,
        config: TrainingConfig,
        plan: CutoffPlan,
    ) -> None:
        longest = encoder.max_events + config.max_future_events
        if config.causal_tokens < longest:
            raise PipelineError(
                f"Batches of {config.batch_tokens:,} tokens, masked copies among them, are too "
                f"small for a user with {longest} events.",
                "Raise batch_tokens.",
            )
        self.files = files
        self.config = config
        self.plan = plan
        self.encoder = encoder
        self.attention = "varlen" if config.attention == "auto" else config.attention
        self.window_sizes = window_sizes(encoder, config)
        self.max_users = _room_for_users(files, encoder, config)

    def training(
        self, rank: int = 0, world_size: int = 1, skip: int = 0
    ) -> Iterator[TrainingBatch]:
        """Yield batches without end, in an order and with cutoffs that the seed decides.

        Users that do not fill a batch wait for the next buffer of users and, at the end of an
        epoch, for the next epoch; only an epoch that is less than one batch is a batch of its own.

        Args:
            rank: which of the processes this is; it gets every `world_size`-th batch. All batches
                are equally large, so no process waits for another.
            world_size: how many processes train.
            skip: batches of this rank that are passed over, for instance after a restart; they are
                drawn but not made.

        Raises:
            PipelineError: if no user is left for training.
        """
        for number, part in enumerate(self._parts()):
            turn, owner = divmod(number, world_size)
            if owner == rank and turn >= skip:
                yield self._make(part)

    def validation(self) -> list[TrainingBatch]:
        """Return the validation users' batches, the same at every call; maybe none."""
        random = np.random.default_rng([self.config.seed, 2**32 - 1])
        left, kept = self.config.max_validation_users, None
        for table in read_in_order(self.files, self.config.shuffle_users):
            users = np.flatnonzero(self._is_kept(table) & (table.lengths > 0))[:left]
            left -= len(users)
            taken = table.take(users)
            kept = taken if kept is None else kept.followed_by(taken)
        if kept is None or not len(kept):
            return []
        drawn = self._draw(kept, random.permutation(len(kept)), random)
        return [self._make(part) for part in self._split_evenly(drawn)]

    def _parts(self) -> Iterator[_Drawn]:
        """Yield the users of each batch, cut, without end."""
        epoch, waiting = 0, None
        while True:
            random = np.random.default_rng([self.config.seed, epoch])
            is_empty = True
            for table in read_shuffled(self.files, self.config.shuffle_users, random):
                users = np.flatnonzero(~self._is_kept(table) & (table.lengths > 0))
                merged, order = _after(waiting, table.take(random.permutation(users)))
                drawn = self._draw(merged, order, random)
                parts, left = self._split(drawn)
                for part in parts:
                    is_empty = False
                    yield part
                waiting = merged.take(drawn.users[left])
            if is_empty:
                if waiting is None or not len(waiting):
                    raise PipelineError("No user is left for training.", "Lower validation_share.")
                yield self._draw(waiting, np.arange(len(waiting)), random)
                waiting = None
            epoch += 1

    def _is_kept(self, table: SequenceTable) -> NDArray[np.bool_]:
        """Tell which users of a table are kept for validation."""
        return is_validation(table.user_ids.to_pylist(), self.config.validation_share)

    def _draw(self, table: SequenceTable, users: Ints, random: np.random.Generator) -> _Drawn:
        """Cut users at random moments, C each, and seed what is drawn later in their batches."""
        shape = len(users), self.config.cutoffs_per_user
        moments = random.integers(self.plan.earliest, self.plan.latest, shape, endpoint=True)
        latest_first = np.sort(moments, axis=1)[:, ::-1].T.copy()
        cuts = [Cuts.at(table, users, column, self.plan.horizon) for column in latest_first]
        history = np.minimum(cuts[0].places - cuts[0].starts, self.encoder.max_events)
        following = np.minimum(cuts[0].ends - cuts[0].places, self.config.max_future_events)
        seed = int(random.integers(2**62))
        return _Drawn(table, users, cuts, history, following, float(len(users)), seed)

    def _split(self, drawn: _Drawn) -> tuple[list[_Drawn], Ints]:
        """Put users into full batches; return them and the users left over."""
        parts, left = fill(drawn.costs, self.config.causal_tokens, self.max_users)
        typical = (len(drawn.users) - len(left)) / max(len(parts), 1)
        return [drawn.take(part, typical, number) for number, part in enumerate(parts)], left

    def _split_evenly(self, drawn: _Drawn) -> list[_Drawn]:
        """Put users into batches that are about equally full."""
        room = self.config.causal_tokens - int(drawn.costs.max(initial=0))
        total = int(drawn.costs.sum())
        count = max(-(-total // max(room, 1)), -(-len(drawn.users) // self.max_users))
        order = np.argsort(-drawn.costs, kind="stable")
        parts = [np.sort(order[number::count]) for number in range(count)]
        typical = len(drawn.users) / max(count, 1)
        return [drawn.take(part, typical, number) for number, part in enumerate(parts)]

    def _make(self, drawn: _Drawn) -> TrainingBatch:
        """Lay out the users of a batch and look up their labels."""
        flat, first = self._causal(drawn)
        random = np.random.default_rng(drawn.seed)
        copies, masked = self._masked(flat, random)
        parts = [flat] if copies is None else [flat, copies]
        lengths, before = self._known(drawn, first)
        has_history, follows = drawn.history > 0, drawn.following > 0
        return TrainingBatch(
            tokens=tokens_of(parts, self._layout(parts)),
            prefixes=flat.prefixes(lengths, before),
            has_next=torch.from_numpy(_has_next(flat)),
            masked=masked,
            cuts=tuple(self._labels(drawn.table, cut, first) for cut in drawn.cuts),
            is_pair=self._rows(has_history & follows),
            num_users=len(drawn.users),
            num_events=flat.num_tokens,
            num_masked_tokens=0 if copies is None else copies.num_tokens,
            typical_users=torch.tensor(drawn.typical_users),
        )

    def _causal(self, drawn: _Drawn) -> tuple[FlatRuns, Ints]:
        """Lay out histories and what follows; return them and where the histories begin."""
        latest = drawn.cuts[0]
        first = latest.places - drawn.history
        missing = np.zeros(self.max_users - len(drawn.users), np.int64)
        starts = np.concatenate((first, missing, latest.places, missing))
        lengths = np.concatenate((drawn.history, missing, drawn.following, missing))
        flat = FlatRuns.cut(
            drawn.table, tuple(self.encoder.field_sizes), starts, lengths,
            self.config.causal_tokens, ARRANGED_IN.get(self.attention, 0),
        )  # fmt: skip
        # What follows is read as if it were all there is: no gap leads to it.
        return flat.without_first_gaps(self.max_users), first

    def _masked(
        self, flat: FlatRuns, random: np.random.Generator
    ) -> tuple[FlatRuns | None, MaskedEvents | None]:
        """Copy some of the runs and hide some of their events."""
        num_tokens = self.config.masked_tokens
        if not num_tokens:
            return None, None
        order = random.permutation(np.flatnonzero(flat.lengths))
        order = order[flat.lengths[order] <= num_tokens]
        full, rest = fill(flat.lengths[order], num_tokens, 2 * self.max_users)
        copies = flat.take(order[full[0] if full else rest], num_tokens)
        masking = Masking(self.config.mask_share, self.config.mask_levels)
        event_field = self.encoder.event_field
        hidden = hide_events(copies.ids, copies.rows, masking, random, event_field)
        size = round(self.config.mask_share * num_tokens) + 1
        events = masked_events(hidden.targets, hidden.chosen, len(flat.rows), size)
        return replace(copies, ids=hidden.ids), events

    def _layout(self, parts: Sequence[FlatRuns]) -> PackedLayout:
        """Return who attends to whom."""
        longest = max(self.encoder.max_events, self.config.max_future_events)
        lengths, sizes = [part.lengths for part in parts], [len(part.rows) for part in parts]
        return PackedLayout.of(lengths, sizes, 2 * self.max_users, longest, self.attention)

    def _known(self, drawn: _Drawn, first: Ints) -> tuple[Ints, NDArray[np.float32]]:
        """Return how much of each run is known at each cutoff, and what came before the run."""
        count, size = len(drawn.users), self.max_users
        lengths = np.zeros((2 * size, len(drawn.cuts)), np.int64)
        lengths[:count] = np.stack([_known(cut, first) for cut in reversed(drawn.cuts)], axis=1)
        lengths[size : size + count] = drawn.following[:, None]
        before = np.zeros((2 * size, len(BEFORE)), np.float32)
        before[:count] = drawn.table.before(drawn.users, first)
        return lengths, before

    def _labels(self, table: SequenceTable, cuts: Cuts, first: Ints) -> CutLabels:
        """Look up what is known and what comes at cuts; `first` is what histories begin with."""
        return CutLabels(
            lengths=self._rows(_known(cuts, first)),
            silence_days=self._rows(cuts.silence_days(table)),
            next_time=self._rows(cuts.next_time(table, self.plan.horizon)),
            window={
                field: self._rows(cuts.window(table, field, size))
                for field, size in self.window_sizes.items()
            },
            future=self._future(table, cuts) if self.config.weights.future_window else {},
        )

    def _future(self, table: SequenceTable, cuts: Cuts) -> dict[str, Tensor]:
        """Look up what occurs within each horizon; all windows end within the training data."""
        horizons = scaled_horizons(self.plan.horizon, self.config.future_days)
        through = self.plan.latest + self.plan.horizon
        return {
            field: self._rows(
                future_labels(
                    table.times, table.ids[field], table.offsets, cuts.users, cuts.moments,
                    horizons, size, through,
                ).window
            )
            for field, size in self.window_sizes.items()
        }  # fmt: skip

    def _rows(self, values: NDArray[Any]) -> Tensor:
        """Fill up what stands for users (n, ...) to (U, ...)."""
        filled = np.zeros((self.max_users, *values.shape[1:]), values.dtype)
        filled[: len(values)] = values
        return torch.from_numpy(filled)


@dataclass(frozen=True)
class _Drawn:
    """Users of a table, cut at random moments; all arrays have one entry per user.

    Attributes:
        table: where their events are.
        users: rows of the table.
        cuts: their cutoffs, the latest first.
        history: events before the latest cutoff that are read.
        following: events from the latest cutoff on that are read.
        typical_users: users of an average batch.
        seed: of what is drawn when the batch is made.
    """

    table: SequenceTable
    users: Ints
    cuts: list[Cuts]
    history: Ints
    following: Ints
    typical_users: float
    seed: int

    @property
    def costs(self) -> Ints:
        """Tokens of each user."""
        return self.history + self.following

    def take(self, rows: Ints, typical_users: float, number: int) -> _Drawn:
        """Return some of the users as the batch of a number."""
        return _Drawn(
            self.table, self.users[rows], [cut.take(rows) for cut in self.cuts],
            self.history[rows], self.following[rows], typical_users, self.seed + number,
        )  # fmt: skip


def _room_for_users(files: Sequence[Path], encoder: EncoderConfig, config: TrainingConfig) -> int:
    """Return U: so many users that tokens run out before, as far as their lengths tell."""
    events = np.concatenate(
        [pq.read_table(path, columns=["num_events"])["num_events"].to_numpy() for path in files]
    )
    lengths = np.minimum(events[events > 0], encoder.max_events)
    if not len(lengths):
        return 1
    count = config.causal_tokens / lengths.mean()
    spread = lengths.std() / lengths.mean() / math.sqrt(count)
    room = count * (1 + _SPREADS * spread) + 1
    return int(min(config.causal_tokens, 8 * math.ceil(room / 8)))


def _after(waiting: SequenceTable | None, table: SequenceTable) -> tuple[SequenceTable, Ints]:
    """Put users who wait before those of a table, and the same users in it last."""
    if waiting is None or not len(waiting):
        return table, np.arange(len(table))
    is_waiting = pc.is_in(table.user_ids, value_set=waiting.user_ids)
    order = np.argsort(is_waiting.to_numpy(zero_copy_only=False), kind="stable")
    first = np.arange(len(waiting))
    return waiting.followed_by(table), np.concatenate((first, len(waiting) + order))


def _known(cuts: Cuts, first: Ints) -> Ints:
    """Return how many of the events that are read are before each cut.

    An earlier cut may lie before the newest events that were read: then none is known.
    """
    known: Ints = np.maximum(cuts.places - first, 0)
    return known


def _has_next(flat: FlatRuns) -> NDArray[np.bool_]:
    """Tell which tokens have a successor in their run."""
    has_next = np.zeros(len(flat.rows), np.bool_)
    has_next[:-1] = (flat.rows[1:] == flat.rows[:-1]) & (flat.rows[:-1] >= 0)
    return has_next
