"""Segments: every user with an embedding in one of a few groups, each described in words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from threadpoolctl import threadpool_limits

from behavior_pipeline import sql
from behavior_pipeline.contracts import COLD_START_USER, SEGMENTS
from behavior_pipeline.downstream.blocks import Block, Blocks
from behavior_pipeline.downstream.clusters import Clusters, fit_clusters
from behavior_pipeline.downstream.population import require_mart
from behavior_pipeline.downstream.profiles import Profile, describe_segments
from behavior_pipeline.downstream.tables import write_sorted
from behavior_pipeline.downstream.vectors import (
    VectorFolder,
    iterate_vectors,
    load_vectors,
    open_vectors,
)
from behavior_pipeline.progress import Report, report_nothing
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage, write_json, writing_folder
from behavior_pipeline.windows import EvaluationWindows

SEGMENTS_FILE: Final = "segments.parquet"
PROFILES_FILE: Final = "profiles.json"
MAP_FILE: Final = "map.json"
MAX_MAP_USERS: Final = 2000
DIGITS: Final = 4

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class SegmentSummary:
    """What the segmentation made.

    Attributes:
        num_users: users with an embedding, all of them assigned.
        num_segments: at most the setting; fewer where fewer users differ.
        checkpoint_id: the encoder behind the embeddings.
        profiles: one per segment, the largest first.
    """

    num_users: int
    num_segments: int
    checkpoint_id: str
    profiles: tuple[Profile, ...]


def segment(
    storage: Storage,
    settings: Settings,
    windows: EvaluationWindows,
    written_at: datetime,
    report: Report = report_nothing,
) -> SegmentSummary:
    """Group all users with an embedding at the night's cutoff.

    K-means is fitted on a stable sample of at most `max_probe_users`; everyone is assigned bucket
    by bucket. Beside the segments lie `profiles.json` and `map.json`, a flat map of some users.

    Raises:
        PipelineError: if the embeddings or the RFM mart are missing.
    """
    vectors = open_vectors(storage.embeddings(windows.cutoff))
    rfm = require_mart(storage, windows.cutoff, "user_rfm")
    report(0, len(vectors.files), "finding segments")
    clusters = _numbered(vectors, _fit(vectors, storage, settings))
    with writing_folder(storage.segments(windows.cutoff)) as folder:
        unnamed = folder / "unnamed.parquet"
        tables = _assign(vectors, clusters, windows, written_at, report)
        num_users = write_sorted(unnamed, SEGMENTS, tables, storage, settings)
        profiles = describe_segments(
            storage, settings, unnamed, rfm, _known_labels(storage, windows), windows.cutoff
        )
        _write_named(unnamed, folder / SEGMENTS_FILE, profiles)
        unnamed.unlink()
        write_json(folder / PROFILES_FILE, [profile.as_json() for profile in profiles])
        write_json(folder / MAP_FILE, _flat_map(vectors, clusters, storage, settings))
    return SegmentSummary(num_users, len(profiles), vectors.checkpoint_id, tuple(profiles))


def _known_labels(storage: Storage, windows: EvaluationWindows) -> Path | None:
    """Return the labels at the night's cutoff if their window is over."""
    labels = storage.marts(windows.cutoff) / "labels.parquet"
    return labels if windows.test_cutoff == windows.cutoff and labels.is_file() else None


def _fit(vectors: VectorFolder, storage: Storage, settings: Settings) -> Clusters:
    """Fit k-means on a stable sample of users."""
    sample = _sample(vectors, storage, settings, settings.max_probe_users)
    blocks = _blocks(load_vectors(vectors, sample))
    return fit_clusters(blocks, settings.num_segments, settings.seed)


def _sample(vectors: VectorFolder, storage: Storage, settings: Settings, most: int) -> pa.Array:
    """Return the users whose ids have the smallest MD5, sorted by id."""
    query = """
        with sample as (
            select user_id from read_parquet($files, hive_partitioning = false)
            where user_id <> $reserved order by md5(user_id), user_id limit $most
        )
        select user_id from sample order by user_id
    """
    files = [str(file) for file in vectors.files]
    values = {"files": files, "reserved": COLD_START_USER, "most": most}
    with sql.open_engine(settings.memory_limit, settings.threads, storage.scratch) as engine:
        return engine.execute(query, values).to_arrow_table()["user_id"].combine_chunks()


def _numbered(vectors: VectorFolder, clusters: Clusters) -> Clusters:
    """Return the clusters that hold anyone, the largest first; ties by their centres."""
    sizes = np.zeros(len(clusters.centers), dtype=np.int64)
    for file in vectors.files:
        for _, matrix in iterate_vectors(file):
            nearest, _ = clusters.assign(_blocks(matrix))
            sizes += np.bincount(nearest, minlength=len(sizes))
    held = [number for number in range(len(sizes)) if sizes[number]]
    order = sorted(held, key=lambda number: (-sizes[number], tuple(clusters.centers[number])))
    return Clusters(clusters.normalizer, clusters.centers[order])


def _assign(
    vectors: VectorFolder,
    clusters: Clusters,
    windows: EvaluationWindows,
    written_at: datetime,
    report: Report,
) -> Iterator[pa.Table]:
    """Yield every user's segment, not yet named, bucket by bucket."""
    constant = {
        "observation_cutoff": windows.cutoff,
        "segment_name": None,
        "checkpoint_id": vectors.checkpoint_id,
        "written_at": written_at,
    }
    for number, file in enumerate(vectors.files, start=1):
        for user_ids, matrix in iterate_vectors(file):
            nearest, distances = clusters.assign(_blocks(matrix))
            columns = {"user_id": user_ids, "segment": nearest, "distance": distances}
            yield _as_table(columns, constant)
        report(number, len(vectors.files), "assigning users")


def _as_table(columns: dict[str, Any], constant: dict[str, Any]) -> pa.Table:
    """Return columns and constants in the contract's order."""
    schema = SEGMENTS.schema
    num_users = len(columns["user_id"])
    repeated = {
        name: pa.repeat(pa.scalar(value, schema.field(name).type), num_users)
        for name, value in constant.items()
    }
    arrays = {name: pa.array(values) for name, values in columns.items()} | repeated
    return pa.table({name: arrays[name] for name in schema.names}).cast(schema)


def _write_named(source: Path, target: Path, profiles: list[Profile]) -> None:
    """Copy segments with the name of each."""
    names = pa.array([profile.name for profile in profiles], pa.string())
    place = SEGMENTS.schema.get_field_index("segment_name")
    field = SEGMENTS.schema.field(place)
    with pq.ParquetWriter(target, SEGMENTS.schema) as writer:
        for batch in pq.ParquetFile(source).iter_batches():
            named = names.take(batch["segment"])
            table = pa.Table.from_batches([batch]).set_column(place, field, named)
            writer.write_table(table.cast(SEGMENTS.schema))


def _flat_map(
    vectors: VectorFolder, clusters: Clusters, storage: Storage, settings: Settings
) -> dict[str, Any]:
    """Return a stable sample of users on the two directions in which they differ most.

    Principal components keep distances honest and depend on no random start; the shares say how
    much of the variance a flat picture can show.
    """
    blocks = _blocks(load_vectors(vectors, _sample(vectors, storage, settings, MAX_MAP_USERS)))
    segments, _ = clusters.assign(blocks)
    columns = clusters.normalizer.transform(blocks)
    num_components = min(2, *columns.shape)
    with threadpool_limits(1):
        model = PCA(num_components, svd_solver="full")
        places = np.zeros((len(columns), 2))
        places[:, :num_components] = model.fit_transform(columns)
    return {
        "method": "principal components",
        "variance_shares": _rounded(np.nan_to_num(model.explained_variance_ratio_)),
        "x": _rounded(places[:, 0]),
        "y": _rounded(places[:, 1]),
        "segment": segments.tolist(),
    }


def _blocks(matrix: NDArray[np.float32]) -> Blocks:
    """Return vectors as the one block of the representation `embedding`."""
    return (Block("vector", matrix),)


def _rounded(values: Floats) -> list[float]:
    """Return numbers short enough for a file that people may open."""
    return [round(float(value), DIGITS) for value in values]
