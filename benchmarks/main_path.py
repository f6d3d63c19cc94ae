"""How long loading, tokenizing and embedding take beside what a person would write by hand.

Peers, on the same simulated events in the same run: loading beside DuckDB's bare sort of the raw
file to Parquet; tokenizing beside the same tokens made with pandas.
"""

from __future__ import annotations

import shutil
import tempfile
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
from figures import figure, publish, seconds_of

from behavior_pipeline.ingest.load import HISTORY, load_arrival
from behavior_pipeline.ingest.presets import load_preset
from behavior_pipeline.ingest.simulator import simulate
from behavior_pipeline.layers import read_layers
from behavior_pipeline.sequences.files import write_sequences
from behavior_pipeline.sequences.vocabulary import Vocabulary, build_vocabulary
from behavior_pipeline.settings import Settings, load_settings
from behavior_pipeline.storage import Storage
from behavior_pipeline.warehouse.build import build_warehouse
from behavior_pipeline.warehouse.export import export_marts
from behavior_pipeline.windows import EvaluationWindows

NUM_USERS = 20_000
NUM_DAYS = 90
START = date(2026, 1, 1)
CUTOFF = datetime(2026, 3, 1, tzinfo=UTC)
HORIZON = timedelta(days=30)


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        raw, storage = Path(folder) / "raw", Storage(Path(folder) / "home")
        settings = load_settings(data_root=Path(folder))
        simulate(raw, NUM_USERS, NUM_DAYS, 0, START)
        lines = [_loading(raw, storage, settings)]
        vocabulary = _warehouse(storage, settings)
        lines.append(_tokenizing(storage, settings, vocabulary))
        publish("main_path", lines)


def _loading(raw: Path, storage: Storage, settings: Settings) -> dict[str, object]:
    """Validated, deduplicated, quarantined and sorted events, beside the bare sort."""
    preset, now = load_preset("simulated"), datetime.now(UTC)

    def load() -> None:
        shutil.rmtree(storage.home, ignore_errors=True)
        load_arrival(preset, str(raw), storage, settings, HISTORY, now)

    def sort() -> None:
        with duckdb.connect() as connection:
            connection.execute(f"SET threads = {settings.threads}")
            connection.execute(
                f"COPY (SELECT * FROM '{raw}/*.parquet' ORDER BY user_id, event_time) "
                f"TO '{raw.parent}/sorted.parquet' (COMPRESSION zstd)"
            )

    return figure(
        "load_over_sort", seconds_of(load), "DuckDB COPY … ORDER BY", seconds_of(sort), "s"
    )


def _warehouse(storage: Storage, settings: Settings) -> Vocabulary:
    """Build what tokenizing reads."""
    windows = EvaluationWindows(CUTOFF, CUTOFF - HORIZON, CUTOFF, HORIZON, timedelta(days=60))
    build_warehouse(storage, settings, load_preset("simulated"), windows)
    export_marts(storage, settings, windows)
    return build_vocabulary(storage, settings, (), CUTOFF)


def _tokenizing(storage: Storage, settings: Settings, vocabulary: Vocabulary) -> dict[str, object]:
    """Token sequences of everybody, beside pandas' map and groupby on the same columns."""
    folder = storage.sequences(CUTOFF)
    known = vocabulary.values  # noqa: PD011 - not of pandas
    ids = {
        column: {value: place + 4 for place, value in enumerate(known[field])}
        for field, column in (
            ("action", "event_type"), ("item", "item_id"), ("category", "category"),
            ("location", "location"),
        )
    }  # fmt: skip
    edges = np.asarray(vocabulary.amount_edges)

    def ours() -> None:
        write_sequences(storage, settings, vocabulary, CUTOFF, folder)

    def pandas() -> None:
        files = read_layers(storage.events_sessionized).base_files()
        events = pd.concat(pd.read_parquet(file) for file in files)
        events = events[events["occurred_at"] < CUTOFF]
        events = events.sort_values(["user_id", "occurred_at", "event_id"])
        tokens = {
            column: events[column].map(known).fillna(1).astype("int32")
            for column, known in ids.items()
        }
        tokens["amount"] = np.searchsorted(edges, events["amount"].fillna(0)) + 4
        time = events["occurred_at"]
        tokens["hour"] = time.dt.weekday * 24 + time.dt.hour + 4
        tokens["gap"] = events.groupby("user_id")["occurred_at"].diff().dt.total_seconds().fillna(0)
        lists = pd.DataFrame(tokens).groupby(events["user_id"]).agg(list)
        lists.to_parquet(storage.home / "pandas.parquet")

    return figure("tokenize_over_pandas", seconds_of(ours), "pandas", seconds_of(pandas, 1), "s")


if __name__ == "__main__":
    main()
