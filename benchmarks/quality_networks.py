"""Two recurrent networks that an embedding is compared with, in plain torch.

- CoLES after Babaev et al., "CoLES: Contrastive Learning for Event Sequences with
  Self-Supervision" (SIGMOD 2022, arXiv 2002.08232): a GRU whose last state of a random slice of a
  user's events is near those of the user's other slices and far from those of others. It is this
  file's own code, not pytorch-lifestream.
- A GRU that is trained end to end on the labels of a train cutoff, with the silence before it.

Both read the fields and gaps that our encoder reads, of a user's newest `MAX_LENGTH` events.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence

from behavior_pipeline.contracts import TOKEN_FIELDS
from behavior_pipeline.encoder.sequence_files import SequenceTable, places_between

MAX_LENGTH = 256  # newest events of a user that a GRU reads
FIELD_WIDTH = 16  # numbers an id is looked up as
COLES_WIDTH = 256  # of CoLES' state, which is its embedding
SUPERVISED_WIDTH = 128  # of the supervised network's state
LEARNING_RATE = 1e-3  # of Adam at the start; it falls to 0 along a cosine
READ_USERS = 512  # users whose states are computed at once

SLICES = 5  # slices of a user in a batch
SLICE_LENGTHS = (5, 150)  # events of a slice
SLICED_USERS = 64  # users of a batch
MARGIN = 0.5  # negatives farther apart than this cost nothing
HARD_NEGATIVES = 5  # nearest negatives of a slice, which alone count

LABELED_USERS = 128  # users of a batch
MAX_EPOCHS = 20
PATIENCE = 3  # epochs without a lower loss on the held-out quarter
HELD_OUT = 0.25


@dataclass(frozen=True)
class Slices:
    """Runs of events: (n,) rows of a table and flat places [begin, end) in it."""

    begins: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.begins)

    def take(self, rows: np.ndarray) -> Slices:
        """Return some of the runs."""
        return Slices(self.begins[rows], self.ends[rows])


class EventGru(nn.Module):
    """Events to the state after the last of them.

    Args:
        sizes: ids of each field.
        width: of the state.
    """

    def __init__(self, sizes: Mapping[str, int], width: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(sizes[f], FIELD_WIDTH) for f in TOKEN_FIELDS)
        self.gru = nn.GRU(FIELD_WIDTH * len(TOKEN_FIELDS) + 1, width, batch_first=True)
        self.width = width

    def forward(self, ids: Tensor, gaps: Tensor, lengths: Tensor) -> Tensor:
        """Return states (B, D) of ids (B, T, F), log gaps (B, T) and lengths (B,) of at least 1."""
        parts = [table(ids[:, :, place]) for place, table in enumerate(self.tables)]
        events = torch.cat([*parts, gaps[:, :, None]], dim=2)
        packed = pack_padded_sequence(events, lengths, batch_first=True, enforce_sorted=False)
        states: Tensor = self.gru(packed)[1][0]
        return states


def newest(table: SequenceTable) -> Slices:
    """Return each user's newest events."""
    ends = table.offsets[1:]
    return Slices(np.maximum(table.offsets[:-1], ends - MAX_LENGTH), ends)


def padded(table: SequenceTable, runs: Slices, device: torch.device) -> tuple[Tensor, ...]:
    """Return what `EventGru` reads of some runs; an empty one becomes one event of padding."""
    rows, places = places_between(runs.begins, runs.ends)
    lengths = runs.ends - runs.begins
    columns = places - runs.begins[rows]
    shape = (len(runs), max(1, int(lengths.max(initial=1))))
    ids = np.zeros((*shape, len(TOKEN_FIELDS)), np.int64)
    for number, field in enumerate(TOKEN_FIELDS):
        ids[rows, columns, number] = table.ids[field][places]
    gaps = np.zeros(shape, np.float32)
    gaps[rows, columns] = np.log1p(np.maximum(table.gap_days[places], 0))
    known = torch.from_numpy(np.maximum(lengths, 1))
    return torch.from_numpy(ids).to(device), torch.from_numpy(gaps).to(device), known


def shuffled(num: int, size: int, random: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield all numbers below `num` in random order, so many at a time."""
    order = random.permutation(num)
    for begin in range(0, num, size):
        yield order[begin : begin + size]


@torch.inference_mode()
def states_of(network: EventGru, table: SequenceTable, device: torch.device) -> np.ndarray:
    """Return the states (N, D) after users' newest events."""
    runs = newest(table)
    order = np.argsort(runs.ends - runs.begins, kind="stable")  # like lengths together
    states = np.zeros((len(runs), network.width), np.float32)
    for begin in range(0, len(order), READ_USERS):
        rows = order[begin : begin + READ_USERS]
        states[rows] = network(*padded(table, runs.take(rows), device)).float().cpu().numpy()
    return states


def train_coles(
    table: SequenceTable, sizes: Mapping[str, int], seed: int, steps: int, device: torch.device
) -> EventGru:
    """Train CoLES on the histories of users who have enough events for two different slices."""
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    network = EventGru(sizes, COLES_WIDTH).to(device)
    optimizer, schedule = _adam(network, steps)
    users = np.flatnonzero(table.lengths >= 2 * SLICE_LENGTHS[0])
    if len(users) < 2:  # noqa: PLR2004 - a negative needs a second user
        raise ValueError("CoLES needs two users with enough events")
    done = 0
    while done < steps:
        for rows in shuffled(len(users), SLICED_USERS, random):
            if done == steps or len(rows) < 2:  # noqa: PLR2004 - a negative needs a second user
                break
            runs, owners = random_slices(table, users[rows], random)
            vectors = functional.normalize(network(*padded(table, runs, device)), dim=1)
            loss = coles_loss(vectors, torch.from_numpy(owners).to(device))
            _step(network, optimizer, loss)
            schedule.step()
            done += 1
    return network.eval()


def coles_steps(table: SequenceTable) -> int:
    """Return the steps of ten passes over the users, at least 300 and at most 3,000."""
    users = int((table.lengths >= 2 * SLICE_LENGTHS[0]).sum())
    return min(3000, max(300, 10 * users // SLICED_USERS))


def coles_vectors(network: EventGru, table: SequenceTable, device: torch.device) -> np.ndarray:
    """Return embeddings (N, D) of unit length."""
    states = states_of(network, table, device)
    return states / np.maximum(np.linalg.norm(states, axis=1, keepdims=True), 1e-12)


def random_slices(
    table: SequenceTable, users: np.ndarray, random: np.random.Generator
) -> tuple[Slices, np.ndarray]:
    """Return `SLICES` runs of random length and place of each user, and whose they are."""
    owners = np.repeat(np.arange(len(users)), SLICES)
    rows = users[owners]
    sizes = table.lengths[rows]
    lengths = random.integers(SLICE_LENGTHS[0], np.minimum(sizes, SLICE_LENGTHS[1]) + 1)
    begins = table.offsets[rows] + random.integers(0, sizes - lengths + 1)
    return Slices(begins, begins + lengths), owners


def coles_loss(vectors: Tensor, owners: Tensor) -> Tensor:
    """Return the contrastive loss of unit vectors (n, D) that belong to owners (n,).

    Mean over pairs of one owner of d^2, and over the nearest negatives of each of max(0, m - d)^2.
    """
    squares = (2 - 2 * vectors @ vectors.T).clamp(min=0)
    is_same = owners[:, None] == owners
    is_other_slice = ~torch.eye(len(owners), dtype=torch.bool, device=owners.device)
    positive = squares[is_same & is_other_slice].mean()
    num_negatives = min(HARD_NEGATIVES, int((~is_same).sum(dim=1).min()))
    far = squares.masked_fill(is_same, torch.inf)
    nearest = far.topk(num_negatives, largest=False).values
    distances = (nearest + 1e-9).sqrt()
    return positive + (MARGIN - distances).clamp(min=0).square().mean()


class SupervisedGru(nn.Module):
    """Log-odds of targets from the state after the last event and the silence since."""

    def __init__(self, sizes: Mapping[str, int], num_targets: int) -> None:
        super().__init__()
        self.events = EventGru(sizes, SUPERVISED_WIDTH)
        self.head = nn.Sequential(
            nn.Linear(SUPERVISED_WIDTH + 1, SUPERVISED_WIDTH),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(SUPERVISED_WIDTH, num_targets),
        )

    def forward(self, ids: Tensor, gaps: Tensor, lengths: Tensor, silence: Tensor) -> Tensor:
        """Return log-odds (B, targets); silence is log days (B,)."""
        states = self.events(ids, gaps, lengths)
        found: Tensor = self.head(torch.cat([states, silence[:, None]], dim=1))
        return found


@dataclass(frozen=True)
class Labeled:
    """Users at a cutoff with labels (N, targets) of 0 and 1."""

    table: SequenceTable
    labels: np.ndarray

    def batch(self, rows: np.ndarray, device: torch.device) -> tuple[Tensor, ...]:
        """Return what `SupervisedGru` reads of some users."""
        given = padded(self.table, newest(self.table).take(rows), device)
        silence = np.log1p(self.table.silence_days(rows))
        return (*given, torch.from_numpy(silence.astype(np.float32)).to(device))

    def targets(self, rows: np.ndarray, device: torch.device) -> Tensor:
        """Return their labels."""
        return torch.from_numpy(self.labels[rows].astype(np.float32)).to(device)


def train_supervised(
    users: Labeled, sizes: Mapping[str, int], seed: int, device: torch.device
) -> SupervisedGru:
    """Train on three quarters of the users, up to the lowest loss on the rest."""
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    network = SupervisedGru(sizes, users.labels.shape[1]).to(device)
    order = random.permutation(len(users.labels))
    num_held_out = max(1, int(len(order) * HELD_OUT))
    held_out, kept = order[:num_held_out], order[num_held_out:]
    optimizer, schedule = _adam(network, MAX_EPOCHS * -(-len(kept) // LABELED_USERS))
    best, lowest, since = copy.deepcopy(network.state_dict()), np.inf, 0
    for _ in range(MAX_EPOCHS):
        network.train()
        for rows in shuffled(len(kept), LABELED_USERS, random):
            _step(network, optimizer, _loss(network, users, kept[rows], device))
            schedule.step()
        loss = held_out_loss(network, users, held_out, device)
        since = 0 if loss < lowest else since + 1
        if loss < lowest:
            best, lowest = copy.deepcopy(network.state_dict()), loss
        if since == PATIENCE:
            break
    network.load_state_dict(best)
    return network.eval()


@torch.inference_mode()
def held_out_loss(
    network: SupervisedGru, users: Labeled, rows: np.ndarray, device: torch.device
) -> float:
    """Return the mean loss over some users."""
    network.eval()
    parts = [rows[begin : begin + READ_USERS] for begin in range(0, len(rows), READ_USERS)]
    losses = [float(_loss(network, users, part, device)) * len(part) for part in parts]
    return sum(losses) / len(rows)


@torch.inference_mode()
def supervised_scores(
    network: SupervisedGru, table: SequenceTable, device: torch.device
) -> np.ndarray:
    """Return probabilities (N, targets)."""
    users = Labeled(table, np.zeros((len(table), 0)))
    places = range(0, len(table), READ_USERS)
    rows = [np.arange(begin, min(begin + READ_USERS, len(table))) for begin in places]
    parts = [network(*users.batch(part, device)).sigmoid().float().cpu().numpy() for part in rows]
    return np.concatenate(parts)


def _loss(network: SupervisedGru, users: Labeled, rows: np.ndarray, device: torch.device) -> Tensor:
    """Return the mean cross-entropy over targets and users."""
    found = network(*users.batch(rows, device))
    return functional.binary_cross_entropy_with_logits(found, users.targets(rows, device))


def _adam(
    network: nn.Module, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Return Adam, and its rate's way down to 0."""
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))


def _step(network: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Take a step down."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
