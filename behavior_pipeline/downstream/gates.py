"""What a candidate must pass before services may read it; each gate has a name and its figures.

The gates look at what consumers would feel: vectors that are broken or missing, values that know
the future, an encoder that no longer understands the events, and models that were fitted on the
live version's vectors ("yesterday's probes") and would read the candidate's worse.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from behavior_pipeline.downstream.blocks import Block
from behavior_pipeline.downstream.population import load_population, load_targets
from behavior_pipeline.downstream.probes import fit_probes
from behavior_pipeline.downstream.tasks import Task, churn_task, propensity_task
from behavior_pipeline.downstream.vectors import load_vectors, open_vectors
from behavior_pipeline.embeddings.alignment import Alignment
from behavior_pipeline.embeddings.statistics import EmbeddingStatistics, summarize_embeddings
from behavior_pipeline.encoder.checkpoints import load_checkpoint
from behavior_pipeline.encoder.heads import Foretold, foretell, load_event_head
from behavior_pipeline.encoder.sequence_files import read_table
from behavior_pipeline.progress import Report, report_nothing
from behavior_pipeline.sequences.reading import count_users, read_bucket, sequence_files
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage
from behavior_pipeline.windows import EvaluationWindows

KNOWS_NO_FUTURE: Final = "knows_no_future"
VECTORS_SOUND: Final = "vectors_are_sound"
USERS_COVERED: Final = "users_are_covered"
ONE_CHECKPOINT: Final = "one_checkpoint"
FORETELLS: Final = "foretells_events"
PROBES_HOLD: Final = "probes_hold"
READ_BACK: Final = "read_back_equal"
ROWS_COMPLETE: Final = "rows_are_complete"

EMBEDDING_GATES: Final = (VECTORS_SOUND, USERS_COVERED, ONE_CHECKPOINT, FORETELLS, PROBES_HOLD)
PUBLISHED_GATES: Final = (READ_BACK, ROWS_COMPLETE)
GATES: Final = (KNOWS_NO_FUTURE, *EMBEDDING_GATES, *PUBLISHED_GATES)
"""Every gate, in the order in which a candidate meets them."""

FORETOLD_USERS: Final = 2_048  # sequences that both checkpoints are asked about
_CHUNK_USERS: Final = 512
_MICROSECONDS: Final = 1_000_000


@dataclass(frozen=True)
class Outcome:
    """What a gate found.

    Attributes:
        passed: the candidate may go on.
        note: why, in words.
        figures: what it measured.
    """

    passed: bool
    note: str
    figures: dict[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)


def future_gate(trained_through: datetime, train_cutoff: datetime) -> Outcome:
    """Hold back a checkpoint that knows of events at or after the cutoff where probes train."""
    figures = {"trained_through": f"{trained_through}", "train_cutoff": f"{train_cutoff}"}
    if trained_through > train_cutoff:
        note = f"it knows of events before {trained_through}, probes train at {train_cutoff}"
        return Outcome(passed=False, note=note, figures=figures)
    return Outcome(passed=True, note=f"it knows nothing from {trained_through} on", figures=figures)


def embedding_gates(
    live: Storage,
    lane: Storage,
    settings: Settings,
    windows: EvaluationWindows,
    live_checkpoint: Path,
    report: Report = report_nothing,
) -> dict[str, Outcome]:
    """Put an embedded candidate through EMBEDDING_GATES.

    Args:
        live: where the live checkpoint's embeddings of the night are.
        lane: where the candidate's are.
        settings: the gates' thresholds.
        windows: the night's cutoffs.
        live_checkpoint: folder of the live checkpoint.
        report: progress over the gates.

    Raises:
        PipelineError: if something is missing that the gates read.
    """
    found = summarize_embeddings(lane.embeddings(windows.cutoff))
    before = summarize_embeddings(live.embeddings(windows.cutoff))
    outcomes = {
        VECTORS_SOUND: _sound(found, before.effective_rank * settings.min_rank_share),
        USERS_COVERED: _covered(found, live, lane, windows.cutoff, settings),
        ONE_CHECKPOINT: _one_checkpoint(found, lane.lane, windows.cutoff),
    }
    report(len(outcomes), len(EMBEDDING_GATES), "vectors looked over")
    outcomes[FORETELLS] = foretelling_gate(live, lane, settings, windows, live_checkpoint)
    report(len(outcomes), len(EMBEDDING_GATES), "events foretold")
    outcomes[PROBES_HOLD] = probes_gate(live, lane, settings, windows)
    report(len(outcomes), len(EMBEDDING_GATES), "probes tried")
    return outcomes


def _sound(found: EmbeddingStatistics, min_rank: float) -> Outcome:
    """Hold back vectors that are not numbers, nothing, or nearly the same for everybody."""
    is_flat = found.effective_rank == 0 or found.effective_rank < min_rank
    faults = {
        f"{found.num_not_finite:,} vectors with a NaN or infinity": found.num_not_finite > 0,
        f"{found.num_zero_vectors:,} vectors of zeros": found.num_zero_vectors > 0,
        f"users differ in {found.effective_rank:.2f} dimensions, {min_rank:.2f} needed": is_flat,
    }
    return _of_faults(faults, {"effective_rank": found.effective_rank, "needed": min_rank})


def _covered(
    found: EmbeddingStatistics,
    live: Storage,
    lane: Storage,
    cutoff: datetime,
    settings: Settings,
) -> Outcome:
    """Hold back embeddings of other users than those with sequences, or with too many priors."""
    expected, before = count_users(lane.sequences(cutoff)), count_users(live.sequences(cutoff))
    share = found.num_cold_start / max(found.num_users, 1)
    faults = {
        f"{found.num_users:,} users embedded of {expected:,}": found.num_users != expected,
        f"{expected:,} users, the live version has {before:,}": expected != before,
        f"{share:.1%} of users have no usable event": share > settings.max_cold_start_share,
    }
    return _of_faults(faults, {"num_users": found.num_users, "cold_start_share": share})


def _one_checkpoint(found: EmbeddingStatistics, checkpoint_id: str, cutoff: datetime) -> Outcome:
    """Hold back vectors of other checkpoints or cutoffs."""
    faults = {
        f"vectors of {', '.join(found.checkpoint_ids)}": found.checkpoint_ids != (checkpoint_id,),
        f"vectors at {len(found.cutoffs)} cutoffs": found.cutoffs != (cutoff,),
    }
    return _of_faults(faults, {"checkpoint_ids": list(found.checkpoint_ids)})


def _of_faults(faults: dict[str, bool], figures: dict[str, Any]) -> Outcome:
    """Pass if no fault is there; name those that are."""
    found = [fault for fault, is_there in faults.items() if is_there]
    return Outcome(passed=not found, note="; ".join(found) or "nothing wrong", figures=figures)


def foretelling_gate(
    live: Storage,
    lane: Storage,
    settings: Settings,
    windows: EvaluationWindows,
    live_checkpoint: Path,
) -> Outcome:
    """Hold back an encoder that foretells the newest events worse than the live one.

    Where the live one kept no head, worse than the shares of the types do. Both foretell the type
    of each event from those before it, among the first users of the night, from the train cutoff
    on: events that neither was trained on. A shuffled vocabulary or a training that was cut short
    shows here, and hardly anywhere else.
    """
    since = windows.train_cutoff
    own = _foretold(lane, windows.cutoff, lane.checkpoints / lane.lane, since)
    other = _foretold(live, windows.cutoff, live_checkpoint, since)
    if own is None:
        return Outcome(passed=False, note="the checkpoint kept no next-event head")
    figures = {"num_events": own.num_events, "loss": own.loss, "unigram_loss": own.unigram_loss}
    if own.num_events == 0:
        return Outcome(passed=True, note="no event since the train cutoff", figures=figures)
    bound = own.unigram_loss
    if other is not None:
        figures["live_loss"] = other.loss
        bound = other.loss * (1 + settings.max_foretelling_loss)
    note = f"loss of the next event's type {own.loss:.3f}, at most {bound:.3f} is allowed"
    return Outcome(passed=own.loss <= bound, note=note, figures=figures)


def _foretold(
    storage: Storage, cutoff: datetime, checkpoint: Path, since: datetime
) -> Foretold | None:
    """Let a checkpoint foretell the first users' events; None if it kept no head."""
    encoder = load_checkpoint(checkpoint).encoder
    head = load_event_head(checkpoint, encoder)
    if head is None:
        return None
    table = read_table(_first_users(storage.sequences(cutoff)), "sequences")
    return foretell(encoder, head, table, int(since.timestamp()) * _MICROSECONDS)


def _first_users(folder: Path) -> pa.Table:
    """Return the first sequences of the first buckets, by id."""
    chunks = (chunk for file in sequence_files(folder) for chunk in read_bucket(file, _CHUNK_USERS))
    return pa.concat_tables(islice(chunks, FORETOLD_USERS // _CHUNK_USERS))


def probes_gate(
    live: Storage, lane: Storage, settings: Settings, windows: EvaluationWindows
) -> Outcome:
    """Hold back vectors that models fitted on the live version read worse than its own.

    Logistic regressions are fitted on the live vectors at the train cutoff and judged at the test
    cutoff: on the live vectors, on the candidate's as aligned, and for comparison on the
    candidate's in its own space.
    """
    targets = load_targets(live, windows.train_cutoff, settings.num_targets)
    train, test = (
        load_population(live, settings, cutoff, targets)
        for cutoff in (windows.train_cutoff, windows.test_cutoff)
    )
    readings = _readings(live, lane, windows, test.user_ids)
    fitted_on = _vectors(live, windows.train_cutoff, train.user_ids)
    figures: dict[str, Any] = {}
    for task in (churn_task(train, test), propensity_task(train, test)):
        if task.targets:
            figures |= _losses(task, fitted_on, readings, settings)
    lost = {name: figures[f"{name}_lost"] for name in ("churn", "propensity")
            if f"{name}_lost" in figures}  # fmt: skip
    if not lost:
        return Outcome(passed=False, note="no task can be measured at this night", figures=figures)
    note = ", ".join(f"{name} loses {loss:.4f} AUROC" for name, loss in lost.items())
    is_held = max(lost.values()) < settings.max_probe_loss
    note += f"; less than {settings.max_probe_loss:g} is allowed"
    return Outcome(passed=is_held, note=note, figures=figures)


def nightly_probes_gate(
    storage: Storage,
    settings: Settings,
    yesterday: EvaluationWindows | None,
    tonight: EvaluationWindows,
) -> Outcome:
    """Hold back a night whose vectors yesterday's probes read worse than yesterday's.

    A logistic regression is fitted at yesterday's train cutoff and judged at yesterday's test
    cutoff and tonight's, each time on the vectors and labels of that cutoff. Without a yesterday of
    the same checkpoint there is nothing to compare.
    """
    if yesterday is None or not _has_yesterday(storage, yesterday, tonight):
        return Outcome(passed=True, note="there is no night before with this checkpoint")
    targets = load_targets(storage, yesterday.train_cutoff, settings.num_targets)
    cutoffs = (yesterday.train_cutoff, yesterday.test_cutoff, tonight.test_cutoff)
    train, before, now = (load_population(storage, settings, at, targets) for at in cutoffs)
    blocks = {at: _vectors(storage, at, users.user_ids)
              for at, users in zip(cutoffs, (train, before, now), strict=True)}  # fmt: skip
    figures: dict[str, Any] = {}
    for name, test in (("yesterday", before), ("tonight", now)):
        task = churn_task(train, test)
        if not task.targets:
            return Outcome(passed=True, note=f"churn cannot be measured: {task.left_out[0].reason}")
        reading = {name: blocks[test.cutoff]}
        figures |= _scores(task, blocks[train.cutoff], reading, settings)
    lost = figures["churn_yesterday"] - figures["churn_tonight"]
    bound = settings.max_nightly_probe_loss
    note = f"yesterday's probe of churn loses {lost:.4f} AUROC, less than {bound:g} is allowed"
    return Outcome(passed=lost < bound, note=note, figures=figures)


def _has_yesterday(
    storage: Storage, yesterday: EvaluationWindows, tonight: EvaluationWindows
) -> bool:
    """Tell whether yesterday's vectors and labels are there, of tonight's checkpoint."""
    cutoffs = (yesterday.train_cutoff, yesterday.test_cutoff)
    for at in cutoffs:
        labels = storage.marts(at) / "labels.parquet"
        if not (labels.exists() and any(storage.embeddings(at).glob("bucket=*.parquet"))):
            return False
    folders = [storage.embeddings(at) for at in (*cutoffs, tonight.test_cutoff)]
    return len({open_vectors(folder).checkpoint_id for folder in folders}) == 1


def _readings(
    live: Storage, lane: Storage, windows: EvaluationWindows, users: pa.Array
) -> dict[str, NDArray[np.float32]]:
    """Return the test users' vectors (N, D): live, aligned, unaligned."""
    aligned = _vectors(lane, windows.test_cutoff, users)
    alignment = Alignment.load(lane.alignment(lane.lane))
    readings = {"live": _vectors(live, windows.test_cutoff, users), "aligned": aligned}
    if alignment is not None:
        readings["unaligned"] = alignment.undo(aligned)
    return readings


def _vectors(storage: Storage, cutoff: datetime, users: pa.Array) -> NDArray[np.float32]:
    return load_vectors(open_vectors(storage.embeddings(cutoff)), users)


def _losses(
    task: Task,
    fitted_on: NDArray[np.float32],
    readings: dict[str, NDArray[np.float32]],
    settings: Settings,
) -> dict[str, float]:
    """Return the mean AUROC of a task's probes by reading, and what the aligned one loses."""
    scores = _scores(task, fitted_on, readings, settings)
    lost = scores[f"{task.name}_live"] - scores[f"{task.name}_aligned"]
    return scores | {f"{task.name}_lost": lost}


def _scores(
    task: Task,
    fitted_on: NDArray[np.float32],
    readings: dict[str, NDArray[np.float32]],
    settings: Settings,
) -> dict[str, float]:
    """Return the mean AUROC over a task's targets of probes fitted on (N, D), by reading (M, D)."""
    blocks = (Block("vector", fitted_on[task.train_rows]),)
    probes = fit_probes(
        "logistic_regression", blocks, task.train_labels, settings.seed, settings.threads
    )
    scores = {}
    for name, vectors in readings.items():
        predicted = probes.predict((Block("vector", vectors[task.test_rows]),))
        pairs = zip(task.test_labels, predicted, strict=True)
        found = np.mean([roc_auc_score(y, p[:, 1]) for y, p in pairs])
        scores[f"{task.name}_{name}"] = float(found)
    return scores
