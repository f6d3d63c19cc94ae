"""Batch inference: a folder of sequence files in, states and embeddings out, file by file.

Runs alone where only torch, numpy, pyarrow and safetensors are installed:
`python -m behavior_pipeline.encoder.encode --sequences DIR --checkpoint DIR --out DIR`
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from behavior_pipeline.contracts import embedding_schema, state_schema
from behavior_pipeline.encoder.architecture import Encoder
from behavior_pipeline.encoder.batches import BATCH_TOKENS, CHUNK_USERS
from behavior_pipeline.encoder.checkpoints import (
    Checkpoint,
    check_no_reserved_user,
    check_vocabulary,
    load_checkpoint,
)
from behavior_pipeline.encoder.inference import encode_table, fast_copy, read_out
from behavior_pipeline.encoder.packing import PACKED_TOKENS
from behavior_pipeline.encoder.sequence_files import read_table, sequence_files
from behavior_pipeline.encoder.vector_tables import (
    Vectors,
    embeddings_table,
    fingerprints,
    states_table,
)
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.storage import remove_leftovers, writing_file

Report = Callable[[int, int, str], None]

GPU_CHUNK_USERS: Final = 131_072
"""Users in memory at once where a GPU encodes: enough for some well filled batches."""

STATES: Final = "states"
EMBEDDINGS: Final = "embeddings"
_SOURCE: Final = b"source"
_FOOTER_END: Final = 8  # bytes: length of the footer and a magic word


@dataclass(frozen=True)
class EncodingSummary:
    """What an encoding came to.

    Attributes:
        num_users: users in all files.
        num_encoded: those of them that this run encoded; the others had been before.
        num_files: sequence files.
        num_skipped_files: those of them that had been encoded before.
        seconds: wall time.
    """

    num_users: int
    num_encoded: int
    num_files: int
    num_skipped_files: int
    seconds: float

    @property
    def users_per_second(self) -> float:
        """Users encoded in a second of wall time."""
        return self.num_encoded / max(self.seconds, 1e-9)


@dataclass(frozen=True)
class _Work:
    """What is the same for all files."""

    checkpoint: Checkpoint
    encoder: Encoder
    prior: Vectors
    batch_tokens: int
    chunk_users: int
    is_short: bool
    written_at: datetime
    out: Path

    def targets(self, path: Path) -> tuple[Path, Path]:
        """Return where the states and the embeddings of a sequence file go."""
        return self.out / STATES / path.name, self.out / EMBEDDINGS / path.name


def report_nothing(_done: int, _total: int, _message: str) -> None:
    """Ignore progress."""


def encode_folder(
    sequences_folder: Path,
    checkpoint_folder: Path,
    out: Path,
    *,
    device: str = "auto",
    batch_tokens: int = BATCH_TOKENS,
    precision: str = "auto",
    is_compiled: bool = False,
    written_at: datetime | None = None,
    report: Report = report_nothing,
) -> EncodingSummary:
    """Encode every user of a folder of sequences.

    Each sequence file becomes `states/<name>` under `contracts.state_schema` and
    `embeddings/<name>` under `contracts.embedding_schema`, in its order, written aside and renamed
    when whole. A file whose embeddings are there already, from this checkpoint and this very file,
    is passed over: a run that was killed goes on where it was. Embeddings are written after states.

    Args:
        sequences_folder: Parquet files under `contracts.SEQUENCES`.
        checkpoint_folder: the encoder; its vocabulary is that of the sequences.
        out: where both folders go.
        device: as torch names it; `auto` prefers a GPU.
        batch_tokens: padded tokens of a batch on a CPU; on a GPU batches are packed.
        precision: float32, bfloat16, or auto: bfloat16 on a GPU and float32, which keeps every
            user's numbers the same to the last bit whoever else is encoded, on a CPU.
        is_compiled: whether the pass is compiled on a GPU: worth its minute from some million
            events on.
        written_at: recorded in every row; default now.
        report: progress over users.

    Raises:
        PipelineError: if the checkpoint knows of events at or after a cutoff, or the sequences
            have another vocabulary, or there are none.
        AssertionError: if an embedding is not finite.
    """
    started = time.perf_counter()
    files = sequence_files(sequences_folder)
    checkpoint = load_checkpoint(checkpoint_folder, _device_of(device))
    encoder = _prepared(checkpoint.encoder, precision, is_compiled=is_compiled)
    work = _work(checkpoint, encoder, out, batch_tokens, precision, written_at)
    for folder in (out / STATES, out / EMBEDDINGS):
        remove_leftovers(folder)
    counts = {path: int(pq.read_metadata(path).num_rows) for path in files}
    done, encoded, skipped = 0, 0, 0
    for path in files:
        if _is_done(path, work):
            done, skipped = done + counts[path], skipped + 1
            report(done, sum(counts.values()), f"{path.name} was there")
            continue
        for num_users in _encode_file(path, work):
            done, encoded = done + num_users, encoded + num_users
            report(done, sum(counts.values()), path.name)
    seconds = time.perf_counter() - started
    return EncodingSummary(sum(counts.values()), encoded, len(files), skipped, seconds)


def _device_of(name: str) -> str:
    """Return the device that a name means; `auto` prefers a GPU."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def _is_on_gpu(encoder: Encoder) -> bool:
    return encoder.prior().device.type == "cuda"


def _prepared(encoder: Encoder, precision: str, *, is_compiled: bool) -> Encoder:
    """Return the encoder in the precision that is asked for."""
    is_gpu = _is_on_gpu(encoder)
    if precision == "float32" or (precision == "auto" and not is_gpu):
        return encoder
    return fast_copy(encoder, is_compiled=is_compiled and is_gpu)


def _work(
    checkpoint: Checkpoint,
    encoder: Encoder,
    out: Path,
    batch_tokens: int,
    precision: str,
    written_at: datetime | None,
) -> _Work:
    """Put together what is the same for all files."""
    is_gpu = _is_on_gpu(encoder)
    return _Work(
        checkpoint=checkpoint,
        encoder=encoder,
        prior=encoder.prior().float().cpu().numpy(),
        batch_tokens=max(batch_tokens, PACKED_TOKENS) if is_gpu else batch_tokens,
        chunk_users=GPU_CHUNK_USERS if is_gpu else CHUNK_USERS,
        is_short=precision != "float32",
        written_at=written_at or datetime.now(UTC),
        out=out,
    )


def _source_of(path: Path, work: _Work) -> bytes:
    """Return a hash that tells by what, and of what, a file of embeddings was made.

    Of the checkpoint's id and of the sequence file's footer, which holds sizes, places and
    statistics of all its columns.
    """
    with path.open("rb") as file:
        file.seek(-_FOOTER_END, 2)
        length = int.from_bytes(file.read(4), "little")
        file.seek(-_FOOTER_END - length, 2)
        footer = file.read(length)
    key = work.checkpoint.checkpoint_id.encode() + str(path.stat().st_size).encode() + footer
    return hashlib.sha256(key).hexdigest().encode()


def _is_done(path: Path, work: _Work) -> bool:
    """Tell whether this checkpoint has encoded this very file before."""
    targets = work.targets(path)
    if not all(target.is_file() for target in targets):
        return False
    source = _source_of(path, work)
    metadata = [pq.read_schema(target).metadata or {} for target in targets]
    return all(found.get(_SOURCE) == source for found in metadata)


def _encode_file(path: Path, work: _Work) -> Iterator[int]:
    """Encode a sequence file; yield how many users after each chunk."""
    metadata = {_SOURCE: _source_of(path, work)}
    width, state_width = work.encoder.embedding_width, work.encoder.state_width
    schemas = (state_schema(state_width), embedding_schema(width))
    with ExitStack() as stack:
        # Left in reverse order: the states are in place before the embeddings are.
        embeddings, states = (
            stack.enter_context(
                pq.ParquetWriter(
                    stack.enter_context(writing_file(target)),
                    schema.with_metadata(metadata),
                    compression="zstd",
                    use_dictionary=["checkpoint_id"],
                )
            )
            for target, schema in zip(work.targets(path)[::-1], schemas[::-1], strict=True)
        )
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=work.chunk_users):
                chunk = _encode_chunk(pa.Table.from_batches([batch]), path, work)
                states.write_table(chunk[0])
                embeddings.write_table(chunk[1])
                yield len(batch)


def _encode_chunk(sequences: pa.Table, path: Path, work: _Work) -> tuple[pa.Table, pa.Table]:
    """Return states and embeddings of some users."""
    _check(sequences, path, work)
    table = read_table(sequences, str(path))
    # A history without events is no work for the transformer: its state is zero.
    users = np.flatnonzero(table.num_events > 0)
    states = np.zeros((len(table), work.encoder.state_width), np.float32)
    if len(users):
        encoded = encode_table(
            work.encoder, table.take(users), work.batch_tokens, is_short=work.is_short
        )
        states[users] = encoded.states
    silence = table.silence_days(np.arange(len(table)))
    embeddings = read_out(work.encoder, states, silence)
    checkpoint_id = work.checkpoint.checkpoint_id
    return (
        states_table(sequences, states, fingerprints(table), checkpoint_id),
        embeddings_table(sequences, embeddings, work.prior, checkpoint_id, work.written_at),
    )


def _check(sequences: pa.Table, path: Path, work: _Work) -> None:
    """Refuse sequences of another vocabulary, before the end of training, or of a reserved id."""
    checkpoint = work.checkpoint
    check_vocabulary(sequences, path, checkpoint)
    cutoffs = sequences["observation_cutoff"]
    through = pa.scalar(checkpoint.trained_through, cutoffs.type)
    if pc.any(pc.less(cutoffs, through)).as_py():
        raise PipelineError(
            f"The checkpoint {checkpoint.checkpoint_id} knows of events before "
            f"{checkpoint.trained_through:%Y-%m-%d}; {path.name} has an earlier cutoff, which "
            "would leak.",
            "Use a checkpoint that was trained through an earlier time, or a later cutoff.",
        )
    check_no_reserved_user(sequences, path)


class _Progress:
    """Progress on the error stream: one line that is written over, or a line a second in a log."""

    def __init__(self) -> None:
        self.started = self.last = time.perf_counter()

    def __call__(self, done: int, total: int, message: str) -> None:
        """Say how far the work is."""
        now = time.perf_counter()
        is_last = done == total
        if not is_last and now - self.last < (0.1 if sys.stderr.isatty() else 1.0):
            return
        self.last = now
        rate = done / max(now - self.started, 1e-9)
        line = f"{done:,} of {total:,} users, {rate:,.0f} users/s  {message}"
        is_open = sys.stderr.isatty() and not is_last
        start = "\r\x1b[K" if sys.stderr.isatty() else ""
        sys.stderr.write(f"{start}{line}" + ("" if is_open else "\n"))
        sys.stderr.flush()


def main(arguments: list[str] | None = None) -> None:
    """Encode from the command line; say on the error stream how far the work is."""
    parser = argparse.ArgumentParser(prog="python -m behavior_pipeline.encoder.encode")
    parser.add_argument("--sequences", type=Path, required=True, help="folder of sequence files")
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="where states/, embeddings/ go")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, help="of torch on a CPU")
    parser.add_argument("--batch-tokens", type=int, default=BATCH_TOKENS)
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--compile", action="store_true", help="compile the pass on a GPU")
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    try:
        summary = encode_folder(
            given.sequences, given.checkpoint, given.out, device=given.device,
            batch_tokens=given.batch_tokens, precision=given.precision, is_compiled=given.compile,
            report=_Progress(),
        )  # fmt: skip
    except PipelineError as error:
        sys.exit(str(error))
    sys.stdout.write(
        f"{given.out}  {summary.num_users:,} users, {summary.num_encoded:,} encoded now, "
        f"{summary.users_per_second:,.0f} users/s\n"
    )


if __name__ == "__main__":
    main()
