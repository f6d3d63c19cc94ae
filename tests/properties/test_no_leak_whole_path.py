"""The whole path, from raw files to embeddings: the future and the order of rows change nothing."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from behavior_pipeline.embeddings.inference import embed_sequences
from behavior_pipeline.encoder.configuration import TrainingConfig
from behavior_pipeline.encoder.train import train
from behavior_pipeline.ingest.load import HISTORY, load_arrival
from behavior_pipeline.ingest.presets import load_preset
from behavior_pipeline.ingest.simulator import simulate
from behavior_pipeline.sequences.files import write_sequences
from behavior_pipeline.sequences.vocabulary import build_vocabulary, save_vocabulary
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage
from behavior_pipeline.warehouse.build import build_warehouse
from behavior_pipeline.warehouse.export import export_marts
from behavior_pipeline.windows import EvaluationWindows

CUTOFF = datetime(2026, 3, 1, tzinfo=UTC)  # train cutoff: everything below is as of here
HORIZON = timedelta(days=14)
WRITTEN_AT = datetime(2026, 5, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """A small shop's raw rows."""
    folder = tmp_path_factory.mktemp("raw") / "simulated"
    simulate(folder, num_users=80, num_days=90, seed=1, start=date(2026, 1, 1))
    return pa.concat_tables(pq.read_table(path) for path in sorted(folder.glob("*.parquet")))


@pytest.fixture(scope="module")
def base(raw: pa.Table, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    return build(tmp_path_factory.mktemp("base"), [raw])


@pytest.mark.slow
def test_events_at_or_after_the_cutoff_change_no_feature_token_weight_or_embedding(
    raw: pa.Table, base: dict[str, object], tmp_path: Path
) -> None:
    later = raw.filter(pc.less(raw["event_time"], _naive(CUTOFF, raw)))
    later = later.slice(0, later.num_rows // 2)
    moved = pc.add(later["event_time"], pa.scalar(timedelta(days=75)))
    latest = pc.less(moved, _naive(CUTOFF, raw))
    at_cutoff = pa.array([_naive(CUTOFF, raw).as_py()] * later.num_rows, moved.type)
    times = pc.if_else(latest, at_cutoff, moved)  # some exactly at the cutoff, others after it
    unseen = pa.array([f"new-{number}" for number in range(later.num_rows)])
    future = _with(later, event_time=times, event_id=unseen, product_id=unseen)
    grown = build(tmp_path, [raw, future])
    assert grown["num_events"] > base["num_events"]  # type: ignore[operator]
    assert [name for name in base if name != "num_events" and base[name] != grown[name]] == []


@pytest.mark.slow
def test_the_order_of_rows_and_files_changes_nothing(
    raw: pa.Table, base: dict[str, object], tmp_path: Path
) -> None:
    mixed = raw.take(np.random.default_rng(7).permutation(raw.num_rows))
    third = mixed.num_rows // 3
    shuffled = build(tmp_path, [mixed.slice(third), mixed.slice(0, third)])
    assert [name for name in base if base[name] != shuffled[name]] == []


def build(folder: Path, parts: list[pa.Table]) -> dict[str, object]:
    """Run every stage up to the embeddings; return what each made as of the cutoff."""
    source = folder / "raw"
    source.mkdir()
    for number, part in enumerate(parts):
        pq.write_table(part, source / f"part-{number}.parquet")
    storage = Storage(folder / "home")
    settings = Settings(
        memory_limit="1GB", threads=1, num_buckets=2, min_token_count=2, num_targets=5
    )
    preset = load_preset("simulated")
    loaded = load_arrival(preset, str(source), storage, settings, HISTORY, WRITTEN_AT)
    windows = EvaluationWindows(
        CUTOFF + HORIZON, CUTOFF, CUTOFF + HORIZON, HORIZON, timedelta(days=30)
    )
    build_warehouse(storage, settings, preset, windows)
    export_marts(storage, settings, windows)
    vocabulary = build_vocabulary(storage, settings, (), CUTOFF)
    save_vocabulary(vocabulary, storage.vocabulary)
    write_sequences(storage, settings, vocabulary, CUTOFF, storage.sequences(CUTOFF))
    config = TrainingConfig.named("tiny", max_steps=4, threads=1)
    trained = train(storage.sequences(CUTOFF), storage.vocabulary, storage.checkpoints, config)
    embed_sequences(
        storage.sequences(CUTOFF),
        trained.folder,
        storage.states(CUTOFF),
        storage.embeddings(CUTOFF),
        CUTOFF,
        written_at=WRITTEN_AT,
    )
    return {
        "num_events": loaded.num_accepted,
        "checkpoint_id": trained.checkpoint_id,
        "vocabulary_id": vocabulary.vocabulary_id,
        "rfm": _rows(storage.marts(CUTOFF) / "user_rfm.parquet"),
        "aggregates": _rows(storage.marts(CUTOFF) / "user_aggregates.parquet"),
        "targets": _rows(storage.marts(CUTOFF) / "propensity_targets.parquet"),
        "sequences": _rows(storage.sequences(CUTOFF)),
        "embeddings": _rows(storage.embeddings(CUTOFF)),
    }


def _rows(path: Path) -> pa.Table:
    """Read a file or folder in the order of its files."""
    return ds.dataset(path, format="parquet").to_table().combine_chunks()


def _naive(time: datetime, table: pa.Table) -> pa.Scalar:
    """Return a time as the raw column holds it."""
    kind = table.schema.field("event_time").type
    return pa.scalar(time if kind.tz else time.replace(tzinfo=None), kind)


def _with(table: pa.Table, **columns: pa.Array) -> pa.Table:
    """Replace columns, cast to the types that they had."""
    for name, values in columns.items():
        place = table.schema.get_field_index(name)
        field = table.schema.field(name)
        if pa.types.is_integer(field.type):
            values = pa.array(range(10**17, 10**17 + len(values)), field.type)  # noqa: PLW2901
        table = table.set_column(place, field, values.cast(field.type))
    return table
