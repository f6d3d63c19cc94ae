"""Stage 3 in Dagster: the checkpoint and its untrained control."""

from datetime import timedelta

import dagster as dg

from behavior_pipeline.defs.loggers import report_to
from behavior_pipeline.defs.partitions import ENCODER
from behavior_pipeline.defs.resources import PipelineResource
from behavior_pipeline.encoder.checkpoints import write_untrained
from behavior_pipeline.encoder.configuration import TrainingConfig
from behavior_pipeline.encoder.live import LIVE, UNTRAINED, checkpoint_folder, point_to
from behavior_pipeline.encoder.train import train
from behavior_pipeline.pipeline import Pipeline


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
    """The pretrained behavioural transformer that nightly embeddings use from now on."""
    opened = pipeline.open()
    storage = opened.storage
    summary = train(
        storage.training_sequences,
        storage.vocabulary,
        storage.checkpoints,
        training_config(opened),
        report=report_to(context, "training"),
    )
    point_to(storage.checkpoints, LIVE, summary.checkpoint_id)
    return dg.MaterializeResult(
        metadata={
            "num_steps": summary.num_steps,
            "num_events_seen": summary.num_events_seen,
            "events_per_second": summary.events_per_second,
            "checkpoint_id": summary.checkpoint_id,
        }
    )


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
