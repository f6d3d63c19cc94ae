"""What Dagster shows of a training."""

from __future__ import annotations

import base64
from pathlib import Path

import dagster as dg

from behavior_pipeline.defs.encoder import training_metadata
from behavior_pipeline.defs.loss_curve import draw_losses
from behavior_pipeline.encoder.train import TrainingSummary

PNG = b"\x89PNG\r\n\x1a\n"


def entry(step: float, loss: float, **more: float) -> dict[str, float]:
    losses = {"train_next_event": loss, "train_total": loss, "validation_total": loss + 1}
    return {"step": step, "events": 100 * step, **losses, "tokens_per_second": 50.0, **more}


def summary(history: list[dict[str, float]]) -> TrainingSummary:
    return TrainingSummary("abc", Path("abc"), 20, 10, 2000, 40.0, history)


def test_the_last_figures_and_the_curves_are_shown():
    shown = training_metadata(summary([entry(10, 3.0), entry(20, 2.0, mfu=0.4)]))
    assert shown["train_total"] == 2.0
    assert shown["validation_total"] == 3.0
    assert (shown["mfu"], shown["tokens_per_second"]) == (0.4, 50.0)
    assert shown["events_per_second"] == 50.0
    picture = shown["losses"]
    assert isinstance(picture, dg.MarkdownMetadataValue)
    encoded = str(picture.value).split("base64,")[1].rstrip(")")
    assert base64.b64decode(encoded).startswith(PNG)


def test_what_is_not_known_is_left_out():
    bare = entry(10, 3.0)
    del bare["validation_total"]
    shown = training_metadata(summary([bare]))
    assert "mfu" not in shown
    assert "validation_total" not in shown


def test_curves_are_drawn_of_a_single_validation_as_well():
    assert draw_losses([entry(10, 3.0)]).startswith(PNG)
