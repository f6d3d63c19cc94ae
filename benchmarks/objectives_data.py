"""Prepares what `objectives.py` and `robust_recall.py` read, on a machine that has the pipeline.

    python benchmarks/objectives_data.py --source oss_commits --path FILE --cutoff D --out DIR

Through the pipeline's own stages: vocabulary and training sequences know nothing at or after the
train cutoff, features at a cutoff nothing at or after it. Aggregates exist only at a night's own
cutoff, so the warehouse is built for two nights, that of the train and that of the test cutoff.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Collection, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from behavior_pipeline.downstream.population import load_population, load_targets
from behavior_pipeline.downstream.users import Population
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.ingest.load import load_arrival
from behavior_pipeline.pipeline import Pipeline, open_pipeline
from behavior_pipeline.sequences.files import write_sequences
from behavior_pipeline.sequences.vocabulary import build_vocabulary, save_vocabulary
from behavior_pipeline.storage import write_json, writing_file, writing_folder
from behavior_pipeline.warehouse.build import build_warehouse
from behavior_pipeline.warehouse.export import export_marts
from behavior_pipeline.windows import EvaluationWindows, parse_cutoff

ROLES = ("train", "test")
NO_FEATURES = ("user_id", "observation_cutoff")


class Features(NamedTuple):
    """What is known of a cutoff's users.

    Attributes:
        population: users, RFM and labels.
        aggregates: the mart of that name, one row per user.
    """

    population: Population
    aggregates: pa.Table


def prepare(opened: Pipeline, cutoff: datetime, out: Path) -> None:
    """Load the source and write all that is measured on into a folder, which is replaced."""
    settings, preset, storage = opened.settings, opened.preset, opened.storage
    tell("events")
    load_arrival(preset, opened.raw_path, storage, settings, "history", datetime.now(UTC))
    windows = opened.windows(cutoff)
    tell(
        f"train cutoff {windows.train_cutoff:%Y-%m-%d}, test cutoff {windows.test_cutoff:%Y-%m-%d}"
    )
    features = {"train": features_at(opened, windows, windows.train_cutoff)}
    features["test"] = features_at(opened, windows, windows.test_cutoff)
    flagged = columns_with_nulls(each.aggregates for each in features.values())
    with writing_folder(out) as aside:
        tell("sequences")
        cutoffs = (windows.train_cutoff, windows.test_cutoff)
        vocabulary = build_vocabulary(
            storage, settings, preset.ignored_event_types, windows.train_cutoff
        )
        save_vocabulary(vocabulary, aside / "vocabulary")
        for role, moment in zip(ROLES, cutoffs, strict=True):
            write_sequences(storage, settings, vocabulary, moment, aside / f"{role}_sequences")
            write(aside / f"{role}_users.parquet", users_table(features[role].population))
            mine = aggregates_table(features[role].aggregates, flagged)
            write(aside / f"{role}_aggregates.parquet", mine)
        write_json(aside / "about.json", about(opened, windows, features))


def features_at(opened: Pipeline, windows: EvaluationWindows, moment: datetime) -> Features:
    """Build the night whose own cutoff a moment is, and read what it says of its users."""
    tell(f"warehouse at {moment:%Y-%m-%d}")
    settings, storage = opened.settings, opened.storage
    train = windows.train_cutoff
    night = EvaluationWindows(moment, train, moment, windows.horizon, windows.lookback)
    build_warehouse(storage, settings, opened.preset, night)
    export_marts(storage, settings, night)
    targets = load_targets(storage, train, settings.num_targets)
    population = load_population(storage, settings, moment, targets)
    mart = pq.read_table(storage.marts(moment) / "user_aggregates.parquet")
    places = pc.index_in(population.user_ids, value_set=mart["user_id"].combine_chunks())
    return Features(population, mart.take(places))


def users_table(population: Population) -> pa.Table:
    """Return users with RFM, churn and one column of booleans per propensity target."""
    columns = {
        "user_id": population.user_ids,
        "recency_days": population.rfm[:, 0],
        "frequency": population.rfm[:, 1],
        "monetary": population.rfm[:, 2],
        "is_churned": population.is_churned,
    }
    targets = {f"target:{name}": labels for name, labels in population.positives.items()}
    return pa.table(columns | targets)


def aggregates_table(mine: pa.Table, flagged: Collection[str]) -> pa.Table:
    """Return the features of the aggregates as numbers: 0 for a null, which a flag beside may tell.

    Args:
        mine: aggregates of some users.
        flagged: columns that get a flag; the same at all cutoffs that are compared.
    """
    columns: dict[str, np.ndarray] = {}
    for name in (name for name in mine.column_names if name not in NO_FEATURES):
        column = mine[name]
        columns[name] = pc.fill_null(column.cast(pa.float64()), 0.0).to_numpy()
        if name in flagged:
            columns[f"{name}_is_null"] = column.is_null().to_numpy().astype(np.float64)
    return pa.table(columns)


def columns_with_nulls(aggregates: Iterable[pa.Table]) -> set[str]:
    """Return the columns that have nulls in one of some tables."""
    return {name for table in aggregates for name in table.column_names if table[name].null_count}


def about(
    opened: Pipeline, windows: EvaluationWindows, features: dict[str, Features]
) -> dict[str, object]:
    """Return what the figures' lines say of the data."""
    return {
        "source": opened.preset.name,
        "train_cutoff": windows.train_cutoff.isoformat(),
        "test_cutoff": windows.test_cutoff.isoformat(),
        "horizon_days": windows.horizon.days,
        "lookback_days": windows.lookback.days,
        **{f"{role}_users": len(features[role].population) for role in ROLES},
        **{f"{role}_population": features[role].population.num_users for role in ROLES},
    }


def write(target: Path, table: pa.Table) -> None:
    """Write a table at once or not at all."""
    with writing_file(target) as aside:
        pq.write_table(table, aside, compression="zstd")


def tell(message: str) -> None:
    """Say on the error stream what is being done."""
    print(f"{message} ...", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Prepare from the command line, in a home that is removed in the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", required=True, help="name of a preset, or path of one")
    parser.add_argument("--path", required=True, help="raw events")
    parser.add_argument("--cutoff", required=True, help="test cutoff, YYYY-MM-DD")
    parser.add_argument("--out", type=Path, required=True, help="folder that is written")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args(arguments)
    home = Path(tempfile.mkdtemp(prefix="objectives-"))
    try:
        opened = open_pipeline(
            source=given.source, path=given.path, data_root=home, threads=given.threads
        )
        prepare(opened, parse_cutoff(given.cutoff), given.out.absolute())
    except PipelineError as error:
        sys.exit(str(error))
    finally:
        shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    main()
