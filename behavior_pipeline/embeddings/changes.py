"""Which users must be published anew: everyone else's row still says what a fresh one would.

The readout moves a little for everyone every night, because silence grows. A row that services read
stays while the user's state is the same, the vector has moved by at most a bound since it was
published, and the row is younger than REFRESH_DAYS. How far the vector has moved is measured, not
guessed: the state is read out at the published cutoff too, which gives the published vector itself.

A night's changes lie in a folder inside its embeddings, and are renamed into place with them.

Legend of shapes: n users, D numbers in an embedding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from behavior_pipeline.contracts import FINGERPRINT_BYTES, TIMESTAMP
from behavior_pipeline.embeddings.alignment import Alignment
from behavior_pipeline.embeddings.ledger import (
    LEDGER_SCHEMA,
    Ledger,
    ledger_rows,
    missing_users,
)
from behavior_pipeline.embeddings.states import Vectors, silence_days, to_vectors
from behavior_pipeline.storage import make_private_folder, read_json, write_json, writing_file

REFRESH_DAYS: Final = 28
"""A row as old as this is published anew: a week before joins stop finding it (the TTL)."""

LEDGER_FILE: Final = "ledger.parquet"
VANISHED_FILE: Final = "vanished.parquet"
FACTS_FILE: Final = "changes.json"
_DAY: Final = timedelta(days=1) // timedelta(microseconds=1)

Readout = Callable[[Vectors, Vectors], Vectors]
"""States (n, S) and days of silence (n,) to embeddings (n, D)."""


@dataclass(frozen=True)
class Served:
    """What services read before a night, and how far from fresh that may be.

    Attributes:
        ledger: of the last publication; None if nothing is known, so that all is to be published.
        max_drift: the bound, as a share of the published vector's length.
    """

    ledger: Ledger | None = None
    max_drift: float = 0.0


@dataclass(frozen=True)
class Changes:
    """A night's changes on disk.

    Attributes:
        folder: where they lie.
        base_id: the ledger that they were measured against; None if all is to be published.
        ledger_id: the ledger that they lead to, in LEDGER_FILE.
        checkpoint_id: the encoder behind the rows.
        oldest: cutoff of the oldest row that still holds, `YYYY-MM-DD`.
        num_users: rows that services read once this is published, the prior's among them.
        num_changed: rows to publish.
        num_vanished: users to remove.
        max_drift: the bound.
    """

    folder: Path
    base_id: str | None
    ledger_id: str
    checkpoint_id: str
    oldest: str
    num_users: int
    num_changed: int
    num_vanished: int
    max_drift: float

    def facts(self) -> dict[str, Any]:
        """Return all but the folder, as FACTS_FILE holds it."""
        facts = asdict(self)
        del facts["folder"]
        return facts

    @property
    def files(self) -> list[Path]:
        """The changed rows, under `contracts.embedding_schema`; none if all is to be published."""
        return sorted(self.folder.glob("bucket=*.parquet"))

    @property
    def ledger_file(self) -> Path:
        """The ledger that they lead to."""
        return self.folder / LEDGER_FILE

    def vanished(self) -> pa.Array:
        """Return the users to remove."""
        table = pq.read_table(self.folder / VANISHED_FILE)
        return table["user_id"].combine_chunks()


def read_changes(folder: Path) -> Changes | None:
    """Return the changes in a folder; None if there are none."""
    facts = folder / FACTS_FILE
    return Changes(folder=folder, **read_json(facts)) if facts.exists() else None


def space_of(checkpoint_id: str, alignment: Alignment | None) -> str:
    """Return a hash of all that makes vectors comparable: the encoder and where it is turned."""
    digest = hashlib.blake2b(checkpoint_id.encode(), digest_size=16)
    if alignment is not None:
        for array in (alignment.rotation, alignment.own_mean, alignment.mean):
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


@dataclass
class ChangesWriter:
    """Sorts a night's users into changed and unchanged, bucket by bucket, in any order.

    Attributes:
        folder: where the changes go; it is made.
        served: what they are measured against. A ledger of another space, or not of an earlier
            cutoff, counts as none.
        cutoff: of the night.
        space_id: of the night's vectors.
        checkpoint_id: the encoder behind them.
        schema: of the night's embeddings.
        read_out: the night's own.
    """

    folder: Path
    served: Served
    cutoff: datetime
    space_id: str
    checkpoint_id: str
    schema: pa.Schema
    read_out: Readout
    _parts: dict[str, list[pa.Table]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Make the folder."""
        make_private_folder(self.folder)

    @property
    def base(self) -> Ledger | None:
        """The ledger that rows are measured against."""
        ledger = self.served.ledger
        if ledger is None or ledger.space_id != self.space_id or ledger.cutoff >= self.cutoff:
            return None
        return ledger

    @contextmanager
    def bucket(self, name: str) -> Iterator[BucketChanges]:
        """Yield what takes the users of a bucket; on success its file of changes is there."""
        base = self.base
        if base is None:
            bucket = BucketChanges(self, name, LEDGER_SCHEMA.empty_table(), None)
            yield bucket
        else:
            with (
                writing_file(self.folder / name) as aside,
                pq.ParquetWriter(aside, self.schema, compression="zstd") as writer,
            ):
                bucket = BucketChanges(self, name, base.of_bucket(name), writer)
                yield bucket
        self._parts[name] = bucket.parts

    def finish(self, prior_name: str, prior: pa.Table) -> Changes:
        """Write the ledger, who vanished, and the facts, once all other buckets are done.

        Args:
            prior_name: file of the prior's row, which no sequence is behind.
            prior: that row, of the night's embeddings.
        """
        with self.bucket(prior_name) as bucket:
            fingerprint = pa.array([bytes(FINGERPRINT_BYTES)], pa.binary(FINGERPRINT_BYTES))
            bucket.add(prior, fingerprint, np.zeros((1, 1), np.float32))
        parts = [part for _, parts in sorted(self._parts.items()) for part in parts]
        rows = pa.concat_tables([LEDGER_SCHEMA.empty_table(), *parts]).combine_chunks()
        ledger = Ledger.of(self.space_id, self.cutoff, rows)
        ledger.save(self.folder / LEDGER_FILE)
        base = self.base
        vanished = missing_users([base] if base else [], ledger.user_ids)
        with writing_file(self.folder / VANISHED_FILE) as aside:
            pq.write_table(pa.table({"user_id": vanished}), aside)
        moment = pa.scalar(self.cutoff, TIMESTAMP)
        num_changed = pc.sum(pc.equal(rows["published_cutoff"], moment)).as_py() or 0
        changes = Changes(
            folder=self.folder,
            base_id=base.ledger_id if base else None,
            ledger_id=ledger.ledger_id,
            checkpoint_id=self.checkpoint_id,
            oldest=f"{ledger.oldest:%Y-%m-%d}",
            num_users=len(rows),
            num_changed=num_changed,
            num_vanished=len(vanished),
            max_drift=self.served.max_drift,
        )
        write_json(self.folder / FACTS_FILE, changes.facts())
        return changes


@dataclass
class BucketChanges:
    """Sorts the users of one bucket.

    Attributes:
        night: what is the same for all buckets.
        name: the bucket's file.
        known: the ledger's rows of users who lay in this bucket.
        writer: takes the changed rows; None if all are.
        parts: rows of the new ledger so far.
    """

    night: ChangesWriter
    name: str
    known: pa.Table
    writer: pq.ParquetWriter | None
    parts: list[pa.Table] = field(default_factory=list)

    def add(self, embeddings: pa.Table, fingerprints: pa.Array, states: Vectors) -> None:
        """Sort users; each row of the three is one user.

        Args:
            embeddings: of the night, n rows.
            fingerprints: of the states, n.
            states: (n, S).
        """
        now = int(pa.scalar(self.night.cutoff, TIMESTAMP).value)
        user_ids = embeddings["user_id"].combine_chunks()
        published = self._published(user_ids, fingerprints, now)
        is_same = published < now
        moved = self._is_moved(embeddings.filter(is_same), states[is_same], published[is_same])
        published[np.flatnonzero(is_same)[moved]] = now
        self.parts.append(ledger_rows(user_ids, published, fingerprints, self.name))
        if self.writer is not None:
            self.writer.write_table(embeddings.filter(pa.array(published == now)))

    def _published(self, user_ids: pa.Array, fingerprints: pa.Array, now: int) -> NDArray[np.int64]:
        """Return when each row was published that may still hold, (n,); `now` for the others."""
        places = pc.index_in(user_ids, value_set=self.known["user_id"].combine_chunks())
        before = pc.take(self.known, places)
        is_same = pc.fill_null(pc.equal(before["fingerprint"], fingerprints), fill_value=False)
        moments = pc.fill_null(before["published_cutoff"].cast(pa.int64()), now).to_numpy()
        is_young = now - moments < REFRESH_DAYS * _DAY
        published: NDArray[np.int64] = np.where(is_same.to_numpy() & is_young, moments, now)
        return published

    def _is_moved(
        self, embeddings: pa.Table, states: Vectors, published: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Tell whose vector (n, D) is too far from the one of the published cutoff (n,)."""
        if len(embeddings) == 0:
            return np.zeros(0, np.bool_)
        vectors = to_vectors(
            embeddings["embedding"], self.night.schema.field("embedding").type.list_size
        )
        moments = pa.array(published, pa.int64()).cast(TIMESTAMP)
        silence = silence_days(embeddings["last_event_at"], moments)
        before, is_warm = vectors.copy(), ~embeddings["is_cold_start"].to_numpy()
        if is_warm.any():  # the prior does not move
            before[is_warm] = self.night.read_out(states[is_warm], silence[is_warm])
        return _squares(vectors - before) > self.night.served.max_drift**2 * _squares(before)


def _squares(vectors: Vectors) -> NDArray[np.float64]:
    """Return the squared lengths of vectors (n, D), (n,)."""
    squares: NDArray[np.float64] = np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64)
    return squares
