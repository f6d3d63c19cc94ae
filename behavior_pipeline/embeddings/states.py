"""Which states of an earlier run still hold: the transformer runs only for users touched since.

A state depends on a user's sequence and on the checkpoint alone, so it holds as long as both do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from behavior_pipeline.contracts import FINGERPRINT_BYTES, TIMESTAMP, state_schema
from behavior_pipeline.encoder.vector_tables import (
    Vectors,
    fingerprints,
    from_vectors,
    states_table,
    to_vectors,
)

__all__ = [
    "FINGERPRINT_BYTES", "KnownStates", "Vectors", "fingerprints", "from_vectors", "newest_states",
    "silence_days", "state_schema", "states_table", "to_vectors",
]  # fmt: skip


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


def silence_days(last_event_at: pa.ChunkedArray, cutoff: datetime | pa.Array) -> Vectors:
    """Return the days from each last event to the cutoff, (N,); 0 where there is no event.

    Args:
        last_event_at: N timestamps.
        cutoff: one for all, or N timestamps.
    """
    until = cutoff if isinstance(cutoff, pa.Array) else pa.scalar(cutoff, TIMESTAMP)
    silence = pc.subtract(until, last_event_at).cast(pa.int64())
    days: Vectors = (pc.fill_null(silence, 0).to_numpy() / 86_400_000_000).astype(np.float32)
    return days


def newest_states(folders: Sequence[Path], checkpoint_id: str | None = None) -> Path | None:
    """Return the states to start from: those of a cutoff, else of the newest one before it.

    A user untouched since then keeps the state, and costs no pass of the transformer.

    Args:
        folders: where states of the cutoff belong, `…/states/cutoff=…`; at a tie the last wins.
        checkpoint_id: passes over folders that another checkpoint made.
    """
    known = [
        (found.name, number, found)
        for number, folder in enumerate(folders)
        for found in folder.parent.glob("cutoff=*")
        if found.name <= folder.name
        and (checkpoint_id is None or _maker_of(found) in (checkpoint_id, None))
    ]
    return max(known)[2] if known else None


def _maker_of(folder: Path) -> str | None:
    """Return the checkpoint that made a folder of states; None if it holds nobody."""
    for path in sorted(folder.glob("bucket=*.parquet")):
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1, columns=["checkpoint_id"]):
                return str(batch.column(0)[0].as_py())
    return None
