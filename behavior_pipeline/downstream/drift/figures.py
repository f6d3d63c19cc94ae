"""Measures a night: its embeddings beside those of the night before, segments, RFM, events.

Everything is read from Parquet and JSON that earlier stages left, a chunk of users at a time.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
from scipy.optimize import linear_sum_assignment

from behavior_pipeline import sql
from behavior_pipeline.contracts import COLD_START_USER
from behavior_pipeline.downstream.drift.history import NightFigures, write_figures
from behavior_pipeline.downstream.drift.stability import population_stability, rfm_histograms
from behavior_pipeline.downstream.population import require_mart
from behavior_pipeline.downstream.segmentation import SEGMENTS_FILE
from behavior_pipeline.downstream.vectors import VectorFolder, load_vectors, open_vectors
from behavior_pipeline.embeddings.drift import compare_nights
from behavior_pipeline.embeddings.statistics import summarize_embeddings
from behavior_pipeline.ingest.schemas import KnownSchemas, read_schemas
from behavior_pipeline.ingest.unseen import find_unseen_types
from behavior_pipeline.progress import Report, report_nothing
from behavior_pipeline.sequences.vocabulary import load_vocabulary
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage
from behavior_pipeline.windows import partition_of

NORMS: Final = {0.05: "norm_p05", 0.5: "norm_p50", 0.95: "norm_p95"}
_NUM_STEPS: Final = 4


def measure_night(
    storage: Storage,
    settings: Settings,
    cutoff: datetime,
    measured_at: datetime,
    report: Report = report_nothing,
) -> NightFigures:
    """Measure the night that ends at a cutoff, and keep the figures in the home's history.

    The night is compared with the newest one before it whose embeddings are there. Of segments, RFM
    and arrivals that are not there, no figure is made.

    Raises:
        PipelineError: if there are no embeddings or no RFM at the cutoff.
    """
    vectors = open_vectors(storage.embeddings(cutoff))
    rfm = require_mart(storage, cutoff, "user_rfm")
    eve = _night_before(storage, cutoff)
    report(1, _NUM_STEPS, "embeddings")
    figures = _shape(storage.embeddings(cutoff))
    known = read_schemas(storage)
    if eve is not None:
        report(2, _NUM_STEPS, "neighbours")
        before = open_vectors(storage.embeddings(eve))
        figures |= _movement(vectors, before, storage, settings)
        report(3, _NUM_STEPS, "segments")
        figures |= _churn(storage, settings, cutoff, eve)
    figures |= _unknown(storage, known, vectors.checkpoint_id, partition_of(cutoff))
    histograms = rfm_histograms(rfm, storage, settings)
    if eve is not None:
        figures |= _rfm_change(histograms, storage, settings, eve)
    night = NightFigures(
        cutoff=cutoff,
        checkpoint_id=vectors.checkpoint_id,
        measured_at=measured_at,
        previous_cutoff=eve,
        previous_checkpoint_id=before.checkpoint_id if eve is not None else None,
        figures=figures,
        event_counts=_event_counts(known, partition_of(cutoff)),
        rfm=histograms,
    )
    write_figures(storage, night)
    report(_NUM_STEPS, _NUM_STEPS, "written")
    return night


def _night_before(storage: Storage, cutoff: datetime) -> datetime | None:
    """Return the newest cutoff before a night that has embeddings."""
    folder = storage.embeddings(cutoff)
    earlier = [path for path in folder.parent.glob("cutoff=*") if path.name < folder.name]
    newest = max(earlier, key=lambda path: path.name, default=None)
    if newest is None:
        return None
    return datetime.fromisoformat(newest.name.removeprefix("cutoff=")).replace(tzinfo=cutoff.tzinfo)


def _shape(embeddings: Path) -> dict[str, float]:
    """Return users, cold starts, norms and rank of a night's embeddings."""
    found = summarize_embeddings(embeddings)
    norms = {name: found.norm_quantiles.get(share) for share, name in NORMS.items()}
    return {
        "num_users": float(found.num_users),
        "cold_start_share": found.num_cold_start / max(found.num_users, 1),
        "effective_rank": found.effective_rank,
        **{name: norm for name, norm in norms.items() if norm is not None},
    }


def _movement(
    now: VectorFolder, before: VectorFolder, storage: Storage, settings: Settings
) -> dict[str, float]:
    """Return how a sample of the users of both nights has moved."""
    users = _common_users(now, before, storage, settings)
    found = compare_nights(load_vectors(now, users), load_vectors(before, users))
    if found is None:
        return {}
    values = vars(found) | {"num_compared_users": found.num_users}
    del values["num_users"]
    return {name: float(value) for name, value in values.items() if np.isfinite(value)}


def _common_users(
    now: VectorFolder, before: VectorFolder, storage: Storage, settings: Settings
) -> pa.Array:
    """Return a sample of the users with events on both nights: those of the smallest MD5.

    The hash takes the seed in, and the same users are drawn night after night as long as they stay.
    """
    nights = [
        f"(SELECT user_id FROM {sql.parquet(folder.files)} WHERE user_id <> $reserved "
        "AND NOT is_cold_start)"
        for folder in (now, before)
    ]
    query = (
        f"SELECT user_id FROM {nights[0]} SEMI JOIN {nights[1]} USING (user_id) "
        "ORDER BY md5(concat(user_id, ':', $seed)), user_id LIMIT $most"
    )
    values = {
        "reserved": COLD_START_USER,
        "seed": str(settings.seed),
        "most": settings.drift_sample_users,
    }
    with sql.open_engine(settings.memory_limit, settings.threads, storage.scratch) as engine:
        found = engine.execute(query, values).to_arrow_table()["user_id"].combine_chunks()
    return found.cast(pa.string())


def _churn(
    storage: Storage, settings: Settings, cutoff: datetime, eve: datetime
) -> dict[str, float]:
    """Return the share of the users of both nights who are in another segment."""
    files = [storage.segments(night) / SEGMENTS_FILE for night in (cutoff, eve)]
    if not all(file.is_file() for file in files):
        return {}
    now, before = (sql.parquet([file]) for file in files)
    query = (
        "SELECT now.segment, before.segment, count(*) "
        f"FROM {now} AS now JOIN {before} AS before USING (user_id) GROUP BY ALL"
    )
    with sql.open_engine(settings.memory_limit, settings.threads, storage.scratch) as engine:
        pairs = engine.execute(query).fetchall()
    churn = segment_churn(pairs)
    return {} if churn is None else {"segment_churn": churn}


def segment_churn(pairs: list[tuple[int, int, int]]) -> float | None:
    """Return the share of users whose segment is another than before, whatever its number.

    Segments are fitted anew each night, so their numbers mean nothing across nights: each is first
    matched with the one of the night before that shares the most users with it, one to one, such
    that the sum is greatest (assignment problem: Kuhn, "The Hungarian method", 1955).

    Args:
        pairs: (segment now, segment before, users in both).

    Returns:
        None without a user in common.
    """
    if not pairs:
        return None
    now, before, counts = (np.array(column) for column in zip(*pairs, strict=True))
    table = np.zeros((int(now.max()) + 1, int(before.max()) + 1), np.int64)
    table[now, before] = counts
    rows, columns = linear_sum_assignment(table, maximize=True)
    return float(1.0 - table[rows, columns].sum() / table.sum())


def _unknown(
    storage: Storage, known: KnownSchemas, checkpoint_id: str, arrival: str
) -> dict[str, float]:
    """Return the share of the night's events whose type the encoder does not know."""
    folder = storage.checkpoints / checkpoint_id
    if not folder.is_dir():
        return {}
    vocabulary = load_vocabulary(folder)
    seen, ignored = vocabulary.values["action"], vocabulary.ignored_event_types
    share = find_unseen_types(known, arrival, seen, ignored).arrived_share
    return {} if share is None else {"unknown_event_share": share}


def _rfm_change(
    now: dict[str, list[int]], storage: Storage, settings: Settings, eve: datetime
) -> dict[str, float]:
    """Return the PSI of recency, frequency and monetary against the night before."""
    mart: Path = storage.marts(eve) / "user_rfm.parquet"
    if not mart.is_file():
        return {}
    before = rfm_histograms(mart, storage, settings)
    return {
        f"psi_{column}": population_stability(counts, before[column])
        for column, counts in now.items()
    }


def _event_counts(known: KnownSchemas, arrival: str) -> dict[str, int] | None:
    """Return the events of an arrival by type, None if they are not recorded."""
    found = known.arrivals.get(arrival)
    return None if found is None else found.event_types
