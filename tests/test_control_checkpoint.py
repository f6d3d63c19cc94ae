"""The untrained control goes with the live checkpoint, whatever became of a later pretraining."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import dagster as dg
import pytest

from behavior_pipeline.definitions import defs
from behavior_pipeline.defs.encoder import untrained_checkpoint
from behavior_pipeline.defs.resources import PipelineResource
from behavior_pipeline.encoder.checkpoints import write_untrained
from behavior_pipeline.encoder.live import LIVE, UNTRAINED, checkpoint_folder, point_to
from behavior_pipeline.sequences.vocabulary import Vocabulary, load_vocabulary, save_vocabulary
from behavior_pipeline.storage import Storage

VOCABULARY = Vocabulary(
    values={"action": ("view", "buy"), "item": ("a",), "category": (), "location": ()},
    counts={"action": (9, 3), "item": (5,), "category": (), "location": ()},
    amount_edges=None,
    ignored_event_types=(),
    trained_through=datetime(2026, 1, 1, tzinfo=UTC),
)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """A home with a live checkpoint and the vocabulary of a pretraining that was killed since."""
    storage = Storage(tmp_path / "simulated")
    save_vocabulary(VOCABULARY, storage.vocabulary)
    live = write_untrained(storage.vocabulary, storage.checkpoints, "tiny", seed=1)
    point_to(storage.checkpoints, LIVE, live.name)
    later = replace(VOCABULARY, trained_through=datetime(2026, 1, 8, tzinfo=UTC))
    save_vocabulary(later, storage.vocabulary)
    return storage


def test_the_control_reads_the_live_checkpoints_vocabulary(storage: Storage) -> None:
    overrides = {"data_root": str(storage.home.parent), "encoder_preset": "tiny"}
    done = dg.materialize(
        [untrained_checkpoint], resources={"pipeline": PipelineResource(overrides=overrides)}
    )
    assert done.success
    control = load_vocabulary(checkpoint_folder(storage.checkpoints, UNTRAINED))
    assert control.vocabulary_id == VOCABULARY.vocabulary_id


def test_the_control_is_made_after_the_checkpoint() -> None:
    node = defs().resolve_asset_graph().get(dg.AssetKey("untrained_checkpoint"))
    assert {key.to_user_string() for key in node.parent_keys} == {"checkpoint"}
