"""States on disk, and which of them still hold: the transformer runs only for users touched since.

A state depends on a user's sequence and on the checkpoint alone, so it holds as long as both do.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from behavior_pipeline.contracts import TIMESTAMP, TOKEN_FIELDS
from behavior_pipeline.encoder.sequence_files import SequenceTable

Vectors = NDArray[np.float32]

FINGERPRINT_BYTES: Final = 16


def state_schema(width: int) -> pa.Schema:
    """Return the schema of states of a width S; one row per user, sorted by user_id."""
    return pa.schema(
        [
            pa.field("user_id", pa.string()),
            pa.field("state", pa.list_(pa.float32(), width)),
            pa.field("num_events", pa.int64()),
            pa.field("last_event_at", TIMESTAMP),
            pa.field("fingerprint", pa.binary(FINGERPRINT_BYTES)),
            pa.field("checkpoint_id", pa.string()),
        ]
    )


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


@dataclass(frozen=True)
class KnownStates:
    """States that an earlier run wrote for a bucket.

    Attributes:
        user_ids: Arrow strings, n.
        fingerprints: what each state was computed from, n.
        states: (n, S) float32.
    """

    user_ids: pa.Array
    fingerprints: pa.Array
    states: Vectors

    @classmethod
    def none(cls, width: int) -> KnownStates:
        """Return no states at all."""
        empty = state_schema(width).empty_table()
        return cls._of_table(empty, width)

    @classmethod
    def load(cls, path: Path, checkpoint_id: str, width: int) -> KnownStates:
        """Read the states that a checkpoint made; none if there is no file or another made them."""
        if not path.is_file():
            return cls.none(width)
        columns = ["user_id", "fingerprint", "state"]
        made_by_it = pc.field("checkpoint_id") == checkpoint_id
        return cls._of_table(pq.read_table(path, columns=columns, filters=made_by_it), width)

    @classmethod
    def _of_table(cls, table: pa.Table, width: int) -> KnownStates:
        return cls(
            user_ids=table["user_id"].combine_chunks(),
            fingerprints=table["fingerprint"].combine_chunks(),
            states=to_vectors(table["state"], width),
        )

    def find(self, user_ids: pa.Array, wanted: pa.Array) -> NDArray[np.int64]:
        """Return the row of each user's state that still holds, -1 where there is none, (N,)."""
        rows = pc.index_in(user_ids, value_set=self.user_ids)
        holds = pc.equal(pc.take(self.fingerprints, rows), wanted)
        found = pc.if_else(pc.fill_null(holds, fill_value=False), rows, -1)
        places: NDArray[np.int64] = found.cast(pa.int64()).to_numpy(zero_copy_only=False)
        return places


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


def silence_days(last_event_at: pa.ChunkedArray, cutoff: datetime) -> Vectors:
    """Return the days from each last event to the cutoff, (N,); 0 where there is no event."""
    silence = pc.subtract(pa.scalar(cutoff, TIMESTAMP), last_event_at).cast(pa.int64())
    days: Vectors = (pc.fill_null(silence, 0).to_numpy() / 86_400_000_000).astype(np.float32)
    return days
