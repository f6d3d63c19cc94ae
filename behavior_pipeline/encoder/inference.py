"""States and embeddings of many users, in the order of their sequence files."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from behavior_pipeline.encoder.architecture import Encoder
from behavior_pipeline.encoder.batches import BATCH_TOKENS, CHUNK_USERS, table_batches
from behavior_pipeline.encoder.configuration import gpu_attention
from behavior_pipeline.encoder.fetching import Fetching, padded_to
from behavior_pipeline.encoder.packing import PACKED_TOKENS, packed_batches
from behavior_pipeline.encoder.prefetch import prefetched
from behavior_pipeline.encoder.sequence_files import Ints, SequenceTable, read_in_order

READOUT_USERS: Final = 1024
"""Users read out at once; always so many rows, so that no user's numbers depend on the others."""

GPU_READOUT_USERS: Final = 4096
"""The same on a GPU, which is to be asked for much at a time."""


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
    encoder: Encoder,
    table: SequenceTable,
    batch_tokens: int = BATCH_TOKENS,
    *,
    is_short: bool = True,
) -> UserStates:
    """Return the states of a table's users, in its order.

    On a CPU a user's state is the same to the last bit whoever else is in the table, on one machine
    with one number of threads. On a GPU batches are packed and hold PACKED_TOKENS tokens or more;
    each is made and its states are fetched while the GPU works on others.

    Args:
        encoder: stays as it is.
        table: the users.
        batch_tokens: tokens of a batch.
        is_short: whether a GPU computes in bfloat16 although the weights are float32.
    """
    device = encoder.prior().device
    states = np.zeros((len(table), encoder.state_width), np.float32)
    users = (
        _packed_states(encoder, table, max(batch_tokens, PACKED_TOKENS), device, is_short=is_short)
        if device.type == "cuda"
        else _padded_states(encoder, table, batch_tokens, device)
    )
    fetching = Fetching(states)
    for places, rows in users:
        fetching.add(places, rows)
    fetching.finish()
    silence = table.silence_days(np.arange(len(table)))
    return UserStates(table.user_ids, states, silence, table)


def _padded_states(
    encoder: Encoder, table: SequenceTable, batch_tokens: int, device: torch.device
) -> Iterator[tuple[Ints, Tensor]]:
    """Yield users and their states (n, S) from batches of like lengths."""
    for batch in table_batches(table, encoder.config, batch_tokens):
        yield batch.users, encoder.encode_state(batch.to(device))[: batch.num_users]


def _packed_states(
    encoder: Encoder,
    table: SequenceTable,
    num_tokens: int,
    device: torch.device,
    *,
    is_short: bool,
) -> Iterator[tuple[Ints, Tensor]]:
    """Yield users and their states (n, S) from packed batches."""
    is_long = encoder.pooling.mix.weight.dtype == torch.float32
    packed = packed_batches(table, encoder.config, num_tokens, gpu_attention())
    for batch in prefetched(packed, device):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_short and is_long):
            states = encoder.packed_states(batch)[: len(batch.users)]
        yield batch.users, states


def fast_copy(encoder: Encoder, *, is_compiled: bool) -> Encoder:
    """Return a copy for inference on a GPU: bfloat16 weights, but those of the cheap readout.

    Args:
        encoder: stays as it is.
        is_compiled: whether the pass is compiled: a minute at first, then fewer passes over memory.
    """
    copied = copy.deepcopy(encoder).eval()
    for part in (copied.embedder, copied.blocks, copied.final_norm, copied.pooling):
        part.to(torch.bfloat16)
    if is_compiled:
        compiled = torch.compile(copied.packed_states, fullgraph=True, dynamic=False)
        copied.packed_states = compiled  # type: ignore[method-assign]
    return copied


@torch.inference_mode()
def read_out(
    encoder: Encoder, states: NDArray[np.float32], silence_days: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return embeddings (n, D) of states (n, S) so many days (n,) after their last events."""
    device = encoder.prior().device
    embeddings = np.zeros((len(states), encoder.embedding_width), np.float32)
    num_rows = GPU_READOUT_USERS if device.type == "cuda" else READOUT_USERS
    fetching = Fetching(embeddings)
    for begin in range(0, len(states), num_rows):
        part = slice(begin, begin + num_rows)
        given = (padded_to(values[part], num_rows, device) for values in (states, silence_days))
        fetching.add(part, encoder.readout(*given)[: len(states[part])])
    fetching.finish()
    return embeddings
