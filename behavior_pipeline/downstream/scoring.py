"""Calibrated scores of every user of the population at a night's cutoff.

Probes are fitted where the labels are complete and newest: at the latest evaluation cutoff whose
label window ends at the night's cutoff or before. Both probes are tried on RFM with the embedding,
and per task the one of the lower log loss on users left out of its fit is taken; what the scores
are worth a horizon later is in the report (`calibration.json`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from behavior_pipeline import sql
from behavior_pipeline.contracts import COLD_START_USER, PREDICTIONS
from behavior_pipeline.downstream.blocks import Block, Blocks, take
from behavior_pipeline.downstream.calibration import CalibratedProbe, choose_calibrated
from behavior_pipeline.downstream.population import (
    RFM_COLUMNS,
    load_population,
    load_targets,
    require_mart,
)
from behavior_pipeline.downstream.probes import FittedProbes, fit_probes
from behavior_pipeline.downstream.tables import write_sorted
from behavior_pipeline.downstream.tasks import (
    LeftOut,
    Task,
    churn_task,
    next_action_task,
    propensity_task,
)
from behavior_pipeline.downstream.users import Population
from behavior_pipeline.downstream.vectors import VectorFolder, as_matrix, load_vectors, open_vectors
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.ingest.presets import Preset
from behavior_pipeline.progress import Report, report_nothing
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage, writing_folder
from behavior_pipeline.windows import EvaluationWindows

PREDICTIONS_FILE: Final = "predictions.parquet"
BATCH_ROWS: Final = 8192

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ScoringSummary:
    """What was scored, and how.

    Attributes:
        num_users: users scored: the whole population at the cutoff.
        label_cutoff: the cutoff whose labels the probes were fitted on.
        checkpoint_id: the encoder behind the scores.
        probes: task to the probe that was taken, for the tasks that could be learned.
        left_out: targets that could not be learned, with the reason.
    """

    num_users: int
    label_cutoff: datetime
    checkpoint_id: str
    probes: dict[str, str]
    left_out: tuple[LeftOut, ...]


@dataclass(frozen=True)
class _Scorer:
    """The fitted probes; None for a task that could not be learned."""

    churn: CalibratedProbe | None
    churn_rate: float
    propensity: CalibratedProbe | None
    targets: tuple[str, ...]
    next_action: FittedProbes | None
    classes: tuple[str, ...]


def label_cutoff(windows: EvaluationWindows) -> datetime:
    """Return the latest evaluation cutoff whose label window is over at the night's cutoff."""
    is_historical = windows.test_cutoff == windows.cutoff
    return windows.train_cutoff if is_historical else windows.test_cutoff


def score(
    storage: Storage,
    settings: Settings,
    preset: Preset,
    windows: EvaluationWindows,
    written_at: datetime,
    report: Report = report_nothing,
) -> ScoringSummary:
    """Fit calibrated probes on known labels and score the population at the night's cutoff.

    A task that cannot be learned leaves its columns null; churn falls back to the churn rate.

    Raises:
        PipelineError: if a mart or an embedding is missing, or embeddings of the two cutoffs come
            from different checkpoints.
    """
    vectors = open_vectors(storage.embeddings(windows.cutoff))
    rfm = require_mart(storage, windows.cutoff, "user_rfm")
    known_at = label_cutoff(windows)
    scorer, tasks = _fit(storage, settings, known_at, vectors.checkpoint_id, report)
    with writing_folder(storage.predictions(windows.cutoff)) as folder:
        tables = _score_buckets(
            storage, settings, vectors, rfm, scorer, windows, written_at, report
        )
        target = folder / PREDICTIONS_FILE
        num_users = write_sorted(target, PREDICTIONS, tables, storage, settings)
        _check_complete(rfm, num_users, preset)
    return ScoringSummary(
        num_users,
        known_at,
        vectors.checkpoint_id,
        _chosen_probes(scorer),
        tuple(left_out for task in tasks for left_out in task.left_out),
    )


def _fit(
    storage: Storage, settings: Settings, cutoff: datetime, checkpoint_id: str, report: Report
) -> tuple[_Scorer, tuple[Task, ...]]:
    """Fit every task's probe at a cutoff with known labels."""
    targets = load_targets(storage, cutoff, settings.num_targets)
    users = load_population(storage, settings, cutoff, targets)
    blocks = _training_blocks(storage, users, checkpoint_id)
    churn, propensity, next_action = tasks = (
        churn_task(users, users),
        propensity_task(users, users),
        next_action_task(users, users),
    )
    fitted = []
    for number, task in enumerate((churn, propensity), start=1):
        report(number, len(tasks), f"fitting {task.name.replace('_', ' ')}")
        fitted.append(_calibrated(task, blocks, settings))
    report(len(tasks), len(tasks), "fitting next action")
    scorer = _Scorer(
        churn=fitted[0],
        churn_rate=float(users.is_churned.mean()),
        propensity=fitted[1],
        targets=propensity.targets,
        next_action=_next_action(next_action, blocks, settings),
        classes=next_action.classes,
    )
    return scorer, tasks


def _training_blocks(storage: Storage, users: Population, checkpoint_id: str) -> Blocks:
    """Return RFM and embedding of the training users."""
    folder = open_vectors(storage.embeddings(users.cutoff))
    if folder.checkpoint_id != checkpoint_id:
        raise PipelineError(
            f"Embeddings at {users.cutoff:%Y-%m-%d} come from checkpoint {folder.checkpoint_id}, "
            f"those to be scored from {checkpoint_id}.",
            "A probe cannot cross checkpoints: embed both cutoffs with the live one.",
        )
    return Block("rfm", users.rfm), Block("vector", load_vectors(folder, users.user_ids))


def _calibrated(task: Task, blocks: Blocks, settings: Settings) -> CalibratedProbe | None:
    """Fit a task's binary targets, or nothing where there are none."""
    if not task.targets:
        return None
    return choose_calibrated(blocks, task.train_labels, settings.seed, settings.threads)


def _next_action(task: Task, blocks: Blocks, settings: Settings) -> FittedProbes | None:
    """Fit the next action by logistic regression, whose log loss keeps its probabilities honest."""
    if not task.targets:
        return None
    rows = take(blocks, task.train_rows)
    return fit_probes(
        "logistic_regression", rows, task.train_labels, settings.seed, settings.threads
    )


def _score_buckets(
    storage: Storage,
    settings: Settings,
    vectors: VectorFolder,
    rfm: Path,
    scorer: _Scorer,
    windows: EvaluationWindows,
    written_at: datetime,
    report: Report,
) -> Iterator[pa.Table]:
    """Yield the predictions bucket by bucket, a batch at a time."""
    for number, file in enumerate(vectors.files, start=1):
        with sql.open_engine(settings.memory_limit, settings.threads, storage.scratch) as engine:
            for batch in _join(engine, file, rfm):
                columns = _predict(scorer, batch)
                yield _as_table(batch, columns, windows, vectors.checkpoint_id, written_at)
        report(number, len(vectors.files), "scoring users")


def _join(engine: duckdb.DuckDBPyConnection, file: Path, rfm: Path) -> pa.RecordBatchReader:
    """Return the users of one bucket who are in the population, with vector and RFM, by id.

    In order, because the last bit of a product of matrices depends on the rows beside it.
    """
    query = """
        select
            embeddings.user_id, embeddings.embedding,
            rfm.recency_days::double as recency_days,
            rfm.frequency::double as frequency,
            coalesce(rfm.monetary, 0)::double as monetary
        from read_parquet($file, hive_partitioning = false) as embeddings
        join read_parquet($rfm) as rfm using (user_id)
        where rfm.is_in_population and embeddings.user_id <> $reserved
        order by user_id
    """
    values: dict[str, Any] = {"file": str(file), "rfm": str(rfm), "reserved": COLD_START_USER}
    return engine.execute(query, values).to_arrow_reader(BATCH_ROWS)


def _predict(scorer: _Scorer, batch: pa.RecordBatch) -> dict[str, Any]:
    """Return the columns of scores of a batch of users."""
    rfm = np.column_stack([batch[name].to_numpy() for name in RFM_COLUMNS])
    blocks = (Block("rfm", rfm), Block("vector", as_matrix(batch["embedding"])))
    num_users = batch.num_rows
    churn = scorer.churn.predict(blocks)[:, 0] if scorer.churn else None
    names = scorer.targets
    propensity = scorer.propensity.predict(blocks) if scorer.propensity else None
    target, target_probability = _most_likely(names, propensity, num_users)
    classes, next_action = _class_probabilities(scorer, blocks)
    event_type, event_probability = _most_likely(classes, next_action, num_users)
    return {
        "churn_probability": np.full(num_users, scorer.churn_rate) if churn is None else churn,
        "top_target": target,
        "top_target_probability": target_probability,
        "next_event_type": event_type,
        "next_event_probability": event_probability,
    }


def _class_probabilities(scorer: _Scorer, blocks: Blocks) -> tuple[tuple[str, ...], Floats | None]:
    """Return the classes of the next action and their probabilities."""
    if scorer.next_action is None:
        return (), None
    names = tuple(scorer.classes[place] for place in scorer.next_action.models[0].classes_)
    return names, scorer.next_action.predict(blocks)[0]


def _most_likely(
    names: tuple[str, ...], probabilities: Floats | None, num_users: int
) -> tuple[pa.Array, pa.Array]:
    """Return each user's most likely name and its probability; the more frequent name at a tie."""
    if probabilities is None:
        return pa.nulls(num_users, pa.string()), pa.nulls(num_users, pa.float32())
    best = probabilities.argmax(axis=1)
    return pa.array(names, pa.string()).take(pa.array(best)), pa.array(probabilities.max(axis=1))


def _as_table(
    batch: pa.RecordBatch,
    columns: dict[str, Any],
    windows: EvaluationWindows,
    checkpoint_id: str,
    written_at: datetime,
) -> pa.Table:
    """Return predictions in the order of the contract's columns."""
    constant = {
        "observation_cutoff": windows.cutoff,
        "checkpoint_id": checkpoint_id,
        "written_at": written_at,
    }
    schema = PREDICTIONS.schema
    for name, value in constant.items():
        columns[name] = pa.repeat(pa.scalar(value, schema.field(name).type), batch.num_rows)
    columns["user_id"] = batch["user_id"]
    return pa.table({name: columns[name] for name in schema.names}).cast(schema)


def _check_complete(rfm: Path, num_users: int, preset: Preset) -> None:
    """Refuse to leave users of the population without a score."""
    query = "select count(*) from read_parquet($rfm) where is_in_population"
    row = duckdb.connect().execute(query, {"rfm": str(rfm)}).fetchone()
    expected = int(row[0]) if row else 0
    if num_users != expected:
        raise PipelineError(
            f"{expected - num_users:,} of {expected:,} users of {preset.name}'s population have no "
            "embedding at this cutoff, so they cannot be scored.",
            "Run the embeddings stage for this cutoff again.",
        )


def _chosen_probes(scorer: _Scorer) -> dict[str, str]:
    """Return which probe each task uses."""
    fitted = {
        "churn": scorer.churn and scorer.churn.probes,
        "propensity": scorer.propensity and scorer.propensity.probes,
        "next_action": scorer.next_action,
    }
    return {task: probes.name for task, probes in fitted.items() if probes}
