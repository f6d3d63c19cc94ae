"""Stage 3 in Dagster: the checkpoint and its untrained control."""

from datetime import timedelta
from typing import Any

import dagster as dg

from behavior_pipeline.defs.loggers import report_to
from behavior_pipeline.defs.loss_curve import draw_losses
from behavior_pipeline.defs.metadata import drawing
from behavior_pipeline.defs.partitions import ENCODER
from behavior_pipeline.defs.resources import PipelineResource
from behavior_pipeline.encoder.checkpoints import write_untrained
from behavior_pipeline.encoder.configuration import TrainingConfig
from behavior_pipeline.encoder.live import (
    CANDIDATE,
    LIVE,
    UNTRAINED,
    checkpoint_folder,
    point_to,
)
from behavior_pipeline.encoder.train import TrainingSummary, figures_in_words, train
from behavior_pipeline.feature_store.versions import read_versions
from behavior_pipeline.pipeline import Pipeline
from behavior_pipeline.storage import Storage


def training_config(opened: Pipeline) -> TrainingConfig:
    """Return how this installation trains."""
    settings = opened.settings
    return TrainingConfig.named(
        settings.encoder_preset,
        max_steps=settings.max_training_steps,
        seed=settings.seed,
        horizon_days=float(opened.preset.tasks.horizon_days),
        threads=settings.threads,
    )


def training_metadata(summary: TrainingSummary) -> dict[str, Any]:
    """Return what the UI shows of a training: its sizes, its last figures, its curves."""
    last = summary.history[-1]
    shown = ("train_total", "validation_total", "tokens_per_second", "mfu", "peak_memory_gigabytes")
    return {
        "num_steps": summary.num_steps,
        "num_events_seen": summary.num_events_seen,
        "events_per_second": round(summary.events_per_second),
        "best_step": summary.best_step,
        "seconds": round(summary.seconds, 1),
        **{name: float(f"{last[name]:.5g}") for name in shown if name in last},
        "checkpoint_id": summary.checkpoint_id,
        "losses": drawing(draw_losses(summary.history), "Losses by step"),
    }


@dg.asset(
    group_name="encoder",
    deps=["training_sequences", "vocabulary"],
    kinds={"pytorch"},
    pool=ENCODER,
    freshness_policy=dg.FreshnessPolicy.time_window(
        fail_window=timedelta(days=15), warn_window=timedelta(days=8)
    ),
)
def checkpoint(
    context: dg.AssetExecutionContext, pipeline: PipelineResource
) -> dg.MaterializeResult[None]:
    """A pretrained behavioural transformer: live if none was published before, else a candidate.

    A training that was killed goes on where it was, as long as its sequences are the same.
    """
    opened = pipeline.open()
    storage = opened.storage
    summary = train(
        storage.training_sequences,
        storage.vocabulary,
        storage.checkpoints,
        training_config(opened),
        report=report_to(context, "training"),
        log=lambda entry: context.log.info(figures_in_words(entry)),
        curves_folder=storage.training_curves,
        unfinished="discard",
    )
    role = role_of_new(storage, summary.checkpoint_id)
    point_to(storage.checkpoints, role, summary.checkpoint_id)
    return dg.MaterializeResult(metadata=training_metadata(summary) | {"role": role})


def role_of_new(storage: Storage, checkpoint_id: str) -> str:
    """Say what a new checkpoint becomes: nobody's vectors may change space unawares."""
    published = read_versions(storage).live_version.checkpoint_id
    return LIVE if published in (None, checkpoint_id) else CANDIDATE


@dg.asset(group_name="encoder", deps=[checkpoint], kinds={"pytorch"})
def untrained_checkpoint(pipeline: PipelineResource) -> dg.MaterializeResult[None]:
    """The same architecture with random weights: a strong control, always printed.

    Made after the live checkpoint and with its vocabulary, so that a pretraining that fails halfway
    leaves the nights the pair that they had.
    """
    opened = pipeline.open()
    storage = opened.storage
    settings = opened.settings
    vocabulary = checkpoint_folder(storage.checkpoints)
    folder = write_untrained(
        vocabulary, storage.checkpoints, settings.encoder_preset, settings.seed
    )
    point_to(storage.checkpoints, UNTRAINED, folder.name)
    return dg.MaterializeResult(metadata={"checkpoint_id": folder.name})
