"""One cutoff of one view on its way into the offline store: checked, typed, written at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from behavior_pipeline.contracts import TIMESTAMP
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.feature_store.in_parallel import ahead
from behavior_pipeline.feature_store.published import PublishedCutoff
from behavior_pipeline.feature_store.user_order import in_user_order
from behavior_pipeline.sql import open_engine
from behavior_pipeline.storage import Storage, cutoff_folder, writing_file

if TYPE_CHECKING:
    from feast import FeatureView

OFFLINE_FILE: Final = "features.parquet"
OFFLINE_BATCH_ROWS: Final = 8_192  # rows in memory, and in a row group of the published file
READ_BYTES: Final = 1 << 20  # of a column, at a time
CHECK_MEMORY: Final = "1GB"  # of the queries that look a partition over before it is published

_SOURCES: Final[dict[str, Callable[[Storage, datetime], tuple[Path, str]]]] = {
    "user_embedding": lambda storage, cutoff: (storage.embeddings(cutoff), "bucket=*.parquet"),
    "user_rfm": lambda storage, cutoff: (storage.marts(cutoff), "user_rfm.parquet"),
    "user_predictions": lambda storage, cutoff: (
        storage.predictions(cutoff),
        "predictions.parquet",
    ),
    "user_segment": lambda storage, cutoff: (storage.segments(cutoff), "segments.parquet"),
    "similar_users": lambda storage, cutoff: (
        storage.similar_users(cutoff),
        "similar_users.parquet",
    ),
}

VIEWS: Final = tuple(_SOURCES)
"""The views that can be published."""


def source_files(storage: Storage, view: str, cutoff: datetime) -> list[Path]:
    """Return the files that a view's rows at a cutoff come from, in order.

    Raises:
        PipelineError: if there is no such view, or its rows were not made yet.
    """
    if view not in _SOURCES:
        raise PipelineError(f"There is no view '{view}'.", f"Use one of {', '.join(VIEWS)}.")
    folder, pattern = _SOURCES[view](storage, cutoff)
    files = sorted(folder.glob(pattern))
    if not files:
        raise PipelineError(
            f"Nothing to publish for {view} at {cutoff:%Y-%m-%d}: no {pattern} in {folder}.",
            "Run the stages before it for this cutoff first.",
        )
    return files


def check_rows(storage: Storage, view: str, cutoff: datetime, files: list[Path]) -> PublishedCutoff:
    """Check that the rows may be published together, and return their number and checkpoint.

    Raises:
        PipelineError: if there is no row, a row without a user, a user twice, a row of another
            cutoff, or (in a view that names checkpoints) not exactly one checkpoint.
    """
    has_checkpoint = "checkpoint_id" in pq.read_schema(files[0]).names
    facts = _row_facts(storage, cutoff, files, has_checkpoint)
    objections = _objections(facts) + (_checkpoint_objections(facts) if has_checkpoint else [])
    if objections:
        raise PipelineError(
            f"{view} at {cutoff:%Y-%m-%d} cannot be published: {objections[0]} ({files[0].parent})",
            "Make these files again for this cutoff, then publish.",
        )
    return PublishedCutoff(facts.num_rows, facts.checkpoint_ids[0] if has_checkpoint else None)


@dataclass(frozen=True)
class _RowFacts:
    """What the checks of a partition look at."""

    num_rows: int
    num_without_user: int
    num_of_other_cutoffs: int
    num_without_checkpoint: int
    checkpoint_ids: list[str]
    user_listed_twice: str | None


def _row_facts(
    storage: Storage, cutoff: datetime, files: list[Path], has_checkpoint: bool
) -> _RowFacts:
    """Count what the checks look at, in DuckDB and in bounded memory."""
    checkpoint = "checkpoint_id" if has_checkpoint else "null::varchar"
    names = [str(path) for path in files]
    with open_engine(CHECK_MEMORY, 1, storage.scratch / "feature_store") as engine:
        counts = engine.execute(
            f"""
            select
                count(*), count(*) - count(user_id),
                count(*) filter (observation_cutoff is distinct from $2),
                count(*) - count({checkpoint}),
                list_sort(list(distinct {checkpoint}) filter ({checkpoint} is not null))
            from read_parquet($1)
            """,
            [names, cutoff],
        ).fetchall()[0]
        twice = engine.execute(
            """
            select user_id from read_parquet($1)
            group by user_id having count(*) > 1 order by user_id limit 1
            """,
            [names],
        ).fetchone()
    num_rows, without_user, other_cutoffs, without_checkpoint, checkpoint_ids = counts
    return _RowFacts(
        num_rows,
        without_user,
        other_cutoffs,
        without_checkpoint,
        checkpoint_ids or [],
        twice[0] if twice else None,
    )


def _objections(facts: _RowFacts) -> list[str]:
    """Say what speaks against publishing the rows of any view."""
    checks = [
        (facts.num_rows == 0, "there is no row"),
        (facts.num_without_user > 0, f"user_id is null in {facts.num_without_user:,} rows"),
        (facts.num_of_other_cutoffs > 0, f"{facts.num_of_other_cutoffs:,} rows of other cutoffs"),
        (
            facts.user_listed_twice is not None,
            f"user_id '{facts.user_listed_twice}' has more than one row",
        ),
    ]
    return [message for is_wrong, message in checks if is_wrong]


def _checkpoint_objections(facts: _RowFacts) -> list[str]:
    """Say what speaks against publishing rows that name their checkpoint.

    Vectors of two checkpoints live in two spaces: comparing them gives numbers without a meaning.
    """
    mixed = ", ".join(facts.checkpoint_ids)
    checks = [
        (
            facts.num_without_checkpoint > 0,
            f"checkpoint_id is null in {facts.num_without_checkpoint:,} rows",
        ),
        (len(facts.checkpoint_ids) > 1, f"it mixes the checkpoints {mixed}"),
    ]
    return [message for is_wrong, message in checks if is_wrong]


def write_partition(
    view: FeatureView, folder: Path, cutoff: datetime, files: Sequence[Path]
) -> Path:
    """Write a cutoff's rows under the view's columns into the offline store; return the file.

    One file, renamed into place: readers of the history see the old partition or the new one. The
    folder's Hive name is not a feature's, so Feast never takes the one for the other.
    """
    target = folder / cutoff_folder(cutoff) / OFFLINE_FILE
    schema = _published_schema(view, pq.read_schema(files[0]))
    num_rows = -(-OFFLINE_BATCH_ROWS // len(files))
    rows = in_user_order([_batches(file, num_rows) for file in files])
    with writing_file(target) as aside, _writer(aside, schema) as out:
        for batch in ahead(rows):
            out.write_batch(_published_rows(batch, schema))
    return target


def _writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """Open a file of the history; vectors do not repeat, and hardly get smaller."""
    vectors = {field.name for field in schema if pa.types.is_fixed_size_list(field.type)}
    paths = {name: f"{name}.list.element" if name in vectors else name for name in schema.names}
    return pq.ParquetWriter(
        path,
        schema,
        write_statistics=[paths[name] for name in schema.names if name not in vectors],
        compression={paths[name]: "none" if name in vectors else "zstd" for name in schema.names},
        use_dictionary=[paths[name] for name in schema.names if name not in vectors],
    )


def _batches(path: Path, num_rows: int) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a source file, each with the time of writing.

    A file without `written_at` was written when the file system says.
    """
    written_at = pa.scalar(datetime.fromtimestamp(path.stat().st_mtime, UTC), TIMESTAMP)
    for batch in read_batches(path, num_rows):
        if "written_at" in batch.schema.names:
            yield batch
        else:
            column = pa.repeat(written_at, batch.num_rows)
            yield batch.append_column("written_at", column)


def read_batches(
    path: Path, num_rows: int, columns: Sequence[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a Parquet file, holding little more than a batch.

    Arrow's own way of reading ahead keeps every byte of the file that it has read.
    """
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=READ_BYTES) as source:
        yield from source.iter_batches(num_rows, columns=columns)


def _published_schema(view: FeatureView, source: pa.Schema) -> pa.Schema:
    """Return the columns of a view's history: keys, features as declared, both clocks.

    Raises:
        PipelineError: if the source lacks a feature that the view declares.
    """
    derived = {"cutoff_at": TIMESTAMP, "written_at": TIMESTAMP}
    types = {field.name: field.type for field in source} | derived
    columns = ["user_id", "observation_cutoff", *[f.name for f in view.features], "written_at"]
    missing = [column for column in columns if column not in types]
    if missing:
        raise PipelineError(
            f"The rows of {view.name} lack the column '{missing[0]}'.",
            "Make these files again with this release of the pipeline.",
        )
    return pa.schema([(column, types[column]) for column in columns])


def _published_rows(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """Return a batch under the published schema.

    Feast's timestamps count whole seconds online. Cutting them here keeps the history equal to
    what is served; cutting downwards keeps them before the cutoff.
    """
    batch = batch.append_column("cutoff_at", batch.column("observation_cutoff"))
    clocks = {"observation_cutoff", "written_at"}
    columns = [
        pc.floor_temporal(batch.column(field.name), unit="second")
        if pa.types.is_timestamp(field.type) and field.name not in clocks
        else batch.column(field.name)
        for field in schema
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)
