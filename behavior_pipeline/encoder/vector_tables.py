"""States and embeddings as Arrow tables, and what a state was computed from."""

from __future__ import annotations

import hashlib
from datetime import datetime

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from behavior_pipeline.contracts import (
    FINGERPRINT_BYTES,
    TOKEN_FIELDS,
    embedding_schema,
    state_schema,
)
from behavior_pipeline.encoder.sequence_files import SequenceTable

Vectors = NDArray[np.float32]


def fingerprints(table: SequenceTable) -> pa.Array:
    """Return a hash of all that the encoder reads of each user, (N,) binary of 16 bytes.

    BLAKE2b over the token ids, gaps and times of the list, and over length and start of the whole
    history.
    """
    columns = [*(table.ids[field] for field in TOKEN_FIELDS), table.gap_days.view(np.int32)]
    columns += list(table.times.view(np.int32).reshape(-1, 2).T)
    events = np.stack(columns, axis=1)
    histories = np.stack((table.num_events, table.first_times), axis=1)
    hashes = []
    for user in range(len(table)):
        digest = hashlib.blake2b(histories[user].data, digest_size=FINGERPRINT_BYTES)
        digest.update(events[table.offsets[user] : table.offsets[user + 1]].data)
        hashes.append(digest.digest())
    return pa.array(hashes, pa.binary(FINGERPRINT_BYTES))


def states_table(
    users: pa.Table, states: Vectors, wanted: pa.Array, checkpoint_id: str
) -> pa.Table:
    """Put states (N, S) beside the users of a sequence table, in its order."""
    return pa.table(
        [
            users["user_id"],
            from_vectors(states),
            users["num_events"],
            users["last_event_at"],
            wanted,
            pa.repeat(checkpoint_id, len(users)),
        ],
        schema=state_schema(states.shape[1]),
    )


def to_vectors(column: pa.ChunkedArray | pa.Array, width: int) -> Vectors:
    """Return a column of fixed-size lists as a matrix (N, width)."""
    whole = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    vectors: Vectors = whole.flatten().to_numpy(zero_copy_only=False)
    return vectors.reshape(-1, width)


def from_vectors(vectors: Vectors) -> pa.Array:
    """Return a matrix (N, width) as an Arrow array of fixed-size lists."""
    flat = pa.array(np.ascontiguousarray(vectors).reshape(-1), pa.float32())
    return pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])


def embeddings_table(
    users: pa.Table, embeddings: Vectors, prior: Vectors, checkpoint_id: str, written_at: datetime
) -> pa.Table:
    """Put embeddings (N, D) beside the users of a sequence table, in its order.

    Args:
        users: sequences; who has no event gets the prior and is marked as a cold start.
        embeddings: of all of them.
        prior: the embedding (D,) of a user without events.
        checkpoint_id: the encoder behind them.
        written_at: recorded in every row.

    Raises:
        AssertionError: if an embedding is not finite.
    """
    schema = embedding_schema(embeddings.shape[1])
    is_cold_start = users["num_events"].to_numpy() == 0
    embeddings = np.where(is_cold_start[:, None], prior, embeddings)
    if not np.isfinite(embeddings).all():
        raise AssertionError("an embedding is not finite")
    moment = pa.scalar(written_at, schema.field("written_at").type)
    return pa.table(
        [
            users["user_id"],
            users["observation_cutoff"],
            from_vectors(embeddings),
            pa.repeat(checkpoint_id, len(users)),
            users["num_events"],
            users["last_event_at"],
            pa.array(is_cold_start),
            pa.repeat(moment, len(users)),
        ],
        schema=schema,
    )
