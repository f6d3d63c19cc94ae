"""Writes sequence files: one per bucket of users, so that memory is bounded by a bucket.

Everybody is tokenized where nothing usable is there. Otherwise the files of an earlier night are
linked, and only users whose events have changed since, or who have an event between the two
cutoffs, are tokenized anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from behavior_pipeline.contracts import PAD_ID, SEQUENCES, TOKEN_FIELDS, UNKNOWN_ID
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.layers import Layers, bucket_file, read_layers
from behavior_pipeline.progress import Report, report_nothing
from behavior_pipeline.sequences.affected import Affected, find_affected
from behavior_pipeline.sequences.reading import (
    GONE,
    MANIFEST,
    TOUCHED_FOLDER,
    read_bucket,
    sequence_files,
)
from behavior_pipeline.sequences.tokenization import EVENT_COLUMNS, tokenize
from behavior_pipeline.sequences.vocabulary import Vocabulary
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage, read_json, write_json, writing_file, writing_folder

__all__ = ["SequencesSummary", "sequence_files", "write_sequences"]

ROW_GROUP_USERS: Final = 4096
MAX_TOUCHED_FILES: Final = 8
"""So many files of touched users a bucket, and the next night writes them into the base."""


@dataclass(frozen=True)
class SequencesSummary:
    """What a folder of sequences holds.

    Attributes:
        num_users: rows; users with any event before the cutoff.
        num_tokenized_users: those of them that were tokenized for it; the others are as they were.
        num_users_without_tokens: tokenized users whose every event is of an ignored type.
        num_events: tokens in the lists of tokenized users, after cutting.
        unknown_shares: per token field, the share of `UNKNOWN_ID` among their tokens that have the
            field; 0 for a field that no token has.
    """

    num_users: int
    num_tokenized_users: int
    num_users_without_tokens: int
    num_events: int
    unknown_shares: dict[str, float]


@dataclass(frozen=True)
class _Work:
    """What is the same for all buckets."""

    layers: Layers
    vocabulary: Vocabulary
    cutoff: datetime
    max_events: int
    report: Report

    def tokenize(self, events: pl.DataFrame) -> pa.Table:
        """Tokenize some users."""
        return tokenize(events, self.vocabulary, self.cutoff, self.max_events)

    def manifest(self, num_users: int) -> dict[str, Any]:
        """Return what is recorded beside the files."""
        return {
            "cutoff": self.cutoff.isoformat(),
            "vocabulary_id": self.vocabulary.vocabulary_id,
            "max_events": self.max_events,
            "base": self.layers.base.id,
            "version": self.layers.version,
            "num_users": num_users,
        }


def write_sequences(
    storage: Storage,
    settings: Settings,
    vocabulary: Vocabulary,
    cutoff: datetime,
    folder: Path,
    report: Report = report_nothing,
    *,
    earlier: Sequence[Path] = (),
) -> SequencesSummary:
    """Tokenize every user's events before the cutoff into `folder/bucket=<kkk>.parquet`.

    Bucket by bucket of the sessionized events; a bucket without events before the cutoff is an
    empty file. The folder is replaced as a whole, or not at all.

    Args:
        storage: the source's home, with `events_sessionized` built.
        settings: `max_sequence_events` is the longest list.
        vocabulary: what the ids mean.
        cutoff: exclusive end of the events; in UTC.
        folder: where the files go, such as `storage.sequences(cutoff)`.
        report: progress over buckets.
        earlier: folders of sequences that may be built upon, such as those of other cutoffs.

    Raises:
        PipelineError: if there are no sessionized events, or none before the cutoff.
    """
    layers = read_layers(storage.events_sessionized)
    work = _Work(layers, vocabulary, cutoff, settings.max_sequence_events, report)
    affected = find_affected(storage, settings, layers, work.manifest(0), earlier)
    if affected is None:
        return _write_everybody(work, folder)
    return _write_affected(work, affected, folder)


def unknown_share(folder: Path, field: str) -> float:
    """Return the share of `UNKNOWN_ID` among a folder's tokens that have a field, 0 without any.

    The same as `SequencesSummary.unknown_shares[field]` of everybody, some users at a time.

    Raises:
        PipelineError: if there are no files.
    """
    num_present, num_unknown = 0, 0
    for file in sequence_files(folder):
        for chunk in read_bucket(file, ROW_GROUP_USERS):
            tokens = chunk[f"{field}_ids"].combine_chunks().flatten().to_numpy()
            num_present += int(np.sum(tokens != PAD_ID))
            num_unknown += int(np.sum(tokens == UNKNOWN_ID))
    return num_unknown / max(num_present, 1)


def _write_everybody(work: _Work, folder: Path) -> SequencesSummary:
    """Tokenize all users."""
    tallies: list[_Tally] = []
    num_buckets = work.layers.num_buckets
    with writing_folder(folder) as aside:
        for bucket in range(num_buckets):
            work.report(bucket, num_buckets, f"bucket {bucket}")
            sequences = work.tokenize(_events_before(work.layers, bucket, work.cutoff))
            _write(sequences, aside / bucket_file(bucket))
            tallies.append(_tally(sequences))
        num_users = sum(tally.num_users for tally in tallies)
        if not num_users:
            raise PipelineError(
                f"There is no event before {work.cutoff:%Y-%m-%d}.", "Choose a later cutoff."
            )
        write_json(aside / MANIFEST, work.manifest(num_users))
    work.report(num_buckets, num_buckets, "tokenized")
    return _summarize(tallies, num_users)


def _write_affected(work: _Work, affected: Affected, folder: Path) -> SequencesSummary:
    """Link the files of an earlier night and add the users that it does not have as they are."""
    tallies: list[_Tally] = []
    num_buckets = work.layers.num_buckets
    num_users = read_json(affected.base / MANIFEST)["num_users"]
    with writing_folder(folder) as aside:
        (aside / TOUCHED_FOLDER).mkdir(mode=0o700)
        for file in affected.base.rglob("*.parquet"):
            (aside / file.relative_to(affected.base)).hardlink_to(file)
        for bucket in range(num_buckets):
            work.report(bucket, num_buckets, f"bucket {bucket}")
            users, events = affected.of_bucket(bucket)
            if not len(users):
                continue
            sequences = work.tokenize(events)
            num_users += len(sequences) - affected.num_known(bucket)
            gone = _gone(users, sequences, work)
            _add(pa.concat_tables([sequences, gone]), aside / bucket_file(bucket))
            tallies.append(_tally(sequences))
        write_json(aside / MANIFEST, work.manifest(num_users))
        _compact(aside)
    work.report(num_buckets, num_buckets, "tokenized")
    return _summarize(tallies, num_users)


def _add(touched: pa.Table, file: Path) -> None:
    """Write touched users of a bucket behind those that are there."""
    folder = file.parent / TOUCHED_FOLDER
    number = 1 + len(list(folder.glob(f"{file.stem}.*.parquet")))
    _write(touched.sort_by("user_id"), folder / f"{file.stem}.{number:03d}.parquet")


def _compact(folder: Path) -> None:
    """Write buckets with many files of touched users as one file again."""
    for file in sequence_files(folder):
        touched = sorted((folder / TOUCHED_FOLDER).glob(f"{file.stem}.*.parquet"))
        if len(touched) < MAX_TOUCHED_FILES:
            continue
        with (
            writing_file(file) as target,
            pq.ParquetWriter(target, SEQUENCES.schema, compression="zstd") as writer,
        ):
            for chunk in read_bucket(file, ROW_GROUP_USERS):
                writer.write_table(chunk.cast(SEQUENCES.schema), row_group_size=ROW_GROUP_USERS)
        for old in touched:
            old.unlink()


def _write(sequences: pa.Table, file: Path) -> None:
    """Write a table of sequences to a private file."""
    with writing_file(file) as target:
        pq.write_table(sequences, target, row_group_size=ROW_GROUP_USERS, compression="zstd")


def _gone(users: pa.Array, sequences: pa.Table, work: _Work) -> pa.Table:
    """Return a row for each user that has no event before the cutoff any more."""
    gone = users.filter(pc.invert(pc.is_in(users, value_set=sequences["user_id"])))
    rows = SEQUENCES.schema.empty_table().to_pydict() | {
        "user_id": gone.to_pylist(),
        "observation_cutoff": [work.cutoff] * len(gone),
        "vocabulary_id": [work.vocabulary.vocabulary_id] * len(gone),
        "num_events": [GONE] * len(gone),
    }
    filled = {name: values or [None] * len(gone) for name, values in rows.items()}
    return pa.table(filled, schema=SEQUENCES.schema)


def _events_before(layers: Layers, bucket: int, cutoff: datetime) -> pl.DataFrame:
    """Read what tokens need of a bucket's events before the cutoff."""
    parts = []
    for files, later in layers.parts(bucket):
        part = pl.scan_parquet(files, hive_partitioning=False, glob=False)
        if later:
            users = pl.scan_parquet(later, hive_partitioning=False, glob=False)
            part = part.join(users, on="user_id", how="anti", maintain_order="left")
        parts.append(part.filter(pl.col("user_bucket") == bucket).select(EVENT_COLUMNS))
    return pl.concat(parts).filter(pl.col("occurred_at") < cutoff).collect()


@dataclass(frozen=True)
class _Tally:
    """Counts of one bucket; `num_known[field]` counts tokens that have the field."""

    num_users: int
    num_users_without_tokens: int
    num_events: int
    num_present: dict[str, int]
    num_unknown: dict[str, int]


def _tally(sequences: pa.Table) -> _Tally:
    """Count the tokens of a table under `contracts.SEQUENCES`."""
    ids = {
        field: sequences[f"{field}_ids"].combine_chunks().flatten().to_numpy()
        for field in TOKEN_FIELDS
    }
    return _Tally(
        num_users=sequences.num_rows,
        num_users_without_tokens=int(np.sum(sequences["num_events"].to_numpy() == 0)),
        num_events=len(ids["action"]),
        num_present={field: int(np.sum(tokens != PAD_ID)) for field, tokens in ids.items()},
        num_unknown={field: int(np.sum(tokens == UNKNOWN_ID)) for field, tokens in ids.items()},
    )


def _summarize(tallies: Sequence[_Tally], num_users: int) -> SequencesSummary:
    """Add up the buckets."""
    present = {field: sum(tally.num_present[field] for tally in tallies) for field in TOKEN_FIELDS}
    unknown = {field: sum(tally.num_unknown[field] for tally in tallies) for field in TOKEN_FIELDS}
    return SequencesSummary(
        num_users=num_users,
        num_tokenized_users=sum(tally.num_users for tally in tallies),
        num_users_without_tokens=sum(tally.num_users_without_tokens for tally in tallies),
        num_events=sum(tally.num_events for tally in tallies),
        unknown_shares={field: unknown[field] / max(present[field], 1) for field in TOKEN_FIELDS},
    )
