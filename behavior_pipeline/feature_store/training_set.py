"""Training sets: labels of any number beside the features that were valid at their moments.

Labels come in chunks and leave in chunks, so memory does not grow with their number.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from behavior_pipeline.errors import PipelineError
from behavior_pipeline.feature_store.historical import JOIN_ROWS, WRITTEN_AT, PointInTimeJoin
from behavior_pipeline.feature_store.label_files import LabelFile
from behavior_pipeline.feature_store.repository import full_name
from behavior_pipeline.progress import Report, report_nothing
from behavior_pipeline.storage import Storage, writing_file

TIME_COLUMN: Final = "event_timestamp"
SERVICE: Final = "training_set"
METADATA_KEY: Final = "behavior_pipeline"


@dataclass
class ViewCounts:
    """What a training set holds of one view.

    Attributes:
        num_found: rows with a value.
        num_written_later: of these, rows whose value was written after their moment: valid then,
            and not yet published.
        checkpoints: rows by checkpoint; empty for a view without an encoder.
    """

    num_found: int = 0
    num_written_later: int = 0
    checkpoints: Counter[str] = field(default_factory=Counter)

    @property
    def is_mixed(self) -> bool:
        """Whether its vectors live in more than one space."""
        return len(self.checkpoints) > 1


@dataclass(frozen=True)
class TrainingSetSummary:
    """What a training set holds.

    Attributes:
        num_rows: rows, as many as there are labels.
        views: counts by view.
    """

    num_rows: int
    views: dict[str, ViewCounts]


def write_training_set(
    storage: Storage,
    labels: Path,
    out: Path,
    service_or_features: str | Sequence[str] = SERVICE,
    *,
    time_column: str = TIME_COLUMN,
    as_published: bool = False,
    one_checkpoint: bool = False,
    report: Report = report_nothing,
) -> TrainingSetSummary:
    """Join labels with the features that were valid at their moments, into a Parquet file.

    Args:
        storage: the home.
        labels: Parquet or CSV with `user_id`, moments and any other columns.
        out: Parquet file to write, all at once: the columns of the labels, then
            `<view>__<feature>` of each feature and `<view>__written_at` of each view. Its metadata
            says under `behavior_pipeline` what was joined, how, and the counts of the summary.
        service_or_features: name of a feature service, or features as `view:feature`.
        time_column: the column of moments.
        as_published: use only rows that had been written by the moment.
        one_checkpoint: refuse vectors of more than one checkpoint in one view.
        report: called with the rows joined so far; the total is not known beforehand.

    Raises:
        PipelineError: if labels are wrong (see `label_files`), a name is unknown, a view was never
            published, or `one_checkpoint` does not hold. Nothing is written then.
    """
    source = LabelFile.open(labels, time_column)
    _check_out(labels, out)
    join = PointInTimeJoin.open(storage, service_or_features, as_published=as_published)
    _check_names(source, join)
    summary = TrainingSetSummary(0, {view: ViewCounts() for view in join.views})
    with writing_file(out) as aside:
        num_rows = _write(aside, source, join, summary, report)
        if one_checkpoint:
            _check_one_checkpoint(summary)
    return TrainingSetSummary(num_rows, summary.views)


def _check_out(labels: Path, out: Path) -> None:
    """Refuse a place where the training set cannot stand."""
    if out.suffix.lower() != ".parquet":
        raise PipelineError(f"{out} does not end in .parquet.", "A training set is a Parquet file.")
    if out.resolve() == labels.resolve():
        raise PipelineError(f"{out} holds the labels.", "Write the training set beside them.")


def _check_names(source: LabelFile, join: PointInTimeJoin) -> None:
    """Refuse labels whose columns are called as the features are."""
    names = {*join.columns, *(full_name(view, WRITTEN_AT) for view in join.views)}
    taken = [name for name in source.columns if name in names]
    if taken:
        raise PipelineError(
            f"{source.path} has a column '{taken[0]}', which is a feature's name.",
            "Rename it, or start from labels that were not joined yet.",
        )


def _write(
    aside: Path,
    source: LabelFile,
    join: PointInTimeJoin,
    summary: TrainingSetSummary,
    report: Report,
) -> int:
    """Write the joined rows chunk by chunk and count them; return their number."""
    chunks = _joined(source, join, summary, report)
    first = next(chunks, None)
    if first is None:
        raise PipelineError(f"{source.path} holds no row.", "There is nothing to look up.")
    num_rows: int = first.num_rows
    with closing(pq.ParquetWriter(aside, first.schema, compression="zstd")) as writer:
        writer.write_table(first)
        for chunk in chunks:
            writer.write_table(chunk)
            num_rows += chunk.num_rows
        writer.add_key_value_metadata({METADATA_KEY: json.dumps(_described(join, summary))})
    return num_rows


def _joined(
    source: LabelFile, join: PointInTimeJoin, summary: TrainingSetSummary, report: Report
) -> Iterator[pa.Table]:
    """Yield the labels with their features, in order."""
    done = 0
    for labels in source.chunks(JOIN_ROWS):
        keys = pa.table(
            {"user_id": labels["user_id"], "event_timestamp": labels[source.time_column]}
        )
        features = join.features_of(keys)
        for view, counts in summary.views.items():
            _count(counts, view, keys, features)
        for name in features.column_names:
            labels = labels.append_column(features.schema.field(name), features[name])  # noqa: PLW2901 - grows
        done += labels.num_rows
        report(done, done, "rows")
        yield labels


def _count(counts: ViewCounts, view: str, keys: pa.Table, features: pa.Table) -> None:
    """Add the rows of a chunk to the counts of a view."""
    written = features[full_name(view, WRITTEN_AT)]
    counts.num_found += len(written) - written.null_count
    counts.num_written_later += pc.sum(pc.greater(written, keys["event_timestamp"])).as_py() or 0
    checkpoint = full_name(view, "checkpoint_id")
    if checkpoint in features.column_names:
        for count in pc.value_counts(features[checkpoint].drop_null()).to_pylist():
            counts.checkpoints[count["values"]] += count["counts"]


def _check_one_checkpoint(summary: TrainingSetSummary) -> None:
    """Refuse vectors of more than one space."""
    for view, counts in summary.views.items():
        if counts.is_mixed:
            raise PipelineError(
                f"{view} holds rows of {len(counts.checkpoints)} checkpoints: "
                f"{in_words(counts.checkpoints)}.",
                "Ask for moments of one checkpoint only, or publish these cutoffs again with one.",
            )


def in_words(checkpoints: Counter[str]) -> str:
    """Return rows by checkpoint, the most frequent first."""
    ordered = sorted(checkpoints.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{name} in {count:,} rows" for name, count in ordered)


def _described(join: PointInTimeJoin, summary: TrainingSetSummary) -> dict[str, Any]:
    """Return what a training set says of itself."""
    return {
        "features": list(join.references),
        "clock": "as published" if join.as_published else "event time",
        "views": {
            view: {
                "num_found": counts.num_found,
                "num_written_later": counts.num_written_later,
                "checkpoints": dict(sorted(counts.checkpoints.items())),
            }
            for view, counts in summary.views.items()
        },
    }
