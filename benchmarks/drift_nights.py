"""Nights of a simulated shop through the stages themselves, from raw events to figures of drift."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from behavior_pipeline.downstream.drift.figures import measure_night
from behavior_pipeline.downstream.drift.history import read_history
from behavior_pipeline.downstream.drift.verdicts import Verdict, judge_nights
from behavior_pipeline.downstream.segmentation import segment
from behavior_pipeline.embeddings.alignment import Alignment, fit_alignment
from behavior_pipeline.embeddings.inference import embed_sequences
from behavior_pipeline.encoder.configuration import TrainingConfig
from behavior_pipeline.encoder.live import LIVE, checkpoint_folder, point_to
from behavior_pipeline.encoder.train import train
from behavior_pipeline.ingest.arrivals import HISTORY
from behavior_pipeline.ingest.load import load_arrival
from behavior_pipeline.ingest.presets import load_preset
from behavior_pipeline.ingest.simulation.changes import Change
from behavior_pipeline.ingest.simulator import simulate
from behavior_pipeline.sequences.files import write_sequences
from behavior_pipeline.sequences.vocabulary import (
    build_vocabulary,
    load_vocabulary,
    save_vocabulary,
)
from behavior_pipeline.settings import Settings
from behavior_pipeline.sql import quote_text
from behavior_pipeline.storage import Storage
from behavior_pipeline.warehouse.build import build_warehouse
from behavior_pipeline.warehouse.export import export_marts
from behavior_pipeline.windows import EvaluationWindows, midnight

HISTORY_DAYS = 82  # before the first night
WRITTEN_AT = datetime(2027, 1, 1, tzinfo=UTC)
TRAINING_STEPS = 60
PRESET = load_preset("simulated")

Tamper = Callable[[pa.Table, "Shop", date], pa.Table]


@dataclass(frozen=True)
class Shop:
    """A home with a raw folder of its own.

    Attributes:
        folder: `raw/` with the history and a file a day, `home/`.
        seed: of the simulation.
        num_users: at the start.
        first_night: day of the first night, HISTORY_DAYS after the simulation's first day.
        num_nights: that are simulated.
    """

    folder: Path
    seed: int
    num_users: int
    first_night: date
    num_nights: int

    @property
    def storage(self) -> Storage:
        """The home."""
        return Storage(self.folder / "home")

    @property
    def settings(self) -> Settings:
        """One thread, one bucket, a tiny encoder."""
        return Settings(
            threads=1, num_buckets=1, memory_limit="1GB", encoder_preset="tiny", seed=self.seed
        )

    def simulate(self, changes: Sequence[Change] = ()) -> None:
        """Write the raw events: what lies before the first night, and a file for each day since."""
        raw = self.folder / "simulated"
        start = self.first_night - timedelta(days=HISTORY_DAYS)
        num_days = HISTORY_DAYS + self.num_nights
        simulate(raw, self.num_users, num_days, self.seed, start, changes=changes)
        events = f"read_parquet({quote_text(str(raw / '*.parquet'))})"
        first = f"event_time >= TIMESTAMPTZ '{self.first_night} 00:00:00+00'"
        shutil.rmtree(self.folder / "raw", ignore_errors=True)
        (self.folder / "raw").mkdir(parents=True)
        with duckdb.connect() as connection:
            connection.execute("SET TimeZone = 'UTC'; SET threads = 1")
            connection.execute(
                f"COPY (FROM {events} WHERE NOT ({first}) OR event_time IS NULL) "
                f"TO {quote_text(str(self.folder / 'raw' / 'history.parquet'))}"
            )
            connection.execute(
                f"COPY (SELECT *, strftime(event_time, '%Y-%m-%d') AS day FROM {events} "
                f"WHERE {first}) TO {quote_text(str(self.folder / 'raw' / 'days'))} "
                "(FORMAT parquet, PARTITION_BY (day))"
            )

    def open(self) -> None:
        """Load the history and train the first encoder on it."""
        cutoff = midnight(self.first_night)
        history = str(self.folder / "raw" / "history.parquet")
        load_arrival(PRESET, history, self.storage, self.settings, HISTORY, WRITTEN_AT)
        build_warehouse(self.storage, self.settings, PRESET, windows(cutoff))
        found = build_vocabulary(self.storage, self.settings, (), cutoff)
        save_vocabulary(found, self.storage.vocabulary)
        write_sequences(self.storage, self.settings, found, cutoff, self.storage.training_sequences)
        self.pretrain(self.seed)

    def pretrain(self, seed: int) -> None:
        """Train an encoder on the history and let it be the live one."""
        storage = self.storage
        config = TrainingConfig.named(
            "tiny", max_steps=TRAINING_STEPS, seed=seed, horizon_days=30.0, threads=1
        )
        done = train(storage.training_sequences, storage.vocabulary, storage.checkpoints, config)
        point_to(storage.checkpoints, LIVE, done.checkpoint_id)

    def align(self, day: date) -> None:
        """Let the live encoder's vectors lie in the space of the night before a day."""
        storage, eve = self.storage, midnight(day)
        checkpoint = checkpoint_folder(storage.checkpoints)
        own = storage.of_candidate(checkpoint.name)
        embed_sequences(
            storage.sequences(eve), checkpoint, own.states(eve), own.embeddings(eve), eve,
            written_at=WRITTEN_AT, threads=1,
        )  # fmt: skip
        motion = fit_alignment(own.embeddings(eve), storage.embeddings(eve), "eve")
        motion.save(storage.alignment(checkpoint.name))

    def night(self, day: date, tamper: Tamper | None = None) -> None:
        """Run a night from its arrivals to its figures; `tamper` may spoil its embeddings."""
        storage, settings = self.storage, self.settings
        cutoff = midnight(day) + timedelta(days=1)
        arrived = str(self.folder / "raw" / "days" / f"day={day}" / "*.parquet")
        load_arrival(PRESET, arrived, storage, settings, f"{day}", WRITTEN_AT, day=day)
        build_warehouse(storage, settings, PRESET, windows(cutoff))
        export_marts(storage, settings, windows(cutoff))
        checkpoint = checkpoint_folder(storage.checkpoints)
        eve = cutoff - timedelta(days=1)
        write_sequences(
            storage, settings, load_vocabulary(checkpoint), cutoff, storage.sequences(cutoff),
            earlier=[storage.sequences(eve)],
        )  # fmt: skip
        embed_sequences(
            storage.sequences(cutoff), checkpoint, storage.states(cutoff),
            storage.embeddings(cutoff), cutoff, written_at=WRITTEN_AT,
            previous_states_folder=storage.states(eve), threads=1,
            alignment=Alignment.load(storage.alignment(checkpoint.name)),
        )  # fmt: skip
        if tamper is not None:
            for file in storage.embeddings(cutoff).glob("*.parquet"):
                pq.write_table(tamper(pq.read_table(file, partitioning=None), self, day), file)
        segment(storage, settings, windows(cutoff), WRITTEN_AT)
        measure_night(storage, settings, cutoff, WRITTEN_AT)

    def day(self, number: int) -> date:
        """Return the day of a night, 0 for the first."""
        return self.first_night + timedelta(days=number)

    def verdicts(self) -> list[Verdict]:
        """Judge all nights."""
        return judge_nights(read_history(self.storage), self.settings)

    def forked(self, folder: Path) -> Shop:
        """Return a copy with its home as it is now."""
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.folder, folder)
        return replace(self, folder=folder)


def windows(cutoff: datetime) -> EvaluationWindows:
    """Return windows with the night's own cutoff alone: no probe is fitted here."""
    tasks = PRESET.tasks
    spans = (timedelta(days=tasks.horizon_days), timedelta(days=tasks.lookback_days))
    return EvaluationWindows(cutoff, cutoff, cutoff, *spans)


def mix_up_users(table: pa.Table, _shop: Shop, _day: date) -> pa.Table:
    """Give every user the vector of another: a join that went wrong."""
    return with_vectors(table, np.roll(vectors(table), 1, axis=0))


def vectors(table: pa.Table) -> np.ndarray:
    """Return a table's embeddings (N, D)."""
    column = table["embedding"].combine_chunks()
    return column.flatten().to_numpy().reshape(len(table), -1)


def with_vectors(table: pa.Table, matrix: np.ndarray) -> pa.Table:
    """Return a table with other embeddings (N, D)."""
    place = table.schema.get_field_index("embedding")
    values = pa.array(matrix.astype(np.float32).ravel())
    column = pa.FixedSizeListArray.from_arrays(values, matrix.shape[1])
    return table.set_column(place, table.schema.field(place), column)
