"""What the online store holds of each user: published when, and computed from what.

A ledger is one table: of every user the observation cutoff of the row that services read, and the
fingerprint of the state behind it. It is small (about 40 bytes a user), so it is held as a whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from behavior_pipeline.contracts import FINGERPRINT_BYTES, TIMESTAMP
from behavior_pipeline.storage import writing_file

LEDGER_SCHEMA: Final = pa.schema(
    [
        pa.field("user_id", pa.string()),
        pa.field("published_cutoff", TIMESTAMP),
        pa.field("fingerprint", pa.binary(FINGERPRINT_BYTES)),
        pa.field("bucket", pa.string()),
    ]
)
"""Sorted by file name of the bucket, then by user."""

_ID_BYTES: Final = 16


@dataclass(frozen=True)
class Ledger:
    """The rows of one publication, and of those before it that still hold.

    Attributes:
        ledger_id: hash of all else here when it was made; an erasure takes rows and leaves the id.
        space_id: the checkpoint and the alignment behind every vector; see `changes.space_of`.
        cutoff: of the publication.
        rows: table under LEDGER_SCHEMA, each user once.
    """

    ledger_id: str
    space_id: str
    cutoff: datetime
    rows: pa.Table

    @classmethod
    def of(cls, space_id: str, cutoff: datetime, rows: pa.Table) -> Ledger:
        """Make a ledger and its id."""
        digest = hashlib.blake2b(f"{space_id}\n{cutoff.isoformat()}\n".encode(), digest_size=16)
        for name in ("user_id", "bucket"):
            column = rows[name].combine_chunks()
            digest.update(pc.binary_length(column).to_numpy().tobytes())
            digest.update("".join(column.to_pylist()).encode())
        digest.update(rows["published_cutoff"].cast(pa.int64()).to_numpy().tobytes())
        digest.update(b"".join(rows["fingerprint"].to_pylist()))
        return cls(digest.hexdigest(), space_id, cutoff, rows)

    @property
    def oldest(self) -> datetime:
        """The oldest cutoff of a row that still holds; the publication's own without a user."""
        oldest: datetime | None = pc.min(self.rows["published_cutoff"]).as_py()
        return oldest or self.cutoff

    @property
    def user_ids(self) -> pa.Array:
        """All users, n."""
        return self.rows["user_id"].combine_chunks()

    def of_bucket(self, bucket: str) -> pa.Table:
        """Return the rows of the users who lay in a file of this name."""
        return self.rows.filter(pc.equal(self.rows["bucket"], bucket)).combine_chunks()

    def at_once(self) -> Ledger:
        """Return what holds if every row is published at this cutoff."""
        moment = pa.repeat(pa.scalar(self.cutoff, TIMESTAMP), len(self.rows))
        index = self.rows.schema.get_field_index("published_cutoff")
        return Ledger.of(
            self.space_id, self.cutoff, self.rows.set_column(index, "published_cutoff", moment)
        )

    def save(self, path: Path) -> None:
        """Write it, atomically."""
        facts = {
            "ledger_id": self.ledger_id,
            "space_id": self.space_id,
            "cutoff": self.cutoff.isoformat(),
        }
        with writing_file(path) as aside:
            pq.write_table(self.rows.replace_schema_metadata(facts), aside, compression="zstd")

    @classmethod
    def load(cls, path: Path) -> Ledger | None:
        """Read it; None if there is no such file."""
        if not path.exists():
            return None
        rows = pq.read_table(path)
        facts = {name.decode(): value.decode() for name, value in rows.schema.metadata.items()}
        return cls(
            ledger_id=facts["ledger_id"],
            space_id=facts["space_id"],
            cutoff=datetime.fromisoformat(facts["cutoff"]),
            rows=rows.replace_schema_metadata(None),
        )


def ledger_rows(
    user_ids: pa.Array, published: np.ndarray, fingerprints: pa.Array, bucket: str
) -> pa.Table:
    """Return rows of a ledger; `published` holds microseconds since 1970, (n,) int64."""
    columns = [
        user_ids,
        pa.array(published, pa.int64()).cast(TIMESTAMP),
        fingerprints,
        pa.repeat(bucket, len(user_ids)),
    ]
    return pa.table(columns, schema=LEDGER_SCHEMA)


def missing_users(ledgers: Sequence[Ledger], present: pa.Array) -> pa.Array:
    """Return the users of any of the ledgers who are not present, each once."""
    known = pa.chunked_array([ledger.user_ids for ledger in ledgers], pa.string())
    gone = known.filter(pc.invert(pc.is_in(known, value_set=present)))
    return pc.unique(gone)
