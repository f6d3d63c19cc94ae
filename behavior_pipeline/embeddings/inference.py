"""Batch inference: sequences to states to embeddings, streamed by bucket of users.

An embedding is read out for everyone every night, because silence grows for everyone; a state is
computed by the transformer only for users whose sequence is not the one it was computed from.

Buckets run side by side, each with a single thread of torch: faster than one bucket with several
threads, as the batches are small, and no user's numbers depend on the number of threads.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from threading import Lock
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from behavior_pipeline.contracts import COLD_START_USER, SEQUENCES, embedding_schema
from behavior_pipeline.embeddings.alignment import Alignment
from behavior_pipeline.embeddings.changes import ChangesWriter, Served, space_of
from behavior_pipeline.embeddings.states import (
    KnownStates,
    Vectors,
    fingerprints,
    silence_days,
    state_schema,
    states_table,
    to_vectors,
)
from behavior_pipeline.encoder.checkpoints import (
    Checkpoint,
    check_no_reserved_user,
    check_vocabulary,
    load_checkpoint,
)
from behavior_pipeline.encoder.inference import encode_table, read_out
from behavior_pipeline.encoder.sequence_files import read_table
from behavior_pipeline.encoder.vector_tables import embeddings_table
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.progress import Report, report_nothing
from behavior_pipeline.sequences.reading import count_users, read_bucket, sequence_files
from behavior_pipeline.storage import CHANGES_FOLDER, writing_file, writing_folder

BATCH_TOKENS: Final = 2048
"""Padded tokens of a batch. Small batches waste little on users that fill no whole batch, and are
as fast on a CPU; on a GPU give more."""

CHUNK_USERS: Final = 16_384
"""Users that a thread has in memory at once."""

PRIOR_FILE: Final = "bucket=prior.parquet"
"""Holds the one row of COLD_START_USER beside the files of the buckets."""


@dataclass(frozen=True)
class EmbeddingsSummary:
    """What a folder of embeddings holds.

    Attributes:
        num_users: users embedded; COLD_START_USER is not counted.
        num_cold_start: those of them without a usable event, who got the prior.
        num_reused_states: those of them whose state was taken from the previous states.
        checkpoint_id: encoder behind all of them.
        width: D, numbers in an embedding.
        events_per_second: events in the lists of all users, over the time that it all took.
        num_changed: rows that must be published anew, the prior's among them; None if not asked.
    """

    num_users: int
    num_cold_start: int
    num_reused_states: int
    checkpoint_id: str
    width: int
    events_per_second: float
    num_changed: int | None = None


@dataclass(frozen=True)
class _Night:
    """What is the same for all users of a run."""

    checkpoint: Checkpoint
    cutoff: datetime
    written_at: datetime
    batch_tokens: int
    alignment: Alignment | None = None

    def read_out(self, states: Vectors, silence: Vectors) -> Vectors:
        """Read states (N, S) out so many days (N,) after their last events, in the live space."""
        embeddings = read_out(self.checkpoint.encoder, states, silence)
        return embeddings if self.alignment is None else self.alignment.apply(embeddings)

    @property
    def prior(self) -> Vectors:
        """The embedding (D,) of a user of whom nothing is known, in the live space."""
        prior: Vectors = self.checkpoint.encoder.prior().detach().float().cpu().numpy()
        return prior if self.alignment is None else self.alignment.apply(prior[None])[0]

    @property
    def width(self) -> int:
        """D, numbers in an embedding."""
        return self.checkpoint.encoder.embedding_width

    @property
    def state_width(self) -> int:
        """S, numbers in a state."""
        return self.checkpoint.encoder.state_width


@dataclass(frozen=True)
class _Chunk:
    """States and embeddings of some users."""

    states: pa.Table
    embeddings: pa.Table
    num_reused_states: int
    num_events: int


def embed_sequences(
    sequences_folder: Path,
    checkpoint_folder: Path,
    states_folder: Path,
    embeddings_folder: Path,
    cutoff: datetime,
    *,
    written_at: datetime,
    previous_states_folder: Path | None = None,
    device: str = "cpu",
    threads: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    alignment: Alignment | None = None,
    served: Served | None = None,
    report: Report = report_nothing,
) -> EmbeddingsSummary:
    """Embed every user of a folder of sequences as of its cutoff.

    Each `bucket=<kkk>.parquet` of sequences becomes a file of that name in both folders, sorted by
    user: states by `state_schema`, embeddings by `contracts.embedding_schema`. A user without a
    usable event gets the prior and `is_cold_start`; so does the row of COLD_START_USER in
    PRIOR_FILE. Both folders are replaced as a whole. Embeddings come first: states that are older
    than their embeddings do no harm, since each says what it was computed from.

    Args:
        sequences_folder: written by `write_sequences` for this cutoff.
        checkpoint_folder: the encoder; its vocabulary is that of the sequences.
        states_folder: where states go.
        embeddings_folder: where embeddings go.
        cutoff: observation cutoff; silence is counted up to it.
        written_at: recorded in every row.
        previous_states_folder: states of an earlier run, with the same buckets; a user whose
            sequence and checkpoint are unchanged keeps the state, byte for byte what a new pass
            would give on the same machine. May be `states_folder`.
        device: where the encoder runs, as torch names it.
        threads: buckets that are worked on at once; None means as many as torch has threads.
        batch_tokens: padded tokens of a batch.
        alignment: how the vectors are moved on; states never are.
        served: what services read, to tell what has changed since (`changes.ChangesWriter`), in
            CHANGES_FOLDER inside the embeddings; None tells nothing.
        report: progress over users.

    Raises:
        PipelineError: if the checkpoint knows of events at or after the cutoff, or the sequences
            have another vocabulary or cutoff, or there are none.
        AssertionError: if an embedding is not finite; names the bucket.
    """
    files = sequence_files(sequences_folder)
    checkpoint = load_checkpoint(checkpoint_folder, device)
    night = _Night(checkpoint, cutoff, written_at, batch_tokens, alignment)
    _check_checkpoint(night)
    tally = _Tally(report, count_users(sequences_folder))
    with writing_folder(states_folder) as states, writing_folder(embeddings_folder) as embeddings:
        changes = None if served is None else _changes_writer(embeddings, served, night)

        def embed_bucket(path: Path) -> None:
            known = _known_states(previous_states_folder, path.name, night)
            for chunk in _write_bucket(path, known, states, embeddings, night, changes):
                tally.add(chunk, path.stem)

        with _side_by_side(threads or torch.get_num_threads(), tally) as pool:
            for job in [pool.submit(embed_bucket, path) for path in files]:
                job.result()
        prior = _prior_table(night)
        with writing_file(embeddings / PRIOR_FILE) as target:
            pq.write_table(prior, target)
        num_changed = changes.finish(PRIOR_FILE, prior).num_changed if changes else None
    return replace(tally.summary(night), num_changed=num_changed)


def _changes_writer(embeddings_folder: Path, served: Served, night: _Night) -> ChangesWriter:
    """Prepare for telling what has changed since the last publication."""
    checkpoint_id = night.checkpoint.checkpoint_id
    return ChangesWriter(
        folder=embeddings_folder / CHANGES_FOLDER,
        served=served,
        cutoff=night.cutoff,
        space_id=space_of(checkpoint_id, night.alignment),
        checkpoint_id=checkpoint_id,
        schema=embedding_schema(night.width),
        read_out=night.read_out,
    )


@contextmanager
def _side_by_side(threads: int, tally: _Tally) -> Iterator[ThreadPoolExecutor]:
    """Yield so many workers, each with one thread of torch; on an error all of them stop soon."""
    threads_before = torch.get_num_threads()
    # Said to the whole process and to each worker: torch keeps it in both places.
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                yield pool
            except BaseException:
                tally.is_stopped = True
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(threads_before)


@dataclass
class _Tally:
    """What all workers have embedded since the clock was started."""

    report: Report
    num_expected: int
    num_users: int = 0
    num_cold_start: int = 0
    num_reused_states: int = 0
    num_events: int = 0
    is_stopped: bool = False
    started: float = field(default_factory=time.perf_counter)
    lock: Lock = field(default_factory=Lock)

    def add(self, chunk: _Chunk, bucket: str) -> None:
        """Count a chunk and report it, one worker at a time.

        Raises:
            CancelledError: if another worker has failed.
        """
        with self.lock:
            if self.is_stopped:
                raise CancelledError
            self.num_users += len(chunk.embeddings)
            self.num_cold_start += pc.sum(chunk.embeddings["is_cold_start"]).as_py() or 0
            self.num_reused_states += chunk.num_reused_states
            self.num_events += chunk.num_events
            self.report(self.num_users, self.num_expected, bucket)

    def summary(self, night: _Night) -> EmbeddingsSummary:
        """Stop the clock."""
        return EmbeddingsSummary(
            num_users=self.num_users,
            num_cold_start=self.num_cold_start,
            num_reused_states=self.num_reused_states,
            checkpoint_id=night.checkpoint.checkpoint_id,
            width=night.width,
            events_per_second=self.num_events / (time.perf_counter() - self.started),
        )


def _check_checkpoint(night: _Night) -> None:
    """Refuse an encoder that has seen what users do after the cutoff."""
    known_until = night.checkpoint.trained_through
    if known_until > night.cutoff:
        raise PipelineError(
            f"The checkpoint {night.checkpoint.checkpoint_id} knows of events before "
            f"{known_until:%Y-%m-%d}; embedding the cutoff {night.cutoff:%Y-%m-%d} would leak.",
            "Use a checkpoint that was trained through an earlier time, or a later cutoff.",
        )


def _check_sequences(sequences: pa.Table, path: Path, night: _Night) -> None:
    """Refuse sequences under another vocabulary, or as of another cutoff, or of a reserved user."""
    checkpoint = night.checkpoint
    check_vocabulary(sequences, path, checkpoint)
    cutoff = pa.scalar(night.cutoff, SEQUENCES.schema.field("observation_cutoff").type)
    if pc.any(pc.not_equal(sequences["observation_cutoff"], cutoff)).as_py():
        raise PipelineError(
            f"{path.name} was not tokenized as of the cutoff {night.cutoff:%Y-%m-%d}.",
            "Tokenize that cutoff first.",
        )
    check_no_reserved_user(sequences, path)


def _known_states(folder: Path | None, bucket: str, night: _Night) -> KnownStates:
    """Return a bucket's states that this checkpoint made earlier, if any."""
    if folder is None:
        return KnownStates.none(night.state_width)
    return KnownStates.load(folder / bucket, night.checkpoint.checkpoint_id, night.state_width)


def _write_bucket(
    path: Path,
    known: KnownStates,
    states_folder: Path,
    embeddings_folder: Path,
    night: _Night,
    changes: ChangesWriter | None,
) -> Iterator[_Chunk]:
    """Embed the users of a sequence file into a file of the same name in each folder."""
    with ExitStack() as stack:
        states = _open_writer(stack, states_folder / path.name, state_schema(night.state_width))
        embeddings = _open_writer(
            stack, embeddings_folder / path.name, embedding_schema(night.width)
        )
        changed = stack.enter_context(changes.bucket(path.name)) if changes else None
        for sequences in read_bucket(path, CHUNK_USERS):
            _check_sequences(sequences, path, night)
            chunk = _embed(sequences, path, known, night)
            states.write_table(chunk.states)
            embeddings.write_table(chunk.embeddings)
            if changed is not None:
                changed.add(chunk.embeddings, *_behind(chunk.states, night))
            yield chunk


def _behind(states: pa.Table, night: _Night) -> tuple[pa.Array, Vectors]:
    """Return the fingerprints (N,) and the states (N, S) of a table of states."""
    return states["fingerprint"].combine_chunks(), to_vectors(states["state"], night.state_width)


def _open_writer(stack: ExitStack, target: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """Open a Parquet file that appears when the stack is left; vectors are no dictionaries."""
    aside = stack.enter_context(writing_file(target))
    writer = pq.ParquetWriter(aside, schema, compression="zstd", use_dictionary=["checkpoint_id"])
    return stack.enter_context(writer)


def _embed(sequences: pa.Table, path: Path, known: KnownStates, night: _Night) -> _Chunk:
    """Take the states that still hold, compute the others, and read all of them out."""
    table = read_table(sequences, str(path))
    wanted = fingerprints(table)
    rows = known.find(table.user_ids, wanted)
    states = np.zeros((len(table), night.state_width), np.float32)
    states[rows >= 0] = known.states[rows[rows >= 0]]
    # A history without events is no work for the transformer: its state is zero.
    is_fresh = (rows < 0) & (table.num_events > 0)
    if is_fresh.any():
        fresh = read_table(sequences.filter(pa.array(is_fresh)), str(path))
        encoded = encode_table(night.checkpoint.encoder, fresh, night.batch_tokens)
        states[is_fresh] = encoded.states
    return _Chunk(
        states=states_table(sequences, states, wanted, night.checkpoint.checkpoint_id),
        embeddings=_embeddings_table(sequences, states, path, night),
        num_reused_states=int(np.sum((rows >= 0) & (table.num_events > 0))),
        num_events=int(table.offsets[-1]),
    )


def _embeddings_table(sequences: pa.Table, states: Vectors, path: Path, night: _Night) -> pa.Table:
    """Read states (N, S) out at the cutoff."""
    silence = silence_days(sequences["last_event_at"], night.cutoff)
    embeddings = night.read_out(states, silence)
    try:
        return embeddings_table(
            sequences, embeddings, night.prior, night.checkpoint.checkpoint_id, night.written_at
        )
    except AssertionError as error:
        raise AssertionError(f"{path.name} has an embedding that is not finite") from error


def _prior_table(night: _Night) -> pa.Table:
    """Return the row that a lookup of an unknown user finds."""
    row = {
        "user_id": COLD_START_USER,
        "observation_cutoff": night.cutoff,
        "embedding": night.prior,
        "checkpoint_id": night.checkpoint.checkpoint_id,
        "num_events": 0,
        "last_event_at": None,
        "is_cold_start": True,
        "written_at": night.written_at,
    }
    return pa.Table.from_pylist([row], schema=embedding_schema(night.width))
