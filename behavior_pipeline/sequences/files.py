"""Sequence files: one per bucket of users, so that memory is bounded by a bucket."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from behavior_pipeline.contracts import PAD_ID, TOKEN_FIELDS, UNKNOWN_ID
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.progress import Report, report_nothing
from behavior_pipeline.sequences.tokenization import EVENT_COLUMNS, tokenize
from behavior_pipeline.sequences.vocabulary import Vocabulary
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage, writing_file, writing_folder

ROW_GROUP_USERS: Final = 4096
_BUCKET_FOLDER: Final = re.compile(r"user_bucket=(\d+)")


@dataclass(frozen=True)
class SequencesSummary:
    """What a folder of sequences holds.

    Attributes:
        num_users: rows; users with any event before the cutoff.
        num_users_without_tokens: those of them whose every event is of an ignored type.
        num_events: tokens in the lists, after cutting.
        unknown_shares: per token field, the share of `UNKNOWN_ID` among tokens that have the
            field; 0 for a field that no token has.
    """

    num_users: int
    num_users_without_tokens: int
    num_events: int
    unknown_shares: dict[str, float]


def write_sequences(
    storage: Storage,
    settings: Settings,
    vocabulary: Vocabulary,
    cutoff: datetime,
    folder: Path,
    report: Report = report_nothing,
) -> SequencesSummary:
    """Tokenize every user's events before the cutoff into `folder/bucket=<kkk>.parquet`.

    Bucket by bucket of `events_sessionized`; a bucket without events before the cutoff has no
    file. The folder is replaced as a whole, or not at all.

    Args:
        storage: the source's home, with `events_sessionized` built.
        settings: `max_sequence_events` is the longest list.
        vocabulary: what the ids mean.
        cutoff: exclusive end of the events; in UTC.
        folder: where the files go, such as `storage.sequences(cutoff)`.
        report: progress over buckets.

    Raises:
        PipelineError: if there are no sessionized events, or none before the cutoff.
    """
    buckets = _bucket_folders(storage.events_sessionized)
    tallies: list[_Tally] = []
    with writing_folder(folder) as aside:
        for done, (number, bucket) in enumerate(buckets):
            report(done, len(buckets), f"bucket {number}")
            events = _events_before(bucket, cutoff)
            if events.is_empty():
                continue
            sequences = tokenize(events, vocabulary, cutoff, settings.max_sequence_events)
            with writing_file(aside / f"bucket={number:03d}.parquet") as target:
                pq.write_table(
                    sequences, target, row_group_size=ROW_GROUP_USERS, compression="zstd"
                )
            tallies.append(_tally(sequences))
        if not tallies:
            raise PipelineError(
                f"There is no event before {cutoff:%Y-%m-%d}.", "Choose a later cutoff."
            )
    report(len(buckets), len(buckets), "tokenized")
    return _summarize(tallies)


def unknown_share(folder: Path, field: str) -> float:
    """Return the share of `UNKNOWN_ID` among a folder's tokens that have a field, 0 without any.

    The same as `SequencesSummary.unknown_shares[field]`, from the files, one of them at a time.

    Raises:
        PipelineError: if there are no files.
    """
    num_present, num_unknown = 0, 0
    for file in sequence_files(folder):
        lists = pq.read_table(file, columns=[f"{field}_ids"], partitioning=None)[0]
        tokens = lists.combine_chunks().flatten().to_numpy()
        num_present += int(np.sum(tokens != PAD_ID))
        num_unknown += int(np.sum(tokens == UNKNOWN_ID))
    return num_unknown / max(num_present, 1)


def sequence_files(folder: Path) -> list[Path]:
    """Return the bucket files of a folder, in order of buckets.

    Raises:
        PipelineError: if there are none.
    """
    files = sorted(folder.glob("bucket=*.parquet"))
    if not files:
        raise PipelineError(f"There are no sequences in {folder}.", "Tokenize that cutoff first.")
    return files


def _bucket_folders(events_sessionized: Path) -> list[tuple[int, Path]]:
    """Return number and folder of each bucket of users, in order of numbers."""
    found = [
        (int(match.group(1)), path)
        for path in events_sessionized.glob("user_bucket=*")
        if (match := _BUCKET_FOLDER.fullmatch(path.name))
    ]
    if not found:
        raise PipelineError(
            f"There are no sessionized events in {events_sessionized}.",
            "Build the warehouse first.",
        )
    return sorted(found)


def _events_before(bucket: Path, cutoff: datetime) -> pl.DataFrame:
    """Read what tokens need of a bucket's events before the cutoff."""
    files = sorted(bucket.glob("*.parquet"))
    events = pl.scan_parquet(files, hive_partitioning=False, glob=False)
    return events.filter(pl.col("occurred_at") < cutoff).select(EVENT_COLUMNS).collect()


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


def _summarize(tallies: Sequence[_Tally]) -> SequencesSummary:
    """Add up the buckets."""
    present = {field: sum(tally.num_present[field] for tally in tallies) for field in TOKEN_FIELDS}
    unknown = {field: sum(tally.num_unknown[field] for tally in tallies) for field in TOKEN_FIELDS}
    return SequencesSummary(
        num_users=sum(tally.num_users for tally in tallies),
        num_users_without_tokens=sum(tally.num_users_without_tokens for tally in tallies),
        num_events=sum(tally.num_events for tally in tallies),
        unknown_shares={field: unknown[field] / max(present[field], 1) for field in TOKEN_FIELDS},
    )
