"""How far a distribution has moved: the population stability index, over bins that stay.

PSI = sum over bins of (p - q) ln(p / q), with p and q the two shares of a bin (Siddiqi, "Credit
Risk Scorecards", Wiley 2006, chapter 9); the symmetric divergence of Jeffreys (1946).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import duckdb
import numpy as np
from numpy.typing import NDArray

from behavior_pipeline import sql
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage, read_json, write_json

RFM_COLUMNS: Final = ("recency_days", "frequency", "monetary")
NUM_BINS: Final = 10
EMPTY_BIN_USERS: Final = 0.5  # added to each bin of both, lest an empty one make the index infinite

Counts = Sequence[float]


def population_stability(now: Counts, before: Counts) -> float:
    """Return the PSI of two histograms over the same bins; 0 if they have the same shares.

    Raises:
        ValueError: if they have not as many bins.
    """
    if len(now) != len(before):
        raise ValueError(f"{len(now)} bins beside {len(before)}")
    p, q = _shares(now), _shares(before)
    return float(np.sum((p - q) * np.log(p / q)))


def mix_stability(now: Mapping[str, float], before: Mapping[str, float]) -> float:
    """Return the PSI of two counts by name; a name that one of them lacks counts nothing there."""
    names = sorted({*now, *before})
    return population_stability(
        [now.get(name, 0) for name in names], [before.get(name, 0) for name in names]
    )


def rfm_histograms(mart: Path, storage: Storage, settings: Settings) -> dict[str, list[int]]:
    """Count the users of the population by bins of recency, frequency and monetary.

    The bins are the deciles of the reference night, the first that was ever measured; they stay, so
    that any two nights can be compared.

    Args:
        mart: `user_rfm.parquet` of the night.
        storage: keeps the bins in `drift/rfm_bins.json`.
        settings: memory and threads.
    """
    with sql.open_engine(settings.memory_limit, settings.threads, storage.scratch) as engine:
        engine.execute(
            "CREATE VIEW users AS SELECT * FROM read_parquet("
            f"{sql.file_list([mart])}, hive_partitioning = false) WHERE is_in_population"
        )
        bins = _bins(engine, storage)
        return {column: _histogram(engine, column, edges) for column, edges in bins.items()}


def _bins(engine: duckdb.DuckDBPyConnection, storage: Storage) -> dict[str, list[float]]:
    """Return the inner edges of the bins of each column; those of this night if there are none."""
    target = storage.drift / "rfm_bins.json"
    if target.is_file():
        bins: dict[str, list[float]] = read_json(target)
        return bins
    shares = [number / NUM_BINS for number in range(1, NUM_BINS)]
    bins = {}
    for column in RFM_COLUMNS:
        query = f"SELECT quantile_disc({column}, {shares}) FROM users"
        (edges,) = sql.fetch_one(engine, query)
        bins[column] = sorted({float(edge) for edge in edges or ()})
    if all(bins.values()):  # a night without a user settles nothing
        write_json(target, bins)
    return bins


def _histogram(engine: duckdb.DuckDBPyConnection, column: str, edges: Sequence[float]) -> list[int]:
    """Count the users up to each edge, and those above the last one."""
    places = " + ".join(f"({column} > {edge!r})::INTEGER" for edge in edges) or "0"
    found = dict(
        engine.execute(f"SELECT {places} AS place, count(*) FROM users GROUP BY place").fetchall()
    )
    return [int(found.get(place, 0)) for place in range(len(edges) + 1)]


def _shares(counts: Counts) -> NDArray[np.float64]:
    """Return the shares of bins, none of them empty."""
    filled = np.asarray(counts, np.float64) + EMPTY_BIN_USERS
    shares: NDArray[np.float64] = filled / filled.sum()
    return shares
