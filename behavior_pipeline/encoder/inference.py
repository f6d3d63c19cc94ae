"""States and embeddings of many users, in the order of their sequence files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from behavior_pipeline.encoder.architecture import Encoder
from behavior_pipeline.encoder.batches import BATCH_TOKENS, CHUNK_USERS, table_batches
from behavior_pipeline.encoder.sequence_files import SequenceTable, read_in_order

READOUT_USERS = 1024
"""Users read out at once; always so many rows, so that no user's numbers depend on the others."""


@dataclass(frozen=True)
class UserStates:
    """States of n users in the order in which they were read.

    Attributes:
        user_ids: Arrow strings, n.
        states: (n, S) float32.
        silence_days: days from the last event to the sequence file's cutoff, (n,) float32.
        table: the sequences themselves.
    """

    user_ids: pa.Array
    states: NDArray[np.float32]
    silence_days: NDArray[np.float32]
    table: SequenceTable


def encode_files(
    encoder: Encoder,
    files: Sequence[Path],
    batch_tokens: int = BATCH_TOKENS,
    chunk_users: int = CHUNK_USERS,
) -> Iterator[UserStates]:
    """Yield the states of all users of sequence files, in order, chunk by chunk."""
    for table in read_in_order(files, chunk_users):
        yield encode_table(encoder, table, batch_tokens)


@torch.inference_mode()
def encode_table(
    encoder: Encoder, table: SequenceTable, batch_tokens: int = BATCH_TOKENS
) -> UserStates:
    """Return the states of a table's users, in its order.

    A user's state is the same to the last bit whoever else is in the table, on one machine with
    one number of threads.
    """
    device = encoder.prior().device
    states = np.zeros((len(table), encoder.state_width), np.float32)
    silence = np.zeros(len(table), np.float32)
    for batch in table_batches(table, encoder.config, batch_tokens):
        rows = encoder.encode_state(batch.to(device))[: batch.num_users]
        states[batch.users] = rows.float().cpu().numpy()
        silence[batch.users] = batch.silence_days[: batch.num_users].numpy()
    return UserStates(table.user_ids, states, silence, table)


@torch.inference_mode()
def read_out(
    encoder: Encoder, states: NDArray[np.float32], silence_days: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return embeddings (n, D) of states (n, S) so many days (n,) after their last events."""
    device = encoder.prior().device
    embeddings = np.zeros((len(states), encoder.embedding_width), np.float32)
    for begin in range(0, len(states), READOUT_USERS):
        part = slice(begin, begin + READOUT_USERS)
        filled = torch.zeros(READOUT_USERS, encoder.state_width)
        silence = torch.zeros(READOUT_USERS)
        count = len(states[part])
        filled[:count] = torch.from_numpy(states[part].copy())
        silence[:count] = torch.from_numpy(silence_days[part].copy())
        rows = encoder.readout(filled.to(device), silence.to(device))
        embeddings[part] = rows[:count].float().cpu().numpy()
    return embeddings
